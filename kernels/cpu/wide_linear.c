/* x W^T and dY W for few rows on any machine: tiles of W are decoded into fp32 that stays in the first-level cache.
 *
 * Bytes: the packed weight once (4.127 bits a parameter with double quantization), x and y once. Flops: 2 M N K.
 * The values multiplied are x's dtype exactly, widened to fp32; sums are fp32; one rounding to x's dtype at the end. */
#include "scalar.h"

enum { ROWS = 4, CHUNK = 1024, DX_ROWS = 16, DX_CHUNK = 512, MAX_BLOCKS = CHUNK / 16 + 2 };

typedef struct {
    const linear_args *args;
    const float *x; /* (M, ldx) widened, zero beyond the row */
    int64_t ldx;
    int failed;
} wide_job;

/* Rows [row, row + rows) x columns [k, k + count) of W as float32, zero-padded to `stride` columns and `padded_rows` rows. */
static void decode_tile(const linear_args *a, int64_t row, int64_t rows, int64_t padded_rows, int64_t k, int64_t count,
                        int64_t stride, float *tile) {
    float absmax[MAX_BLOCKS];
    for (int64_t r = 0; r < padded_rows; r++, tile += stride) {
        int64_t start = (row + r) * a->K + k, first = start / a->w->block_size;
        if (r < rows) {
            a->engine->decode_absmax(a->w, first, (start + count - 1) / a->w->block_size - first + 1, absmax);
            a->engine->dequantize_wide(a->w, absmax, start, count, a->dtype, tile);
        }
        int64_t written = r < rows ? count : 0;
        memset(tile + written, 0, (stride - written) * sizeof(float));
    }
}

static void linear_task(void *context, int64_t thread, int64_t threads) {
    wide_job *j = context;
    const linear_args *a = j->args;
    float *tile = scratch(1, (ROWS * CHUNK + 2 * ROWS * a->M) * sizeof(float));
    if (!tile) {
        j->failed = 1;
        return;
    }
    float *sums = tile + ROWS * CHUNK;
    const int64_t stop = part_start(a->N, ROWS, thread + 1, threads);
    for (int64_t n = part_start(a->N, ROWS, thread, threads); n < stop; n += ROWS) {
        int64_t rows = stop - n < ROWS ? stop - n : ROWS;
        memset(sums, 0, ROWS * a->M * sizeof(float));
        for (int64_t k = 0; k < a->K; k += CHUNK) {
            int64_t count = a->K - k < CHUNK ? a->K - k : CHUNK, padded = ceil_div(count, 16) * 16;
            decode_tile(a, n, rows, ROWS, k, count, padded, tile);
            a->engine->dots(tile, padded, j->x + k, j->ldx, a->M, padded, sums);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t m = 0; m < a->M; m++) {
                float y = sums[r * a->M + m] + (a->bias ? load_float(a->bias, a->dtype, n + r) : 0);
                store_float(y, a->dtype, a->y, m * a->N + n + r);
            }
    }
}

static void linear_dx_task(void *context, int64_t thread, int64_t threads) {
    wide_job *j = context;
    const linear_args *a = j->args;
    float *tile = scratch(1, (DX_ROWS * DX_CHUNK + a->M * DX_CHUNK) * sizeof(float));
    if (!tile) {
        j->failed = 1;
        return;
    }
    float *sums = tile + DX_ROWS * DX_CHUNK;
    const int64_t stop = part_start(a->K, 64, thread + 1, threads), size = a->dtype == FLOAT32 ? 4 : 2;
    for (int64_t k = part_start(a->K, 64, thread, threads); k < stop; k += DX_CHUNK) {
        int64_t count = stop - k < DX_CHUNK ? stop - k : DX_CHUNK, padded = ceil_div(count, 16) * 16;
        memset(sums, 0, a->M * padded * sizeof(float));
        for (int64_t n = 0; n < a->N; n += DX_ROWS) {
            int64_t rows = a->N - n < DX_ROWS ? a->N - n : DX_ROWS;
            decode_tile(a, n, rows, rows, k, count, padded, tile);
            a->engine->axpys(tile, padded, rows, j->x + n, j->ldx, a->M, padded, sums, padded);
        }
        for (int64_t m = 0; m < a->M; m++)
            a->engine->narrow(sums + m * padded, a->dtype, count, (char *)a->y + (m * a->K + k) * size);
    }
}

static int run(const linear_args *a, int64_t columns, task function) {
    int64_t ldx = ceil_div(columns, 16) * 16;
    float *x = scratch(0, (a->M * ldx + 1) * sizeof(float));
    if (!x) return -1;
    widen_rows(a->engine, a->x, a->dtype, a->M, columns, x, ldx);
    wide_job j = {a, x, ldx, 0};
    run_parallel(function, &j, a->threads);
    return -j.failed;
}

int wide_linear(const linear_args *a) { return run(a, a->K, linear_task); }
int wide_linear_dx(const linear_args *a) { return run(a, a->N, linear_dx_task); }
