/* The products of multi_lora.c in bfloat16 with vdpbf16ps.
 *
 * s = x A^T: 32 columns a step, one chain of sums an element whatever block it is computed in, so a row's result does not depend on
 * its neighbours; up to 16 chains in registers hide the latency. y += scaling s B^T: 16 rows of B are transposed into pairs of
 * columns of the rank, which meet each row's s broadcast a pair at a time: r / 2 products for 16 results. */
#include "multi_lora.h"

#if defined(__x86_64__)
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "decode128.h"

enum { AHEAD = 512 /* elements prefetched ahead in each row of A */ };

/* R rows of x by J rows of A. */
static inline __attribute__((always_inline)) void shrink_block(const uint16_t *const *x, const uint16_t *A, int64_t K, int R, int J,
                                                               uint16_t *const *s) {
    __m512 sums[4][8];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < J; i++) sums[r][i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 32) {
        const __mmask32 kept = K - k < 32 ? (1u << (K - k)) - 1 : ~0u;
        __m512i xs[4];
        for (int r = 0; r < R; r++) xs[r] = _mm512_maskz_loadu_epi16(kept, x[r] + k);
        for (int i = 0; i < J; i++) {
            __m512i w = _mm512_maskz_loadu_epi16(kept, A + i * K + k);
            _mm_prefetch((const char *)(A + i * K + k + AHEAD), _MM_HINT_T0);
            for (int r = 0; r < R; r++) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], (__m512bh)xs[r], (__m512bh)w);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < J; i++) s[r][i] = float_to_bf16(_mm512_reduce_add_ps(sums[r][i]));
}

/* Elements of A or B from `at` on; float32 is rounded to `room`. */
static const uint16_t *factor_of(const multi_lora_args *a, const void *values, int64_t at, int64_t count, uint16_t *room) {
    if (a->factors == BFLOAT16) return (const uint16_t *)values + at;
    const float *from = (const float *)values + at;
    for (int64_t i = 0; i < count; i += 32) {
        const __mmask32 kept = count - i < 32 ? (1u << (count - i)) - 1 : ~0u;
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)kept, from + i), high = _mm512_maskz_loadu_ps((__mmask16)(kept >> 16), from + i + 16);
        _mm512_mask_storeu_epi16(room + i, kept, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return room;
}

static void shrink_rows(const multi_lora_job *j, const uint16_t *A, int64_t place, int rows, int64_t rank, int64_t ranks) {
    const multi_lora_args *a = j->args;
    const uint16_t *x[4];
    uint16_t *s[4];
    for (int r = 0; r < rows; r++) {
        x[r] = (const uint16_t *)a->x + j->order[place + r] * a->K;
        s[r] = (uint16_t *)j->s + (place + r) * j->ld + rank;
    }
    for (int64_t i = 0; i < ranks;) {
        const int64_t left = ranks - i, K = a->K;
        const uint16_t *w = A + i * K;
        int done;
        /* rows and columns become constants of each copy, the sums registers */
        if (rows == 4 && left >= 4) shrink_block(x, w, K, 4, done = 4, s);
        else if (rows == 4) shrink_block(x, w, K, 4, done = 1, s);
        else if (rows == 2 && left >= 8) shrink_block(x, w, K, 2, done = 8, s);
        else if (rows == 2) shrink_block(x, w, K, 2, done = 1, s);
        else if (left >= 8) shrink_block(x, w, K, 1, done = 8, s);
        else if (left >= 4) shrink_block(x, w, K, 1, done = 4, s);
        else shrink_block(x, w, K, 1, done = 1, s);
        for (int r = 0; r < rows; r++) s[r] += done;
        i += done;
    }
}

void multi_lora_bf16_shrink(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    multi_lora_job *j = context;
    const multi_lora_args *a = j->args;
    const segment *g = j->segments;
    uint16_t *room = scratch(1, a->factors == BFLOAT16 ? 64 : RANK_BLOCK * a->K * sizeof(uint16_t));
    if (!room) {
        j->failed = 1;
        return;
    }
    for (int64_t unit; (unit = take_unit(&j->next)) < j->segments[j->count].shrink_unit;) {
        while (unit >= g[1].shrink_unit) g++;
        const int64_t blocks = ceil_div(g->rank, RANK_BLOCK), inside = unit - g->shrink_unit;
        const int64_t row = inside / blocks * ROW_BLOCK, rank = inside % blocks * RANK_BLOCK;
        const int64_t rows = g->count - row < ROW_BLOCK ? g->count - row : ROW_BLOCK;
        const int64_t ranks = g->rank - rank < RANK_BLOCK ? g->rank - rank : RANK_BLOCK;
        const uint16_t *A = factor_of(a, a->A, (g->adapter * a->r + rank) * a->K, ranks * a->K, room);
        for (int64_t m = 0; m < rows;) {
            const int taken = rows - m >= 4 ? 4 : rows - m >= 2 ? 2 : 1;
            shrink_rows(j, A, g->first + row + m, taken, rank, ranks);
            m += taken;
        }
    }
}

/* 16 rows of up to 8 pairs -> pairs by 16 rows. `kept`: which of the pairs' 16 elements exist. */
static inline void transpose_8_pairs(const uint16_t *B, int64_t r, int rows, __mmask16 kept, __m512i *out) {
    __m512i v[8], t[8];
    for (int i = 0; i < 8; i++) {
        __m256i low = _mm256_maskz_loadu_epi16(i < rows ? kept : 0, B + i * r);
        __m256i high = _mm256_maskz_loadu_epi16(i + 8 < rows ? kept : 0, B + (i + 8) * r);
        v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    for (int i = 0; i < 8; i += 2) t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            v[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            v[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    /* v[4q + c] holds, in 128-bit lane l, rows 4q + 8 (l / 2) .. + 3 of pair 4 (l % 2) + c */
    const __m512i even = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), odd = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    for (int c = 0; c < 4; c++) {
        out[c] = _mm512_permutex2var_epi64(v[c], even, v[4 + c]);
        out[4 + c] = _mm512_permutex2var_epi64(v[c], odd, v[4 + c]);
    }
}

static inline __m512 widened(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }

/* A row's columns from n on, 16 at a time: w holds `pairs` transposed pairs of each 16, `stride` apart. */
static inline void expand_row(const int32_t *s, const __m512i *w, int64_t stride, int64_t pairs, __m512 scaling, uint16_t *y,
                              int64_t columns) {
    for (int64_t n = 0; n < columns; n += 16, w += stride) {
        const __mmask16 kept = columns - n < 16 ? (1 << (columns - n)) - 1 : 0xffff;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t p = 0; p < pairs; p++) sum = _mm512_dpbf16_ps(sum, (__m512bh)w[p], (__m512bh)_mm512_set1_epi32(s[p]));
        sum = _mm512_fmadd_ps(scaling, sum, widened(_mm256_maskz_loadu_epi16(kept, y + n)));
        _mm256_mask_storeu_epi16(y + n, kept, _mm512_cvtepi32_epi16(rounded_dwords(sum)));
    }
}

void multi_lora_bf16_expand(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    multi_lora_job *j = context;
    const multi_lora_args *a = j->args;
    const segment *g = j->segments;
    const int64_t stride = ceil_div(a->r, 16) * 8;
    const int64_t room = a->factors == BFLOAT16 ? 0 : EXPAND_COLUMNS * a->r * sizeof(uint16_t);
    __m512i *w = scratch(1, EXPAND_COLUMNS / 16 * stride * sizeof(__m512i) + room);
    if (!w) {
        j->failed = 1;
        return;
    }
    for (int64_t unit; (unit = take_unit(&j->next)) < j->segments[j->count].expand_unit;) {
        while (unit >= g[1].expand_unit) g++;
        const int64_t n = (unit - g->expand_unit) * EXPAND_COLUMNS, pairs = ceil_div(g->rank, 2);
        const int64_t columns = a->N - n < EXPAND_COLUMNS ? a->N - n : EXPAND_COLUMNS;
        uint16_t *rounded = (uint16_t *)(w + EXPAND_COLUMNS / 16 * stride);
        const uint16_t *B = factor_of(a, a->B, (g->adapter * a->N + n) * a->r, columns * a->r, rounded);
        for (int64_t c = 0; c < columns; c += 16)
            for (int64_t i = 0; i < g->rank; i += 16)
                transpose_8_pairs(B + c * a->r + i, a->r, columns - c < 16 ? columns - c : 16,
                                  g->rank - i < 16 ? (1 << (g->rank - i)) - 1 : 0xffff, w + c / 16 * stride + i / 2);
        const __m512 scaling = _mm512_set1_ps(a->scaling[g->adapter]);
        for (int64_t m = g->first; m < g->first + g->count; m++) {
            const int32_t *s = (const int32_t *)((const uint16_t *)j->s + m * j->ld);
            uint16_t *y = (uint16_t *)a->y + j->order[m] * a->N + n;
            if (pairs == 8) expand_row(s, w, stride, 8, scaling, y, columns); /* the usual rank: s stays in registers */
            else expand_row(s, w, stride, pairs, scaling, y, columns);
        }
    }
}

int multi_lora_bf16_usable(const multi_lora_args *a) { return a->dtype == BFLOAT16; }
END_TARGET
#else
int multi_lora_bf16_usable(const multi_lora_args *a) { return (void)a, 0; }
void multi_lora_bf16_shrink(void *job, int64_t thread, int64_t threads) { (void)job, (void)thread, (void)threads; }
void multi_lora_bf16_expand(void *job, int64_t thread, int64_t threads) { (void)job, (void)thread, (void)threads; }
#endif
