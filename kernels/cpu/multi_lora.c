/* A batch in which every row has an adapter of its own, or none: rows are sorted by adapter, then s = x A^T and y += scaling s B^T,
 * segment by segment.
 *
 * Bytes: A and B of each adapter in the batch once (the first caches hold what a unit of work reads more often), x and y of its rows.
 * Flops: 2 r (K + N) a row. A row's sums run over k, then over the rank, in an order that K and r alone fix: the other rows of the
 * batch, the number of threads and who takes which unit change no bit. s is float32 here, bfloat16 in multi_lora_bf16.c. */
#include <string.h>

#include "multi_lora.h"
#include "scalar.h"

enum { CHUNK = 1024 };

/* Widened rows of A times widened rows of x, CHUNK columns at a time: sums[j * rows + m]. */
static void shrink_unit(const multi_lora_job *j, const segment *g, int64_t row, int64_t rank, float *memory) {
    const multi_lora_args *a = j->args;
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2, of_A = a->factors == FLOAT32 ? 4 : 2, K = a->K;
    const int64_t rows = g->count - row < ROW_BLOCK ? g->count - row : ROW_BLOCK;
    const int64_t ranks = g->rank - rank < RANK_BLOCK ? g->rank - rank : RANK_BLOCK;
    float *w = memory, *x = w + RANK_BLOCK * CHUNK, sums[RANK_BLOCK * ROW_BLOCK];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < K; k += CHUNK) {
        const int64_t count = K - k < CHUNK ? K - k : CHUNK, padded = ceil_div(count, 16) * 16;
        for (int64_t i = 0; i < ceil_div(ranks, 4) * 4; i++) {
            const int64_t filled = i < ranks ? count : 0; /* `dots` takes four rows: the missing ones are zero */
            const char *row = (const char *)a->A + ((g->adapter * a->r + rank + i) * K + k) * of_A;
            if (filled) a->engine->widen(row, a->factors, count, w + i * padded);
            memset(w + i * padded + filled, 0, (padded - filled) * sizeof(float));
        }
        for (int64_t m = 0; m < rows; m++) {
            a->engine->widen((const char *)a->x + (j->order[g->first + row + m] * K + k) * size, a->dtype, count, x + m * padded);
            memset(x + m * padded + count, 0, (padded - count) * sizeof(float));
        }
        for (int64_t i = 0; i < ranks; i += 4) a->engine->dots(w + i * padded, padded, x, padded, rows, padded, sums + i * rows);
    }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < ranks; i++) ((float *)j->s)[(g->first + row + m) * j->ld + rank + i] = sums[i * rows + m];
}

static void shrink_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    multi_lora_job *j = context;
    float *memory = scratch(1, (RANK_BLOCK + ROW_BLOCK) * CHUNK * sizeof(float));
    const segment *g = j->segments;
    if (!memory) {
        j->failed = 1;
        return;
    }
    for (int64_t unit; (unit = take_unit(&j->next)) < j->segments[j->count].shrink_unit;) {
        while (unit >= g[1].shrink_unit) g++;
        const int64_t blocks = ceil_div(g->rank, RANK_BLOCK), inside = unit - g->shrink_unit;
        shrink_unit(j, g, inside / blocks * ROW_BLOCK, inside % blocks * RANK_BLOCK, memory);
    }
}

/* EXPAND_COLUMNS columns of y for all rows of a segment: B's rows are widened and transposed once. */
static void expand_unit(const multi_lora_job *j, const segment *g, int64_t n, float *memory) {
    const multi_lora_args *a = j->args;
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2, of_B = a->factors == FLOAT32 ? 4 : 2;
    const int64_t columns = a->N - n < EXPAND_COLUMNS ? a->N - n : EXPAND_COLUMNS;
    float *w = memory, *rows_of_b = w + g->rank * EXPAND_COLUMNS, *sums = rows_of_b + a->r, *y = sums + EXPAND_COLUMNS;
    memset(w, 0, g->rank * EXPAND_COLUMNS * sizeof(float));
    for (int64_t c = 0; c < columns; c++) {
        a->engine->widen((const char *)a->B + (g->adapter * a->N + n + c) * a->r * of_B, a->factors, g->rank, rows_of_b);
        for (int64_t i = 0; i < g->rank; i++) w[i * EXPAND_COLUMNS + c] = rows_of_b[i];
    }
    for (int64_t m = g->first; m < g->first + g->count; m++) {
        char *out = (char *)a->y + (j->order[m] * a->N + n) * size;
        memset(sums, 0, EXPAND_COLUMNS * sizeof(float));
        a->engine->axpys(w, EXPAND_COLUMNS, g->rank, (float *)j->s + m * j->ld, 0, 1, EXPAND_COLUMNS, sums, 0);
        a->engine->widen(out, a->dtype, columns, y);
        for (int64_t c = 0; c < columns; c++) y[c] += a->scaling[g->adapter] * sums[c];
        a->engine->narrow(y, a->dtype, columns, out);
    }
}

static void expand_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    multi_lora_job *j = context;
    float *memory = scratch(1, (j->args->r * (EXPAND_COLUMNS + 1) + 2 * EXPAND_COLUMNS) * sizeof(float));
    const segment *g = j->segments;
    if (!memory) {
        j->failed = 1;
        return;
    }
    for (int64_t unit; (unit = take_unit(&j->next)) < j->segments[j->count].expand_unit;) {
        while (unit >= g[1].expand_unit) g++;
        expand_unit(j, g, (unit - g->expand_unit) * EXPAND_COLUMNS, memory);
    }
}

/* Sorts the rows that have an adapter by it, stably. Returns as multi_lora. */
static int64_t sort_rows(const multi_lora_args *a, int64_t *next, int64_t *order, segment *segments, int64_t *count) {
    memset(next, 0, a->n * sizeof *next);
    for (int64_t m = 0; m < a->M; m++) {
        if (a->ids[m] < -1 || a->ids[m] >= a->n) return 2 + 2 * m;
        if (a->ids[m] >= 0) next[a->ids[m]]++;
    }
    int64_t first = 0, shrink_unit = 0, expand_unit = 0;
    *count = 0;
    for (int64_t i = 0; i < a->n; i++) {
        const int64_t rows = next[i], rank = a->ranks ? a->ranks[i] : a->r;
        next[i] = first;
        if (rank < 0 || rank > a->r) return 3 + 2 * i;
        if (!rows) continue;
        segments[(*count)++] = (segment){i, first, rows, rank, shrink_unit, expand_unit};
        shrink_unit += ceil_div(rows, ROW_BLOCK) * ceil_div(rank, RANK_BLOCK);
        expand_unit += rank ? ceil_div(a->N, EXPAND_COLUMNS) : 0;
        first += rows;
    }
    segments[*count] = (segment){.first = first, .shrink_unit = shrink_unit, .expand_unit = expand_unit};
    for (int64_t m = 0; m < a->M; m++)
        if (a->ids[m] >= 0) order[next[a->ids[m]]++] = m;
    return 0;
}

int64_t multi_lora(const multi_lora_args *a, int bf16_units) {
    const int64_t most = a->M < a->n ? a->M : a->n, ld = ceil_div(a->r, 32) * 32;
    char *memory = scratch(0, (a->n + a->M + 1) * sizeof(int64_t) + (most + 1) * sizeof(segment) + (a->M * ld + 1) * sizeof(float));
    if (!memory) return -1;
    segment *segments = (segment *)memory;
    int64_t *order = (int64_t *)(segments + most + 1), *next = order + a->M + 1;
    multi_lora_job j = {.args = a, .order = order, .segments = segments, .s = next + a->n, .ld = ld};
    const int64_t status = sort_rows(a, next, order, segments, &j.count);
    if (status || !segments[j.count].shrink_unit) return status;
    const int special = bf16_units && multi_lora_bf16_usable(a);
    memset(j.s, 0, segments[j.count].first * ld * sizeof(float));
    run_parallel(special ? multi_lora_bf16_shrink : shrink_task, &j, a->threads);
    j.next = 0;
    if (!j.failed) run_parallel(special ? multi_lora_bf16_expand : expand_task, &j, a->threads);
    return -j.failed;
}
