/* x W^T for one to four rows of x with AVX-512: codes are looked up and multiplied, and absmax once the sum over its block.
 *
 *     y[m, n] = sum_b absmax[n, b] * (sum_{k in b} value[code[n, k]] * x[m, k]) + sum_i s[m, i] B[n, i] + bias[n]
 *
 * with s = scaling x A^T of a low rank, if there is one: r more terms of the same sum.
 *
 * A 64-byte load holds 16 dwords of eight nibbles, and vpermps looks up the lowest nibble of each: seven shifts bring the others
 * there, with no mask and no shuffle, and x is laid out in that order. The dwords 0..7 and 8..15 may belong to two blocks. Products
 * and sums are float32: the weight is rounded to no dtype, and nothing is written in between.
 *
 * Bytes: the packed weight once. Per 128 weights: 8 look-ups (port 5 alone), 7 shifts (port 0 alone), 8 M multiply-adds and M + 1
 * more for absmax (either): 12.5 cycles at M = 1. vdpbf16ps would be more: it takes both ports for two cycles, and wants a table
 * scaled and rounded for every block. */
#include "low_rank.h"
#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

enum { MAX_M = 4, MAX_BLOCKS = 256, RANKS = 4 /* rows of A at a time */, RUN = 1024 };
enum { AHEAD = 4096, A_AHEAD = 1024 }; /* bytes prefetched ahead */

typedef struct {
    const linear_args *args;
    const float *x; /* (M, ldx): vector j of a group of 128 holds elements 8 i + (j ^ 1), zero beyond K */
    int64_t ldx;
    const float *dropped; /* (M, ldx) of the low rank's x as it lies, zero beyond K; NULL without a low rank */
    float *s;             /* (M, ld), zero beyond the rank */
    int64_t ld;
} lookup_job;

static inline __mmask16 first_of(int64_t n) { return n < 16 ? (1 << n) - 1 : 0xffff; }

/* Up to 16 elements as float32, zero where not `kept`. */
static inline __m512 widen16(const void *values, int dtype, int64_t at, __mmask16 kept) {
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(kept, (const float *)values + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(kept, (const uint16_t *)values + at);
    if (dtype == FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* sums += s times row n of B. */
static inline __attribute__((always_inline)) void add_low_rank(const lookup_job *j, int64_t n, int M, __m512 *sums) {
    const low_rank *l = j->args->low;
    const int64_t r = l->r;
    for (int64_t i = 0; i < r; i += 16) {
        const __m512 b = widen16(l->B, l->factors, n * r + i, first_of(r - i));
        for (int m = 0; m < M; m++) sums[m] = _mm512_fmadd_ps(_mm512_loadu_ps(j->s + m * j->ld + i), b, sums[m]);
    }
}

/* s of `RANKS` rows of A from the i-th on, or of those that there are; sums over runs, since a long chain of additions loses digits. */
static inline __attribute__((always_inline)) void sum_ranks(const lookup_job *j, int64_t i, int M) {
    const low_rank *l = j->args->low;
    const int64_t K = l->K, size = l->factors == FLOAT32 ? 4 : 2;
    __m512 sums[RANKS][MAX_M];
    for (int q = 0; q < RANKS; q++)
        for (int m = 0; m < M; m++) sums[q][m] = _mm512_setzero_ps();
    for (int64_t run = 0; run < K; run += RUN) {
        const int64_t end = at_most(run + RUN, K);
        __m512 part[RANKS][MAX_M];
        for (int q = 0; q < RANKS; q++)
            for (int m = 0; m < M; m++) part[q][m] = _mm512_setzero_ps();
        for (int64_t k = run; k < end; k += 16)
            for (int q = 0; q < RANKS; q++) {
                const int64_t at = at_most(i + q, l->r - 1) * K + k;
                const __m512 a = widen16(l->A, l->factors, at, 0xffff);
                _mm_prefetch((const char *)l->A + at * size + A_AHEAD, _MM_HINT_T0);
                for (int m = 0; m < M; m++) part[q][m] = _mm512_fmadd_ps(a, _mm512_loadu_ps(j->dropped + m * j->ldx + k), part[q][m]);
            }
        for (int q = 0; q < RANKS; q++)
            for (int m = 0; m < M; m++) sums[q][m] = _mm512_add_ps(sums[q][m], part[q][m]);
    }
    for (int q = 0; q < RANKS && i + q < l->r; q++)
        for (int m = 0; m < M; m++) j->s[m * j->ld + i + q] = l->scaling * _mm512_reduce_add_ps(sums[q][m]);
}

static void ranks_task(void *context, int64_t thread, int64_t threads) {
    const lookup_job *j = context;
    const int64_t r = j->args->low->r, last = part_start(r, RANKS, thread + 1, threads);
    for (int64_t i = part_start(r, RANKS, thread, threads); i < last; i += RANKS) {
        switch (j->args->M) {
        case 1: sum_ranks(j, i, 1); break;
        case 2: sum_ranks(j, i, 2); break;
        case 3: sum_ranks(j, i, 3); break;
        case 4: sum_ranks(j, i, 4); break;
        }
    }
}

/* sums += 128 products, or 64 under the mask 0x00ff: each of M, `two_blocks` and `kept` is a constant of its copy. */
static inline __attribute__((always_inline)) void multiply_group(const uint8_t *packed, const float *absmax, const float *x,
                                                                 int64_t ldx, __m512 values, int M, int two_blocks,
                                                                 __mmask16 kept, __m512 *sums) {
    const __m512i nibbles = _mm512_maskz_loadu_epi32(kept, packed);
    __m512 part[MAX_M], scale = _mm512_set1_ps(absmax[0]);
    _mm_prefetch((const char *)packed + AHEAD, _MM_HINT_T0);
    for (int s = 0; s < 8; s++) {
        __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4 * s), values);
        for (int m = 0; m < M; m++) {
            __m512 xs = _mm512_loadu_ps(x + m * ldx + 16 * s);
            part[m] = s ? _mm512_fmadd_ps(v, xs, part[m]) : _mm512_mul_ps(v, xs);
        }
    }
    if (two_blocks) scale = _mm512_mask_broadcastss_ps(scale, 0xff00, _mm_load_ss(absmax + 1));
    for (int m = 0; m < M; m++) sums[m] = _mm512_fmadd_ps(part[m], scale, sums[m]);
}

static inline __attribute__((always_inline)) void rows_times_x(const lookup_job *j, int64_t first, int64_t last, int M) {
    const linear_args *a = j->args;
    const int64_t K = a->K, groups = K / 128, block_size = a->w->block_size, blocks = K / block_size;
    const int shift = __builtin_ctzll(block_size); /* a division for every group would cost as much as its look-ups */
    const __m512 values = _mm512_loadu_ps(a->w->book->values);
    float absmax[MAX_BLOCKS];
    for (int64_t n = first; n < last; n++) {
        __m512 sums[MAX_M];
        for (int m = 0; m < M; m++) sums[m] = _mm512_setzero_ps();
        const uint8_t *row = a->w->packed + n * K / 2;
        for (int64_t b = 0; b < blocks; b += MAX_BLOCKS) {
            const int64_t count = blocks - b < MAX_BLOCKS ? blocks - b : MAX_BLOCKS, begin = b * block_size / 128;
            const int64_t end = (b + count) * block_size / 128;
            a->engine->decode_absmax(a->w, n * blocks + b, count, absmax);
            if (block_size == 64)
                for (int64_t g = begin; g < end; g++)
                    multiply_group(row + g * 64, absmax + 2 * (g - begin), j->x + g * 128, j->ldx, values, M, 1, 0xffff, sums);
            else
                for (int64_t g = begin; g < end; g++)
                    multiply_group(row + g * 64, absmax + ((g - begin) * 128 >> shift), j->x + g * 128, j->ldx, values, M, 0,
                                   0xffff, sums);
        }
        if (K % 128)
            multiply_group(row + groups * 64, absmax + (blocks - 1) % MAX_BLOCKS, j->x + groups * 128, j->ldx, values, M, 0, 0x00ff,
                           sums);
        if (j->s) add_low_rank(j, n, M, sums);
        for (int m = 0; m < M; m++) {
            float y = _mm512_reduce_add_ps(sums[m]) + (a->bias ? load_float(a->bias, a->dtype, n) : 0);
            store_float(y, a->dtype, a->y, m * a->N + n);
        }
    }
}

static void lookup_task(void *context, int64_t thread, int64_t threads) {
    const lookup_job *j = context;
    const int64_t N = j->args->N, first = part_start(N, 1, thread, threads), last = part_start(N, 1, thread + 1, threads);
    switch (j->args->M) { /* M becomes a constant of each copy, its sums registers */
    case 1: rows_times_x(j, first, last, 1); break;
    case 2: rows_times_x(j, first, last, 2); break;
    case 3: rows_times_x(j, first, last, 3); break;
    case 4: rows_times_x(j, first, last, 4); break;
    }
}

int lookup_usable(const linear_args *a) {
    return a->engine == &isa_avx512 && a->M >= 1 && a->M <= MAX_M && in_groups_of_128(a);
}

int lookup_linear(const linear_args *a) {
    const int64_t ldx = ceil_div(a->K, 128) * 128, ld = a->low ? ceil_div(a->low->r, 16) * 16 : 0;
    float *x = scratch(0, a->M * (2 * ldx + ld) * sizeof(float)), *wide = x + a->M * ldx, *s = wide + a->M * ldx;
    if (!x) return -1;
    widen_rows(a->engine, a->x, a->dtype, a->M, a->K, wide, ldx);
    for (int64_t at = 0; at < a->M * ldx; at += 128) /* the high nibble comes first: element 0 is at shift 4 */
        for (int s = 0; s < 8; s++)
            for (int i = 0; i < 16; i++) x[at + 16 * s + i] = wide[at + 8 * i + (s ^ 1)];
    lookup_job j = {.args = a, .x = x, .ldx = ldx};
    if (a->low) {
        if (a->low->x != a->x) widen_rows(a->engine, a->low->x, a->dtype, a->M, a->K, wide, ldx);
        memset(s, 0, a->M * ld * sizeof(float));
        j.dropped = wide, j.s = s, j.ld = ld;
        run_parallel(ranks_task, &j, a->threads);
    }
    run_parallel(lookup_task, &j, a->threads);
    return 0;
}
END_TARGET
#else
int lookup_usable(const linear_args *a) { return (void)a, 0; }
int lookup_linear(const linear_args *a) { return (void)a, -1; }
#endif
