/* The low rank of amx_many.c: s and V, which lie between its two thin products, and the adapter's gradients. */
#ifndef POSTTRAIN_AMX_LOW_RANK_H
#define POSTTRAIN_AMX_LOW_RANK_H

#include "amx_many.h"

/* Of x and dY in dA and dB: rows of a kilobyte, where that leaves each thread a unit or two, and as many as the second-level cache holds
 * packed. */
enum { FEWEST_PANELS = 4, MOST_PANELS = 16, BLOCKS_AT_A_TIME = 4 };

static factor rows_of_dy(const many_rows_job *j, int64_t i) {
    const many_rows_layer *l = &j->args->layer[i];
    return (factor){.values = l->y, .stride = l->N, .rows = j->args->M, .columns = l->N};
}

/* Sums of a block by 32 ranks, scaled, as a left factor over the ranks. */
static void write_ranks(const float *scale, const float *sums, uint16_t *out) {
    const __m512 low = _mm512_load_ps(scale), high = _mm512_load_ps(scale + 16);
    for (int r = 0; r < BLOCK; r++) {
        const float *row = sums + r / 16 * 512 + r % 16 * 16;
        __m512 a = _mm512_mul_ps(_mm512_load_ps(row), low), b = _mm512_mul_ps(_mm512_load_ps(row + 256), high);
        _mm512_store_si512(out + r / 16 * TILE + r % 16 * 32, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

/* The same as a left factor over the block's rows: ranks become rows, `halves` of 16. */
static void turn_ranks(const float *scale, const float *sums, int halves, uint16_t *out) {
    for (int h = 0; h < halves; h++) {
        __m512 low[16], high[16];
        transpose16(sums + 256 * h, 16, low);
        transpose16(sums + 256 * h + 512, 16, high);
        for (int r = 0; r < 16; r++) {
            const __m512 factor = _mm512_set1_ps(scale[16 * h + r]);
            __m512 a = _mm512_mul_ps(low[r], factor), b = _mm512_mul_ps(high[r], factor);
            _mm512_store_si512(out + h * TILE + r * 32, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
    }
}

/* A block's ranks from its left factor, which comes in parts: to `rows` [block][rank step] and, turned, to [rank step][block],
 * unless NULL. */
static void down(const many_rows_job *j, const left_steps *left, int64_t lefts, const uint16_t *right, int64_t b, uint16_t *rows,
                 uint16_t *turned, float *sums) {
    for (int64_t e = 0; e < j->all_rank_steps; e++) {
        clear_sums();
        for (int64_t i = 0; i < lefts; right += left[i++].steps * STEP)
            if (j->narrow) multiply_16_columns(left[i], right);
            else multiply(left[i], right);
        put_sums(sums);
        if (j->narrow) add_odd_columns(sums);
        if (rows) write_ranks(j->scale + e * BLOCK, sums, rows + (b * j->all_rank_steps + e) * STEP);
        if (turned) turn_ranks(j->scale + e * BLOCK, sums, j->narrow ? 1 : 2, turned + (e * j->m_steps + b) * STEP);
    }
}

/* A block's V to rows of a->low_rank, the layers' ranks side by side. */
static void copy_ranks(const many_rows_job *j, const uint16_t *V, int64_t m) {
    const many_rows_args *a = j->args;
    int64_t width = 0, column = 0;
    for (int64_t i = 0; i < a->layers; i++) width += a->layer[i].r;
    for (int64_t i = 0; i < a->layers; i++)
        for (int64_t rank = j->first_rank[i]; rank < j->first_rank[i] + a->layer[i].r; rank++, column++)
            for (int64_t r = 0; r < BLOCK && m + r < a->M; r++)
                a->low_rank[(m + r) * width + column] = V[rank / 32 * STEP + r / 16 * TILE + r % 16 * 32 + rank % 32];
}

/* V of a block, from the layers' rows of dY. */
static void find_V(const many_rows_job *j, const left_steps *dys, int64_t b, float *sums) {
    down(j, dys, j->args->layers, j->down_V, b, j->ranks_of_rows, j->need_A ? j->turned_V : NULL, sums);
    if (j->args->low_rank) copy_ranks(j, j->ranks_of_rows + b * j->all_rank_steps * STEP, b * BLOCK);
}

/* A block of rows of each dY. */
static void blocks_of_dys(const many_rows_job *j, int64_t b, uint16_t *room, left_steps *left) {
    for (int64_t i = 0; i < j->args->layers; i++) {
        const factor dy = rows_of_dy(j, i);
        left[i] = block_of(&dy, b * BLOCK, room + j->first_panel[i] * STEP);
    }
}

/* What the adapter's gradients need of the rows: s, and V if it was not found on the way to dX. */
static void down_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    many_rows_job *j = context;
    const many_rows_args *a = j->args;
    uint16_t *room = scratch(1, (j->k_steps > j->n_steps ? j->k_steps : j->n_steps) * STEP * sizeof(uint16_t));
    float sums[SUMS] __attribute__((aligned(64)));
    if (!room) {
        j->failed = 1;
        return;
    }
    const factor x = {.values = a->dropped, .stride = a->K, .rows = a->M, .columns = a->K};
    configure_tiles(16, 16);
    for (int64_t b; (b = take_unit(&j->next)) < j->m_steps;) {
        left_steps left[MAX_LAYERS];
        if (!j->panels) {
            blocks_of_dys(j, b, room, left);
            find_V(j, left, b, sums);
        }
        if (j->need_B) {
            left[0] = block_of(&x, b * BLOCK, room);
            down(j, left, 1, j->down_s, b, NULL, j->turned_s, sums);
        }
    }
    _tile_release();
}

/* Rank steps [step, step + steps) of a turned factor times `panels` panels of f, from `column` on, over all rows: to sums
 * [panel][rank step]. */
static void sum_columns(const many_rows_job *j, const uint16_t *turned, int64_t step, int64_t steps, const factor *f, int64_t column,
                        int64_t panels, uint16_t *right, float *sums) {
    const int64_t count = at_most(f->columns - column, panels * BLOCK);
    for (int64_t block = 0; block < j->m_steps; block += BLOCKS_AT_A_TIME) {
        const int64_t blocks = at_most(j->m_steps - block, BLOCKS_AT_A_TIME);
        for (int64_t b = 0; b < blocks; b++)
            pack_step(f, (block + b) * BLOCK, column, count, right + b * STEP, BLOCKS_AT_A_TIME * STEP);
        for (int64_t p = 0; p < panels; p++)
            for (int64_t e = 0; e < steps; e++) {
                const left_steps left = packed_steps(turned + ((step + e) * j->m_steps + block) * STEP, blocks);
                float *to = sums + (p * steps + e) * SUMS;
                if (block == 0) clear_sums();
                else fetch_sums(to);
                if (j->narrow) multiply_16_rows(left, right + p * BLOCKS_AT_A_TIME * STEP);
                else multiply(left, right + p * BLOCKS_AT_A_TIME * STEP);
                put_sums(to);
            }
    }
    for (int64_t e = 0; e < panels * steps && j->narrow; e++) add_odd_rows(sums + e * SUMS);
}

/* 32 columns of dA, or 32 rows of dB, of the layer i; `sums` are of the rank steps from `step` on. */
static void write_gradient(const many_rows_job *j, int64_t i, int64_t step, const float *sums, int64_t at, int64_t count, int of_x) {
    const many_rows_layer *l = &j->args->layer[i];
    const int64_t first = j->first_rank[i] - step * BLOCK; /* among the ranks of `sums` */
    for (int64_t rank = first / 16 * 16; rank < first + l->r; rank += 16) { /* tiles that hold some of the layer's */
        const int64_t from = rank < first ? first - rank : 0, to = at_most(first + l->r - rank, 16);
        for (int half = 0; half < 2; half++) {
            const float *tile = sums + rank / BLOCK * SUMS + rank % BLOCK / 16 * 512 + half * 256;
            const int64_t column = at + 16 * half, columns = at_most(count - 16 * half, 16);
            if (of_x) {
                const __mmask16 kept = (__mmask16)first_words(columns);
                for (int64_t r = from; r < to; r++)
                    _mm512_mask_storeu_ps(l->dA + (rank + r - first) * j->args->K + column, kept, _mm512_load_ps(tile + 16 * r));
                continue;
            }
            __m512 of_column[16];
            transpose16(tile, 16, of_column);
            for (int64_t c = 0; c < columns; c++) {
                const __m512 ranks = _mm512_maskz_compress_ps((__mmask16)(0xffff << from), of_column[c]);
                _mm512_mask_storeu_ps(l->dB + (column + c) * l->r + rank + from - first, (__mmask16)first_words(to - from), ranks);
            }
        }
    }
}

/* Of a factor with so many. */
static int64_t panels_of_a_unit(const many_rows_job *j, int64_t panels) {
    const int64_t share = ceil_div(panels, 2 * j->args->threads);
    return at_most(share > FEWEST_PANELS ? share : FEWEST_PANELS, MOST_PANELS);
}

/* The unit's panels: `count` of layer i's dY from `panel` on, or of x (i = -1). Returns 0 past the last unit. */
static int panels_of_unit(const many_rows_job *j, int64_t unit, int64_t *i, int64_t *panel, int64_t *count) {
    for (*i = -1; *i < j->args->layers; ++*i) {
        const int64_t panels = *i < 0 ? j->k_steps : j->first_panel[*i + 1] - j->first_panel[*i];
        const int64_t most = panels_of_a_unit(j, panels), units = ceil_div(panels, most);
        if (unit < units) {
            *panel = unit * most;
            *count = at_most(panels - *panel, most);
            return 1;
        }
        unit -= units;
    }
    return 0;
}

/* dA = V^T x' and dB = dY^T s, some columns of x' or of a dY a unit. */
static void adapter_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    many_rows_job *j = context;
    const many_rows_args *a = j->args;
    const int64_t E = j->all_rank_steps, room = MOST_PANELS * BLOCKS_AT_A_TIME * STEP;
    uint16_t *right = scratch(1, room * sizeof(uint16_t) + MOST_PANELS * E * SUMS * sizeof(float));
    if (!right) {
        j->failed = 1;
        return;
    }
    float *sums = (float *)(right + room);
    const factor x = {.values = a->dropped, .stride = a->K, .rows = a->M, .columns = a->K};
    memset(sums, 0, MOST_PANELS * E * SUMS * sizeof(float)); /* what no rows add up to */
    configure_tiles(16, 16);
    for (int64_t own, panel, panels; panels_of_unit(j, take_unit(&j->next), &own, &panel, &panels);) {
        const int of_x = own < 0;
        if (of_x ? !j->need_A : !j->need_B) continue;
        const factor f = of_x ? x : rows_of_dy(j, own);
        const int64_t step = of_x ? 0 : j->rank_step[own], steps = of_x ? E : j->rank_steps[own];
        sum_columns(j, of_x ? j->turned_V : j->turned_s, step, steps, &f, panel * BLOCK, panels, right, sums);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t at = (panel + p) * BLOCK, count = at_most(f.columns - at, BLOCK);
            for (int64_t i = of_x ? 0 : own; i < (of_x ? a->layers : own + 1); i++)
                if (of_x ? a->layer[i].dA != NULL : a->layer[i].dB != NULL)
                    write_gradient(j, i, step, sums + p * steps * SUMS, at, count, of_x);
        }
    }
    _tile_release();
}

#endif
