/* Linear layers over many rows of bfloat16 with AMX, dense or in 4 bits, with a low rank or without, one or several that read the
 * same x.
 *
 *     s = scaling x' A^T     y = x W^T + s B^T + bias             x' = drop(x)
 *     V = scaling dY B       dX = sum of dY W + V A               dA = V^T x'        dB = dY^T s
 *
 * Some panels of W^T (dX: of W) are packed at a time, as much as stays in the second-level cache; 4 bits are decoded on the way
 * there and never written as a matrix. Then blocks of 32 rows of x go through them, and the low rank is one more step of each sum:
 * y is written once.
 *
 * Flops: 2 M K N; the low rank adds 2 M R (K + N) forward and 2 M R (3 K + 2 N) backward, R being r rounded up to a tile's 16 or
 * a step's 32. Bytes: W once, x (dY) once a pass, y (dX) once, x and dY once more for dA and dB. Every sum is one thread's, in an order
 * that does not depend on which thread it is.
 *
 * Measured, one core: tiles alone 2.2 Tflop/s, fed from the second-level cache 1.6, with y written 1.2; all of a layer's product,
 * W packed for 1,024 rows, 0.8 to 1.1. */
#include "many_rows.h"

#if defined(__x86_64__) && defined(__linux__)
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prfchw")
#include "amx_many.h"
#include "amx_low_rank.h"

/* The panel's place in y, or in dX, and which of the ranks' steps it takes. */
static place place_of(const many_rows_job *j, int64_t p, int64_t m, const uint16_t **bias, int64_t *rank_step, int64_t *rank_steps) {
    const many_rows_args *a = j->args;
    const int64_t rows = at_most(a->M - m, BLOCK);
    if (j->backward) {
        *bias = NULL, *rank_step = 0, *rank_steps = j->panel_steps - j->base_steps;
        return (place){a->dx + m * a->K + p * BLOCK, a->K, rows, a->K - p * BLOCK};
    }
    const int64_t i = layer_of_panel(j, p), n = (p - j->first_panel[i]) * BLOCK;
    const many_rows_layer *l = &a->layer[i];
    *bias = l->bias ? l->bias + n : NULL, *rank_step = j->rank_step[i], *rank_steps = j->rank_steps[i];
    return (place){l->y + m * l->N + n, l->N, rows, l->N - n};
}

/* Blocks of rows through the panels of this pass. */
static void product_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    many_rows_job *j = context;
    const many_rows_args *a = j->args;
    const int64_t E = j->all_rank_steps;
    uint16_t *room = scratch(1, (j->backward ? j->n_steps : j->k_steps) * STEP * sizeof(uint16_t));
    float sums[SUMS] __attribute__((aligned(64)));
    if (!room) {
        j->failed = 1;
        return;
    }
    left_steps left[MAX_LAYERS];
    configure_tiles(16, 16);
    for (int64_t b; (b = take_unit(&j->next)) < j->m_steps;) {
        const int64_t lefts = !j->base_steps ? 0 : j->backward ? a->layers : 1;
        if (j->backward) {
            blocks_of_dys(j, b, room, left);
            if (j->first == 0 && E) find_V(j, left, b, sums);
        } else {
            const factor x = {a->x, a->K, a->M, a->K}, dropped = {a->dropped, a->K, a->M, a->K};
            left[0] = block_of(&dropped, b * BLOCK, room);
            if (j->first == 0) down(j, left, 1, j->down_s, b, j->ranks_of_rows, NULL, sums);
            if (a->x != a->dropped) left[0] = block_of(&x, b * BLOCK, room);
        }
        for (int64_t p = j->first; p < j->last; p++) {
            const uint16_t *bias, *right = j->right + (p - j->first) * j->panel_steps * STEP;
            int64_t rank_step, rank_steps;
            const place to = place_of(j, p, b * BLOCK, &bias, &rank_step, &rank_steps);
            expect_block(&to);
            clear_sums();
            for (int64_t i = 0; i < lefts; right += left[i++].steps * STEP) multiply(left[i], right);
            multiply(packed_steps(j->ranks_of_rows + (b * E + rank_step) * STEP, rank_steps), right);
            put_sums(sums);
            if (j->base_steps) put_block(sums, &to, bias);
            else add_block(sums, &to);
        }
    }
    _tile_release();
}

static void multiply_all(many_rows_job *j) {
    for (int64_t count = j->last; j->first < j->panels && !j->failed; j->first += count) {
        j->last = at_most(j->first + count, j->panels);
        run_units(j, pack_task);
        run_units(j, product_task);
    }
}

int64_t many_rows_bytes(const many_rows_args *a, int backward) {
    many_rows_job j;
    return set_up(&j, a, backward);
}

int many_rows_forward(const many_rows_args *a) {
    many_rows_job j;
    set_up(&j, a, 0);
    fill_scale(&j);
    multiply_all(&j);
    return -j.failed;
}

int many_rows_backward(const many_rows_args *a) {
    many_rows_job j;
    set_up(&j, a, 1);
    fill_scale(&j);
    if (j.all_rank_steps) run_units(&j, pack_down_task);
    multiply_all(&j);
    if (j.all_rank_steps && (j.need_B || !j.panels)) run_units(&j, down_task);
    if (!j.failed && (j.need_A || j.need_B)) run_units(&j, adapter_task);
    return -j.failed;
}
END_TARGET
#else
int64_t many_rows_bytes(const many_rows_args *a, int backward) { return (void)a, (void)backward, 0; }
int many_rows_forward(const many_rows_args *a) { return (void)a, -1; }
int many_rows_backward(const many_rows_args *a) { return (void)a, -1; }
#endif
