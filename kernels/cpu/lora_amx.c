/* The low rank of lora_linear for many rows of bfloat16 with AMX, for one layer or for several that read the same x. The base
 * products are the vendor's.
 *
 *     y += s B^T         s = scaling x A^T
 *     dX += V A          V = scaling dY B            dA = V^T x            dB = dY^T s
 *
 * A block of 32 rows of x (or dY) is packed into tiles, and its ranks never leave the cache: x and dY are read from memory once, y
 * and dX read and written once. Several layers share what is packed of x, and their ranks share steps.
 *
 * Flops: 2 M R (K + N) forward and 4 M R (K + N) + 2 M R (K + N) backward, R being r rounded up to a tile's 16 for sums and to a
 * step's 32 where it is summed over. Each thread owns rows; dA and dB are sums over parts of
 * the rows that do not depend on the number of threads. */
#include "lora.h"

#if defined(__x86_64__) && defined(__linux__)
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "lora_pack.h"

/* Sums of a block by ranks, each layer's scaled, as bfloat16 steps behind the block's left factor. */
static void write_ranks(const lora_job *j, int64_t panel, const float *sums, uint16_t *out) {
    float scale[BLOCK] __attribute__((aligned(64))) = {0};
    for (int64_t i = 0; i < j->args->layers; i++)
        for (int64_t r = 0; r < j->args->layer[i].r; r++) {
            int64_t at = j->first_rank[i] + r - panel * BLOCK;
            if (at >= 0 && at < BLOCK) scale[at] = (float)j->args->layer[i].scaling;
        }
    const __m512 scale0 = _mm512_load_ps(scale), scale1 = _mm512_load_ps(scale + 16);
    for (int r = 0; r < BLOCK; r++) {
        const float *row = sums + r / 16 * 512 + r % 16 * 16;
        __m512 a = _mm512_mul_ps(_mm512_loadu_ps(row), scale0), b = _mm512_mul_ps(_mm512_loadu_ps(row + 256), scale1);
        _mm512_store_si512(out + r / 16 * TILE + r % 16 * 32, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

/* The same block as columns of a left factor over M (one step of it): ranks become rows. */
static void turn_ranks(const uint16_t *in, int64_t ranks, uint16_t *out) {
    for (int64_t r = 0; r < BLOCK; r++)
        for (int64_t m = 0; m < BLOCK; m++) out[r / 16 * TILE + r % 16 * 32 + m] = r < ranks ? in[m / 16 * TILE + m % 16 * 32 + r] : 0;
}

/* A block's V to rows of a->low_rank, the layers' ranks side by side. */
static void copy_ranks(const lora_job *j, const uint16_t *V, int64_t m) {
    const lora_args *a = j->args;
    int64_t width = 0, column = 0;
    for (int64_t i = 0; i < a->layers; i++) width += a->layer[i].r;
    for (int64_t i = 0; i < a->layers; i++)
        for (int64_t rank = j->first_rank[i]; rank < j->first_rank[i] + a->layer[i].r; rank++, column++)
            for (int64_t r = 0; r < BLOCK && m + r < a->M; r++)
                a->low_rank[(m + r) * width + column] = V[rank / 32 * STEP + r / 16 * TILE + r % 16 * 32 + rank % 32];
}

/* One block: its ranks from `steps` of its left factor, written to `out` (one step for every panel of ranks). */
static void block_ranks(const lora_job *j, const uint16_t *left, const uint16_t *right, int64_t steps, float *sums, uint16_t *out) {
    for (int64_t e = 0; e < j->all_rank_steps; e++) {
        clear_sums();
        multiply(left, right + e * steps * STEP, steps, 1, j->wide);
        put_sums(sums);
        write_ranks(j, e, sums, out + e * STEP);
    }
}

/* A block's ranks, from `step` on, times panel `p` of the up factor, added to 32 columns of y (or dx). */
static void add_panel(const lora_job *j, const uint16_t *ranks, int64_t step, int64_t steps, int64_t p, int64_t m, float *sums, uint16_t *y,
                      int64_t stride, int64_t columns) {
    const int64_t rows = at_most(j->args->M - m, BLOCK);
    clear_sums();
    multiply(ranks + step * STEP, j->up + p * j->all_rank_steps * STEP, steps, rows > 16, 1);
    put_sums(sums);
    add_block(sums, y + m * stride, stride, rows, columns);
}

/* Room for a block of the left factors and its ranks, and for sums. */
static uint16_t *left_memory(const lora_job *j, float **sums) {
    const int64_t widest = j->k_steps > j->n_steps ? j->k_steps : j->n_steps;
    const size_t left = (widest + j->all_rank_steps) * STEP * sizeof(uint16_t);
    char *memory = scratch(1, left + 4096);
    if (!memory) return NULL;
    *sums = (float *)(memory + left);
    return (uint16_t *)memory;
}

static void forward_task(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    float *sums;
    uint16_t *left = left_memory(j, &sums);
    if (!left) {
        j->failed = 1;
        return;
    }
    const factor x = {.values = a->x, .stride = a->K, .rows = a->M, .columns = a->K};
    uint16_t *s = left + j->k_steps * STEP;
    configure_tiles(16, 16);
    for (int64_t b = part_start(j->m_steps, 1, thread, threads); b < part_start(j->m_steps, 1, thread + 1, threads); b++) {
        pack_left(&x, b * BLOCK, left);
        block_ranks(j, left, j->s, j->k_steps, sums, s);
        for (int64_t i = 0; i < a->layers; i++) {
            const lora_layer *l = &a->layer[i];
            for (int64_t p = j->first_panel[i], n = 0; p < j->first_panel[i + 1]; p++, n += BLOCK)
                add_panel(j, s, j->rank_step[i], j->rank_steps[i], p, b * BLOCK, sums, l->y + n, l->N, l->N - n);
        }
    }
    _tile_release();
}

/* Ranks [step, step + steps) of a group of blocks times its rows of 32 columns of f, added to the part's sums. */
static void add_columns(const lora_job *j, const uint16_t *turned, int64_t step, int64_t steps, const factor *f, int64_t block, int64_t blocks,
                        int64_t column, float *sums, int fresh, uint16_t *right) {
    for (int64_t i = 0; i < blocks; i++) pack_step(f, (block + i) * BLOCK, column, at_most(f->columns - column, BLOCK), right + i * STEP, 0);
    for (int64_t e = step; e < step + steps; e++) {
        if (fresh) clear_sums();
        else fetch_sums(sums + e * SUMS);
        multiply(turned + e * GROUP * STEP, right, blocks, j->wide, 1);
        put_sums(sums + e * SUMS);
    }
}

static factor rows_of_dy(const lora_args *a, int64_t i) {
    return (factor){.values = a->layer[i].y, .stride = a->layer[i].N, .rows = a->M, .columns = a->layer[i].N};
}

/* A part of the rows: V, and with it dX, and the part's sums of dA and dB. */
static void backward_task(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    const int64_t E = j->all_rank_steps, widest = j->k_steps > j->n_steps ? j->k_steps : j->n_steps;
    uint16_t *left = scratch(1, ((widest + E + 2 * E * GROUP + GROUP) * STEP) * sizeof(uint16_t) + SUMS * sizeof(float));
    if (!left) {
        j->failed = 1;
        return;
    }
    uint16_t *ranks = left + widest * STEP, *turned_s = ranks + E * STEP, *turned_V = turned_s + E * GROUP * STEP;
    uint16_t *right = turned_V + E * GROUP * STEP;
    float *sums = (float *)(right + GROUP * STEP);
    const factor x = {.values = a->x, .stride = a->K, .rows = a->M, .columns = a->K};
    configure_tiles(16, 16);
    for (int64_t part = part_start(j->parts, 1, thread, threads); part < part_start(j->parts, 1, thread + 1, threads); part++) {
        const int64_t first = part * j->part_blocks, last = at_most(first + j->part_blocks, j->m_steps);
        for (int64_t b = first; b < last; b += GROUP) {
            const int64_t blocks = at_most(last - b, GROUP);
            for (int64_t c = 0; c < blocks; c++) {
                if (j->need_B) {
                    pack_left(&x, (b + c) * BLOCK, left);
                    block_ranks(j, left, j->s, j->k_steps, sums, ranks);
                    for (int64_t e = 0; e < E; e++) turn_ranks(ranks + e * STEP, j->ranks - e * BLOCK, turned_s + (e * GROUP + c) * STEP);
                }
                for (int64_t i = 0; i < a->layers; i++) {
                    const factor dy = rows_of_dy(a, i);
                    pack_left(&dy, (b + c) * BLOCK, left + j->first_panel[i] * STEP);
                }
                block_ranks(j, left, j->v, j->n_steps, sums, ranks);
                for (int64_t e = 0; e < E; e++) turn_ranks(ranks + e * STEP, j->ranks - e * BLOCK, turned_V + (e * GROUP + c) * STEP);
                if (a->low_rank) copy_ranks(j, ranks, (b + c) * BLOCK);
                else if (a->dx)
                    for (int64_t p = 0, k = 0; p < j->k_steps; p++, k += BLOCK)
                        add_panel(j, ranks, 0, E, p, (b + c) * BLOCK, sums, a->dx + k, a->K, a->K - k);
            }
            for (int64_t p = 0; j->need_A && p < j->k_steps; p++)
                add_columns(j, turned_V, 0, E, &x, b, blocks, p * BLOCK, sums_of(j, part, p, 0), b == first, right);
            for (int64_t i = 0; j->need_B && i < a->layers; i++) {
                const factor dy = rows_of_dy(a, i);
                for (int64_t p = j->first_panel[i], n = 0; p < j->first_panel[i + 1]; p++, n += BLOCK)
                    add_columns(j, turned_s, j->rank_step[i], j->rank_steps[i], &dy, b, blocks, n, sums_of(j, part, j->k_steps + p, 0),
                                b == first, right);
            }
        }
    }
    _tile_release();
}

/* The parts' sums of one panel and step of ranks, in order. */
static void add_parts(const lora_job *j, int64_t panel, int64_t step, float *total) {
    memset(total, 0, SUMS * sizeof(float));
    for (int64_t part = 0; part < j->parts; part++) {
        const float *sums = sums_of(j, part, panel, step);
        for (int k = 0; k < SUMS; k++) total[k] += sums[k];
    }
}

/* dA and dB from the parts' sums: a thread takes panels of x's and of the dYs' columns. */
static void adapter_task(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    float total[SUMS] __attribute__((aligned(64)));
    const int64_t panels = j->k_steps + j->n_steps;
    for (int64_t panel = part_start(panels, 1, thread, threads); panel < part_start(panels, 1, thread + 1, threads); panel++) {
        const int of_x = panel < j->k_steps;
        if (of_x ? !j->need_A : !j->need_B) continue;
        const int64_t first = of_x ? 0 : layer_of_panel(j, panel - j->k_steps), last = of_x ? a->layers : first + 1;
        const int64_t at = (of_x ? panel : panel - j->k_steps - j->first_panel[first]) * BLOCK;
        const int64_t count = at_most((of_x ? a->K : a->layer[first].N) - at, BLOCK);
        const int64_t step = of_x ? 0 : j->rank_step[first], steps = of_x ? j->all_rank_steps : j->rank_steps[first];
        for (int64_t e = step; e < step + steps; e++) {
            add_parts(j, panel, e, total);
            for (int64_t i = first; i < last; i++)
                for (int64_t r = 0; r < a->layer[i].r; r++) {
                    const int64_t row = j->first_rank[i] + r - e * BLOCK;
                    if (row < 0 || row >= BLOCK) continue;
                    const float *from = total + row / 16 * 512 + row % 16 * 16;
                    for (int64_t c = 0; c < count; c++) {
                        const float value = from[c / 16 * 256 + c % 16];
                        if (!of_x) a->layer[i].dB[(at + c) * a->layer[i].r + r] = value;
                        else if (a->layer[i].dA) a->layer[i].dA[r * a->K + at + c] = value;
                    }
                }
        }
    }
}

/* Bytes of `workspace` for lora_amx_forward (backward = 0) or lora_amx_backward. */
int64_t lora_amx_bytes(const lora_args *a, int backward) {
    lora_job j;
    set_up(&j, a, backward);
    const int64_t steps = j.k_steps + j.n_steps; /* of the three right factors: s's and up's, V's and, backward, up's over K */
    const int64_t right = (backward ? steps + j.k_steps : steps) * j.all_rank_steps * STEP * (int64_t)sizeof(uint16_t);
    return right + (backward ? j.parts * steps * j.all_rank_steps * SUMS * (int64_t)sizeof(float) : 0);
}

int lora_amx_forward(const lora_args *a) {
    lora_job j;
    set_up(&j, a, 0);
    run_parallel(pack_forward, &j, a->threads);
    run_parallel(forward_task, &j, a->threads);
    return -j.failed;
}

int lora_amx_backward(const lora_args *a) {
    lora_job j;
    set_up(&j, a, 1);
    run_parallel(pack_backward, &j, a->threads);
    run_parallel(backward_task, &j, a->threads);
    if (j.need_A || j.need_B) run_parallel(adapter_task, &j, a->threads);
    return -j.failed;
}
END_TARGET
#else
int64_t lora_amx_bytes(const lora_args *a, int backward) { return (void)a, (void)backward, 0; }
int lora_amx_forward(const lora_args *a) { return (void)a, -1; }
int lora_amx_backward(const lora_args *a) { return (void)a, -1; }
#endif
