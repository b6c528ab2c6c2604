/* x W^T for one to four rows of bfloat16 with vdpbf16ps: the weight is decoded in registers and never written anywhere.
 *
 * Bytes: the packed weight once, and that is the limit; every 32 weights cost two shuffles (bits to indices, indices to
 * values) and M dot products. A shuffle of eight packed bytes fills every other 64-bit group, so x is stored beforehand in
 * the order in which the weights come out. */
#include "native.h"

#if defined(__x86_64__)
#include <string.h>

#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi")
#include "simd_avx512.h"

enum { MAX_M = 4, MAX_BLOCKS = 512 };

typedef struct {
    const linear_args *args;
    const uint16_t *x; /* (M, K), reordered in groups of 32 */
} dot_job;

/* Element j of a group of 32 comes from byte j / 2. Broadcast, the 16 bytes stand in every 128-bit lane; 64-bit group g of the
 * index vector can reach the eight bytes 8 * (g % 2) ... of its own group only, so it takes elements 16 * (g % 2) + 4 * (g / 2)
 * and the three after. */
static void reorder(const uint16_t *x, int64_t K, uint16_t *out) {
    for (int64_t k = 0; k < K; k += 32)
        for (int g = 0; g < 8; g++) memcpy(out + k + 4 * g, x + k + 16 * (g % 2) + 4 * (g / 2), 8);
}

static inline __m512i bit_offsets(void) {
    /* per word: the five bits (code, any) of its element; a word's upper byte is not read */
    uint8_t offsets[64];
    for (int word = 0; word < 32; word++) {
        int element = 4 * (word / 8) + word % 4; /* within the eight bytes */
        offsets[2 * word] = offsets[2 * word + 1] = (8 * (element / 2) + (element % 2 ? -1 : 3)) & 63;
    }
    return _mm512_loadu_si512(offsets);
}

static inline void rows_times_x(const linear_args *a, const uint16_t *x, int64_t first, int64_t last, int M) {
    const int64_t K = a->K, block_size = a->w->block_size, blocks = K / block_size;
    const __m512i offsets = bit_offsets();
    const float *values = a->w->book->values;
    float absmax[MAX_BLOCKS];
    for (int64_t n = first; n < last; n++) {
        __m512 even[MAX_M], odd[MAX_M];
        for (int m = 0; m < M; m++) even[m] = odd[m] = _mm512_setzero_ps();
        const uint8_t *packed = a->w->packed + n * K / 2;
        const uint16_t *x_at = x;
        for (int64_t b = 0; b < blocks; b++) {
            if (b % MAX_BLOCKS == 0)
                a->engine->decode_absmax(a->w, n * blocks + b, blocks - b < MAX_BLOCKS ? blocks - b : MAX_BLOCKS, absmax);
            table16 t = make_table16(values, absmax[b % MAX_BLOCKS], BFLOAT16);
            for (int64_t i = 0; i < block_size; i += 64, packed += 32, x_at += 64) {
                __m512i b0 = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)packed));
                __m512i b1 = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(packed + 16)));
                __m512i w0 = _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(offsets, b0), t);
                __m512i w1 = _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(offsets, b1), t);
                for (int m = 0; m < M; m++) {
                    __m512i x0 = _mm512_loadu_si512(x_at + m * K), x1 = _mm512_loadu_si512(x_at + m * K + 32);
                    even[m] = _mm512_dpbf16_ps(even[m], (__m512bh)w0, (__m512bh)x0);
                    odd[m] = _mm512_dpbf16_ps(odd[m], (__m512bh)w1, (__m512bh)x1);
                }
            }
        }
        for (int m = 0; m < M; m++) {
            float sum = _mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m]));
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
    case 1: rows_times_x(a, j->x, first, last, 1); break;
    case 2: rows_times_x(a, j->x, first, last, 2); break;
    case 3: rows_times_x(a, j->x, first, last, 3); break;
    default: rows_times_x(a, j->x, first, last, 4); break;
    }
}

int dot_bf16_usable(const linear_args *a) {
    return a->dtype == BFLOAT16 && a->M >= 1 && a->M <= MAX_M && a->w->block_size % 64 == 0 && a->K % a->w->block_size == 0;
}

int dot_bf16_linear(const linear_args *a) {
    uint16_t *x = scratch(0, (a->M * a->K + 1) * sizeof(uint16_t));
    if (!x) return -1;
    for (int64_t m = 0; m < a->M; m++) reorder((const uint16_t *)a->x + m * a->K, a->K, x + m * a->K);
    dot_job j = {a, x};
    run_parallel(dot_task, &j, a->threads);
    return 0;
}
END_TARGET
#else
int dot_bf16_usable(const linear_args *a) { return (void)a, 0; }
int dot_bf16_linear(const linear_args *a) { return (void)a, -1; }
#endif
