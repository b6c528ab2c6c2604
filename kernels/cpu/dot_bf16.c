/* x W^T for one to four rows of bfloat16 with vdpbf16ps: the weight is decoded in registers and never written anywhere.
 *
 * Bytes: the packed weight once. Per 128 weights the two vector ports execute 5 operations for the indices, 4 table look-ups,
 * 5 for the table and 4 M dot products, which take two cycles each on one of the ports: that, not the memory, limits it while the
 * weight is in the cache. */
#include "native.h"

#if defined(__x86_64__)
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "decode128.h"

enum { MAX_M = 4, MAX_BLOCKS = 256, AHEAD = 1024 /* bytes prefetched ahead */ };

typedef struct {
    const linear_args *args;
    const uint16_t *x; /* (M, ldx) in the order of decode128 */
    int64_t ldx;
} dot_job;

static inline void rows_times_x(const dot_job *j, int64_t first, int64_t last, int M) {
    const linear_args *a = j->args;
    const int64_t K = a->K, groups = ceil_div(K, 128), block_size = a->w->block_size, blocks = K / block_size;
    const float *values = a->w->book->values;
    float absmax[MAX_BLOCKS + 1]; /* the last group's second half may not exist: it reads one more, times zeros of x */
    for (int64_t n = first; n < last; n++) {
        __m512 sums[MAX_M][4];
        for (int m = 0; m < M; m++)
            for (int i = 0; i < 4; i++) sums[m][i] = _mm512_setzero_ps();
        const uint8_t *row = a->w->packed + n * K / 2;
        for (int64_t b = 0; b < blocks; b += MAX_BLOCKS) {
            int64_t count = blocks - b < MAX_BLOCKS ? blocks - b : MAX_BLOCKS, g = b * block_size / 128;
            int64_t stop = (b + count) * block_size;
            stop = ceil_div(stop, 128) < groups ? ceil_div(stop, 128) : groups;
            a->engine->decode_absmax(a->w, n * blocks + b, count, absmax);
            absmax[count] = 0;
            for (int64_t i = 0; g < stop; g++, i += 128) {
                __m512i w[4];
                int64_t block = block_size == 64 ? i / 64 : i / block_size;
                _mm_prefetch((const char *)row + g * 64 + AHEAD, _MM_HINT_T0);
                decode128(values, group_bytes(row, g, K), absmax[block], absmax[block + (block_size == 64)], w);
                for (int m = 0; m < M; m++)
                    for (int v = 0; v < 4; v++) {
                        __m512i x = _mm512_loadu_si512(j->x + m * j->ldx + g * 128 + 32 * v);
                        sums[m][v] = _mm512_dpbf16_ps(sums[m][v], (__m512bh)w[v], (__m512bh)x);
                    }
            }
        }
        for (int m = 0; m < M; m++) {
            __m512 s = _mm512_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]), _mm512_add_ps(sums[m][2], sums[m][3]));
            float sum = _mm512_reduce_add_ps(s);
            if (a->bias) sum += bf16_to_float(((const uint16_t *)a->bias)[n]);
            ((uint16_t *)a->y)[m * a->N + n] = float_to_bf16(sum);
        }
    }
}

static void dot_task(void *context, int64_t thread, int64_t threads) {
    const dot_job *j = context;
    const linear_args *a = j->args;
    int64_t first = part_start(a->N, 1, thread, threads), last = part_start(a->N, 1, thread + 1, threads);
    switch (a->M) { /* M becomes a constant of each copy, its sums registers */
    case 1: rows_times_x(j, first, last, 1); break;
    case 2: rows_times_x(j, first, last, 2); break;
    case 3: rows_times_x(j, first, last, 3); break;
    case 4: rows_times_x(j, first, last, 4); break;
    }
}

int dot_bf16_usable(const linear_args *a) {
    return a->dtype == BFLOAT16 && a->M >= 1 && a->M <= MAX_M && decodes_by_128(a);
}

int dot_bf16_linear(const linear_args *a) {
    int64_t ldx = ceil_div(a->K, 128) * 128;
    uint16_t *x = scratch(0, (a->M * ldx + 1) * sizeof(uint16_t));
    if (!x) return -1;
    for (int64_t m = 0; m < a->M; m++) order128((const uint16_t *)a->x + m * a->K, a->K, x + m * ldx);
    dot_job j = {a, x, ldx};
    run_parallel(dot_task, &j, a->threads);
    return 0;
}
END_TARGET
#else
int dot_bf16_usable(const linear_args *a) { return (void)a, 0; }
int dot_bf16_linear(const linear_args *a) { return (void)a, -1; }
#endif
