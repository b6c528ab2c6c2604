/* The gradients of few rows of y = s B^T, s = scaling x A^T:
 *
 *     V = scaling dY B        dX += V A        dA = V^T x        dB = dY^T s
 *
 * Bytes: A and B once from memory (A twice, where s is needed: the second time from the second-level cache) and the gradients once.
 * Sums are float32; s and V are rounded to nothing else. Every sum is one thread's, over runs that the shape alone decides. */
#include "low_rank.h"
#include "scalar.h"

enum { RANKS = 4, CHUNK = 1024, ROWS = 64 /* of B at a time */, PARTS = 64 /* of V at most */, COLUMNS = 256 /* of A at a time */ };

typedef struct {
    const low_rank *l;
    const float *x, *dy; /* widened rows, zero beyond K and N */
    int64_t ldx, lddy, ld, rows_of_part;
    float *s, *V; /* (M, ld); (parts, M, ld), to be added up and scaled */
    void *dx;
    float *dA, *dB;
    int failed;
} low_rank_job;

/* Rows [first, first + rows) and columns [k, k + count) of a factor as float32, zero up to `most` rows and a multiple of 16 columns:
 * where they lie if they lie so, else in `room`. */
static const float *rows_of(const low_rank *l, const void *factor, int64_t columns, int64_t first, int64_t rows, int64_t most, int64_t k,
                            int64_t count, float *room, int64_t *stride) {
    const int64_t size = l->factors == FLOAT32 ? 4 : 2, at = first * columns + k;
    const int as_it_lies = l->factors == FLOAT32 && count % 16 == 0 && rows == most;
    *stride = as_it_lies ? columns : ceil_div(count, 16) * 16;
    if (as_it_lies) return (const float *)factor + at;
    for (int64_t i = 0; i < most; i++) {
        const int64_t filled = i < rows ? count : 0;
        l->engine->widen((const char *)factor + (at + i * columns) * size, l->factors, filled, room + i * *stride);
        memset(room + i * *stride + filled, 0, (*stride - filled) * sizeof(float));
    }
    return room;
}

static float *room_for(low_rank_job *j, int64_t floats) {
    float *room = scratch(1, (floats + 1) * sizeof(float));
    if (!room) j->failed = 1;
    return room;
}

/* Four ranks at a time. */
static void down_task(void *context, int64_t thread, int64_t threads) {
    low_rank_job *j = context;
    const low_rank *l = j->l;
    const int64_t stop = part_start(l->r, RANKS, thread + 1, threads);
    float *room = room_for(j, RANKS * CHUNK + RANKS * l->M), *sums = room + RANKS * CHUNK;
    if (!room) return;
    for (int64_t i = part_start(l->r, RANKS, thread, threads); i < stop; i += RANKS) {
        const int64_t ranks = at_most(stop - i, RANKS);
        memset(sums, 0, RANKS * l->M * sizeof(float));
        for (int64_t k = 0, stride; k < l->K; k += CHUNK) {
            const int64_t count = at_most(l->K - k, CHUNK);
            const float *A = rows_of(l, l->A, l->K, i, ranks, RANKS, k, count, room, &stride);
            l->engine->dots(A, stride, j->x + k, j->ldx, l->M, ceil_div(count, 16) * 16, sums);
        }
        for (int64_t m = 0; m < l->M; m++)
            for (int64_t q = 0; q < ranks; q++) j->s[m * j->ld + i + q] = l->scaling * sums[q * l->M + m];
    }
}

/* out (rows, count) = left^T (M, rows) times right (M, count), which is zero up to a multiple of 16; `left` is transposed. Whole
 * vectors are summed where they belong, else in `room`. */
static void outer(const low_rank *l, const float *right, int64_t ld, const float *left, int64_t rows, int64_t count, float *out,
                  int64_t ldout, float *room) {
    const int64_t padded = ceil_div(count, 16) * 16, whole = padded == count;
    float *sums = whole ? out : room;
    const int64_t ldsums = whole ? ldout : padded;
    for (int64_t i = 0; i < rows; i++) memset(sums + i * ldsums, 0, padded * sizeof(float));
    l->engine->axpys(right, ld, l->M, left, l->M, rows, padded, sums, ldsums);
    for (int64_t i = 0; i < rows && !whole; i++) memcpy(out + i * ldout, room + i * padded, count * sizeof(float));
}

/* Some rows of B: their part of V, and their gradients. */
static void rows_task(void *context, int64_t thread, int64_t threads) {
    low_rank_job *j = context;
    const low_rank *l = j->l;
    const int64_t M = l->M, ld = j->ld, stop = part_start(l->N, j->rows_of_part, thread + 1, threads);
    float *room = room_for(j, ROWS * (2 * ld + M)), *sums = room + ROWS * ld, *dyt = sums + ROWS * ld;
    if (!room) return;
    for (int64_t n = part_start(l->N, j->rows_of_part, thread, threads); n < stop;) {
        float *V = j->V + n / j->rows_of_part * M * ld;
        memset(V, 0, M * ld * sizeof(float));
        for (const int64_t end = at_most(stop, n + j->rows_of_part); n < end; n += ROWS) {
            const int64_t rows = at_most(end - n, ROWS);
            int64_t stride;
            const float *B = rows_of(l, l->B, l->r, n, rows, rows, 0, l->r, room, &stride);
            l->engine->axpys(B, stride, rows, j->dy + n, j->lddy, M, ld, V, ld);
            if (!j->dB) continue;
            for (int64_t c = 0; c < rows; c++)
                for (int64_t m = 0; m < M; m++) dyt[c * M + m] = j->dy[m * j->lddy + n + c];
            outer(l, j->s, ld, dyt, rows, l->r, j->dB + n * l->r, l->r, sums);
        }
    }
}

/* Some columns of A: dX and dA. */
static void columns_task(void *context, int64_t thread, int64_t threads) {
    low_rank_job *j = context;
    const low_rank *l = j->l;
    const int64_t M = l->M, ld = j->ld, r = l->r, size = l->dtype == FLOAT32 ? 4 : 2, most = r > M ? r : M;
    const int64_t parts = ceil_div(l->N, j->rows_of_part), stop = part_start(l->K, COLUMNS, thread + 1, threads);
    float *V = room_for(j, M * ld + r * M + (r + most + 1) * COLUMNS), *Vt = V + M * ld, *room = Vt + r * M;
    float *sums = room + r * COLUMNS, *wide = sums + most * COLUMNS;
    if (!V) return;
    memset(V, 0, M * ld * sizeof(float));
    for (int64_t p = 0; p < parts; p++)
        for (int64_t i = 0; i < M * ld; i++) V[i] += j->V[p * M * ld + i];
    for (int64_t i = 0; i < M * ld; i++) V[i] *= l->scaling;
    for (int64_t i = 0; i < r; i++)
        for (int64_t m = 0; m < M; m++) Vt[i * M + m] = V[m * ld + i];
    for (int64_t k = part_start(l->K, COLUMNS, thread, threads); k < stop; k += COLUMNS) {
        const int64_t count = at_most(stop - k, COLUMNS), padded = ceil_div(count, 16) * 16;
        if (j->dx) {
            int64_t stride;
            const float *A = rows_of(l, l->A, l->K, 0, r, r, k, count, room, &stride);
            memset(sums, 0, M * COLUMNS * sizeof(float));
            l->engine->axpys(A, stride, r, V, ld, M, padded, sums, COLUMNS);
            for (int64_t m = 0; m < M; m++) {
                char *dx = (char *)j->dx + (m * l->K + k) * size;
                l->engine->widen(dx, l->dtype, count, wide);
                for (int64_t c = 0; c < count; c++) wide[c] += sums[m * COLUMNS + c];
                l->engine->narrow(wide, l->dtype, count, dx);
            }
        }
        if (j->dA) outer(l, j->x + k, j->ldx, Vt, r, count, j->dA + k, l->K, sums);
    }
}

int low_rank_backward(const low_rank *l, const void *dy, void *dx, float *dA, float *dB) {
    const int64_t M = l->M, ldx = ceil_div(l->K, 16) * 16, lddy = ceil_div(l->N, 16) * 16, ld = ceil_div(l->r, 16) * 16;
    const int64_t rows_of_part = ceil_div(l->N ? l->N : 1, PARTS * ROWS) * ROWS;
    float *memory = scratch(0, (M * (ldx + lddy + (PARTS + 1) * ld) + 1) * sizeof(float));
    if (!memory) return -1;
    float *dy_rows = memory + M * ldx, *s = dy_rows + M * lddy;
    low_rank_job j = {l, NULL, dy_rows, ldx, lddy, ld, rows_of_part, s, s + M * ld, dx, dA, dB, 0};
    widen_rows(l->engine, dy, l->dtype, M, l->N, dy_rows, lddy);
    if (dA || dB) widen_rows(l->engine, l->x, l->dtype, M, l->K, memory, ldx);
    j.x = memory;
    if (dB) {
        memset(s, 0, M * ld * sizeof(float));
        run_parallel(down_task, &j, l->threads);
    }
    if (!j.failed) run_parallel(rows_task, &j, l->threads);
    if (!j.failed && (dx || dA)) run_parallel(columns_task, &j, l->threads);
    return -j.failed;
}
