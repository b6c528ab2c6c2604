/* lora_linear for many rows of bfloat16 with AMX, for one layer or for several that read the same x:
 *
 *     y = [x | s] [W | B]^T + bias           s = scaling x' A^T
 *     dX = [dY | V] [W ; A]                  V = scaling dY B                 dA = V^T x'                 dB = dY^T s
 *
 * The low rank is further steps of the product: the sums are still in tiles. A weight in 4 bits is decoded into the right
 * factor's tiles; nothing else is ever dequantized. Several layers are one product: forward their N lie side by side, backward
 * their dY are steps of one sum, and their ranks share steps.
 *
 * Flops: 2 M N K forward and for dX; the low rank adds 2 M R (K + N) forward and 4 M R (K + N) + 2 M R N backward, R being r
 * rounded up to a tile's 16 for sums and to a step's 32 where it is summed over. Each thread owns rows (y, dX) or columns (dA,
 * dB) of the results, and sums in the same order whatever the number of threads. */
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

/* Blocks [block, block + blocks) of the left factor times panels [first, last), all steps. Results go through `write`, which is told
 * of each block beforehand (sums NULL) so that its lines are on their way. low_rank: 0 none, 1 the panel's layer's, 2 all. */
typedef void (*writer)(const lora_job *j, int64_t block, int64_t panel, const float *sums);

static void product(const lora_job *j, const uint16_t *left, int64_t block, int64_t blocks, int64_t first, int64_t last, int low_rank,
                    float *sums, writer write) {
    const int64_t left_steps = j->main_steps + j->all_rank_steps, depths = ceil_div(j->main_steps, DEPTH);
    for (int64_t at = first; at < last; at += WIDTH) {
        const int64_t until = at_most(at + WIDTH, last);
        for (int64_t d = 0; d < depths; d++) {
            const int64_t from = j->main_steps * d / depths, to = j->main_steps * (d + 1) / depths;
            for (int64_t b = 0; b < blocks; b++) {
                const uint16_t *here = left + b * left_steps * STEP;
                const int tall = (block + b) * BLOCK + 16 < j->args->M;
                for (int64_t p = at; p < until; p++) {
                    float *s = depths == 1 ? sums : sums + ((p - at) * BLOCKS + b) * 1024;
                    const uint16_t *right = j->right + p * j->panel_stride;
                    if (d) fetch_sums(s);
                    else clear_sums();
                    if (d + 1 == depths) write(j, block + b, p, NULL);
                    multiply(here + from * STEP, right + from * STEP, to - from, tall, 1);
                    if (d + 1 == depths && low_rank) {
                        int64_t step = 0, steps = j->all_rank_steps;
                        if (low_rank == 1) { /* forward: the panel's layer has ranks of its own */
                            int64_t i = layer_of_panel(j, p);
                            step = j->rank_step[i], steps = j->rank_steps[i];
                        }
                        multiply(here + (j->main_steps + step) * STEP, right + j->main_steps * STEP, steps, tall, 1);
                    }
                    put_sums(s);
                    if (d + 1 == depths) write(j, block + b, p, s);
                }
            }
        }
    }
}

static void write_y(const lora_job *j, int64_t block, int64_t panel, const float *sums) {
    const lora_args *a = j->args;
    const int64_t i = layer_of_panel(j, panel), n = (panel - j->first_panel[i]) * BLOCK, m = block * BLOCK;
    const lora_layer *l = &a->layer[i];
    if (!sums) return prefetch_block(l->y + m * l->N + n, l->N, at_most(a->M - m, BLOCK));
    write_block(sums, l->y + m * l->N + n, l->N, at_most(a->M - m, BLOCK), l->N - n, l->bias ? l->bias + n : NULL);
}

static void write_dx(const lora_job *j, int64_t block, int64_t panel, const float *sums) {
    const lora_args *a = j->args;
    const int64_t k = panel * BLOCK, m = block * BLOCK;
    if (!sums) return prefetch_block(a->dx + m * a->K + k, a->K, at_most(a->M - m, BLOCK));
    write_block(sums, a->dx + m * a->K + k, a->K, at_most(a->M - m, BLOCK), a->K - k, NULL);
}

/* The threads' share of blocks and panels: rows first, since a thread makes its rows' left factor and ranks. */
typedef struct {
    int64_t first_block, last_block, first_panel, last_panel;
} share;

static share share_of(const lora_job *j, int64_t thread, int64_t threads) {
    const int64_t blocks = j->m_steps, panels = j->first_panel[j->args->layers];
    const int64_t down = at_most(threads, blocks) > 0 ? at_most(threads, blocks) : 1, across = threads / down;
    const int64_t row = thread % down, column = thread / down;
    if (column >= across) return (share){0, 0, 0, 0};
    return (share){part_start(blocks, 1, row, down), part_start(blocks, 1, row + 1, down), part_start(panels, 1, column, across),
                   part_start(panels, 1, column + 1, across)};
}

static uint16_t *left_memory(const lora_job *j, float **sums) {
    const int64_t left_steps = j->main_steps + j->all_rank_steps;
    const int64_t extra = steps_of(j->args->K) + j->all_rank_steps; /* a block of x and its ranks, beside one of dY */
    const size_t left = (BLOCKS * left_steps + extra) * STEP * sizeof(uint16_t);
    char *memory = scratch(1, left + (size_t)WIDTH * BLOCKS * 4096);
    if (!memory) return NULL;
    *sums = (float *)(memory + left);
    return (uint16_t *)memory;
}

static void forward_task(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    const share mine = share_of(j, thread, threads);
    const int64_t left_steps = j->main_steps + j->all_rank_steps;
    float *sums;
    uint16_t *left = left_memory(j, &sums);
    if (!left) {
        j->failed = 1;
        return;
    }
    const factor x = {.values = a->x, .stride = a->K, .rows = a->M, .columns = a->K};
    const factor dropped = {.values = a->dropped, .stride = a->K, .rows = a->M, .columns = a->K};
    uint16_t *other = left + BLOCKS * left_steps * STEP;
    configure_tiles(16, 16);
    for (int64_t b = mine.first_block; b < mine.last_block; b += BLOCKS) {
        const int64_t blocks = at_most(mine.last_block - b, BLOCKS);
        for (int64_t i = 0; i < blocks; i++) {
            uint16_t *here = left + i * left_steps * STEP, *from = here;
            pack_left(&x, (b + i) * BLOCK, here);
            if (a->dropped != a->x && j->ranks) pack_left(&dropped, (b + i) * BLOCK, from = other);
            block_ranks(j, from, low_of(j).s, j->main_steps, sums, here + j->main_steps * STEP);
        }
        product(j, left, b, blocks, mine.first_panel, mine.last_panel, 1, sums, write_y);
    }
    _tile_release();
}

static void dx_task(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    const share mine = share_of(j, thread, threads);
    const int64_t left_steps = j->main_steps + j->all_rank_steps, k_steps = steps_of(a->K);
    float *sums;
    uint16_t *left = left_memory(j, &sums);
    if (!left) {
        j->failed = 1;
        return;
    }
    const factor dropped = {.values = a->dropped, .stride = a->K, .rows = a->M, .columns = a->K};
    uint16_t *other = left + BLOCKS * left_steps * STEP;
    configure_tiles(16, 16);
    for (int64_t b = mine.first_block; b < mine.last_block; b += BLOCKS) {
        const int64_t blocks = at_most(mine.last_block - b, BLOCKS);
        for (int64_t i = 0; i < blocks; i++) {
            uint16_t *here = left + i * left_steps * STEP, *V = here + j->main_steps * STEP;
            for (int64_t l = 0; l < a->layers; l++) {
                const factor dy = {.values = a->layer[l].y, .stride = a->layer[l].N, .rows = a->M, .columns = a->layer[l].N};
                pack_left(&dy, (b + i) * BLOCK, here + j->first_step[l] * STEP);
            }
            block_ranks(j, here, low_of(j).v, j->main_steps, sums, V);
            if (mine.first_panel) continue; /* who has the first panel also has these */
            for (int64_t e = 0; j->columns_V && e < j->all_rank_steps; e++)
                turn_ranks(V + e * STEP, j->ranks - e * BLOCK, j->columns_V + (e * j->m_steps + b + i) * STEP);
            if (j->columns_s) {
                pack_left(&dropped, (b + i) * BLOCK, other);
                block_ranks(j, other, low_of(j).s, k_steps, sums, other + k_steps * STEP);
                for (int64_t e = 0; e < j->all_rank_steps; e++)
                    turn_ranks(other + (k_steps + e) * STEP, j->ranks - e * BLOCK, j->columns_s + (e * j->m_steps + b + i) * STEP);
            }
            if (a->low_rank) copy_ranks(j, V, (b + i) * BLOCK);
        }
        if (a->dx) product(j, left, b, blocks, mine.first_panel, mine.last_panel, a->low_rank ? 0 : 2, sums, write_dx);
    }
    _tile_release();
}

/* dA and dB: a thread takes panels of x's and of the dYs' columns and sums over all rows. */
static void adapter_task(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    int64_t first[MAX_LAYERS + 2] = {0, j->columns_V ? steps_of(a->K) : 0};
    for (int64_t i = 0; i < a->layers; i++) first[i + 2] = first[i + 1] + (a->layer[i].dB ? steps_of(a->layer[i].N) : 0);
    uint16_t *right = scratch(1, (j->m_steps * STEP + 2048) * sizeof(uint16_t));
    if (!right) {
        j->failed = 1;
        return;
    }
    float *sums = (float *)(right + j->m_steps * STEP);
    const int64_t items = first[a->layers + 1];
    configure_tiles(16, 16);
    for (int64_t item = part_start(items, 1, thread, threads); item < part_start(items, 1, thread + 1, threads); item++) {
        int64_t of = 0; /* 0: x, i + 1: layer i's dY */
        while (item >= first[of + 1]) of++;
        const int64_t columns = of ? a->layer[of - 1].N : a->K, at = (item - first[of]) * BLOCK, count = at_most(columns - at, BLOCK);
        const factor f = {.values = of ? a->layer[of - 1].y : a->dropped, .stride = columns, .rows = a->M, .columns = columns};
        for (int64_t s = 0; s < j->m_steps; s++) pack_step(&f, s * BLOCK, at, count, right + s * STEP, 0);
        for (int64_t e = 0; e < j->all_rank_steps; e++) {
            if (of && (e < j->rank_step[of - 1] || e >= j->rank_step[of - 1] + j->rank_steps[of - 1])) continue;
            clear_sums();
            multiply((of ? j->columns_s : j->columns_V) + e * j->m_steps * STEP, right, j->m_steps, j->wide, 1);
            put_sums(sums);
            for (int64_t i = of ? of - 1 : 0; i < (of ? of : a->layers); i++)
                for (int64_t r = 0; r < a->layer[i].r; r++) {
                    const int64_t row = j->first_rank[i] + r - e * BLOCK;
                    if (row < 0 || row >= BLOCK) continue;
                    const float *from = sums + row / 16 * 512 + row % 16 * 16;
                    for (int64_t c = 0; c < count; c++) {
                        const float value = from[c / 16 * 256 + c % 16];
                        if (of) a->layer[i].dB[(at + c) * a->layer[i].r + r] = value;
                        else if (a->layer[i].dA) a->layer[i].dA[r * a->K + at + c] = value;
                    }
                }
        }
    }
    _tile_release();
}

void advise_huge_pages(void *start, int64_t bytes);

static const isa *const engine = &isa_avx512;

/* Bytes of `workspace` for lora_amx_forward (backward = 0) or lora_amx_backward. */
int64_t lora_amx_bytes(const lora_args *a, int backward) {
    lora_job j;
    set_up(&j, a, engine, backward);
    int64_t steps = j.first_panel[a->layers] * j.panel_stride / STEP + j.all_rank_steps * steps_of(a->K);
    if (backward) steps += j.all_rank_steps * (j.main_steps + 2 * j.m_steps);
    return steps * STEP * (int64_t)sizeof(uint16_t);
}

static void lay_out(lora_job *j) {
    const int64_t right = j->first_panel[j->args->layers] * j->panel_stride;
    advise_huge_pages(j->right, right * (int64_t)sizeof(uint16_t));
    j->low = j->right + right;
}

int lora_amx_forward(const lora_args *a) {
    lora_job j;
    set_up(&j, a, engine, 0);
    lay_out(&j);
    run_parallel(pack_forward, &j, a->threads);
    run_parallel(forward_task, &j, a->threads);
    return -j.failed;
}

int lora_amx_backward(const lora_args *a) {
    lora_job j;
    set_up(&j, a, engine, 1);
    lay_out(&j);
    uint16_t *columns = j.low + j.all_rank_steps * (steps_of(a->K) + j.main_steps) * STEP;
    int need_A = 0, need_B = 0;
    for (int64_t i = 0; i < a->layers; i++) need_A |= a->layer[i].dA != NULL, need_B |= a->layer[i].dB != NULL;
    if (need_A) j.columns_V = columns;
    if (need_B) j.columns_s = columns + j.all_rank_steps * j.m_steps * STEP;
    run_parallel(pack_backward, &j, a->threads);
    run_parallel(dx_task, &j, a->threads);
    if (need_A || need_B) run_parallel(adapter_task, &j, a->threads);
    return -j.failed;
}
END_TARGET
#else
int64_t lora_amx_bytes(const lora_args *a, int backward) { return (void)a, (void)backward, 0; }
int lora_amx_forward(const lora_args *a) { return (void)a, -1; }
int lora_amx_backward(const lora_args *a) { return (void)a, -1; }
#endif
