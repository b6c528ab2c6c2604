/* The primitives in AVX2, FMA and F16C; each is specified in simd_portable.h. */
#include <immintrin.h>

#include "scalar.h"

#define W 8
typedef __m256 vf;
typedef uint64_t vq __attribute__((vector_size(4 * W)));
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline vq vq_mul(vq a, vq b) { return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b); }

/* 16-bit values as a table of low bytes and one of high bytes, which pshufb looks up and punpck joins. */
typedef struct { __m128i low, high; } table16;
typedef struct { __m256 first, second; } table32; /* codes 0..7 and 8..15 */

static inline __m256i bf16_dwords(__m256 f) { /* bfloat16 in the low halves; a NaN becomes 0x7fc0 */
    __m256i u = _mm256_castps_si256(f);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i h = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(h, _mm256_set1_epi32(0x7fc0), nan);
}
static inline __m128i halves(__m256 f, int dtype) { /* eight 16-bit values */
    if (dtype == BFLOAT16) {
        __m256i h = bf16_dwords(f);
        return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    }
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    __m128i mask = _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
    return _mm_blendv_epi8(_mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT), _mm_set1_epi16(0x7e00), mask);
}
static inline __m256 wide(__m128i h, int dtype) {
    if (dtype == FLOAT16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

static inline table16 make_table16(const float *values, float absmax, int dtype) {
    __m256 a = _mm256_set1_ps(absmax);
    __m128i h0 = halves(_mm256_mul_ps(_mm256_loadu_ps(values), a), dtype);
    __m128i h1 = halves(_mm256_mul_ps(_mm256_loadu_ps(values + 8), a), dtype);
    const __m128i mask = _mm_set1_epi16(255);
    return (table16){_mm_packus_epi16(_mm_and_si128(h0, mask), _mm_and_si128(h1, mask)),
                     _mm_packus_epi16(_mm_srli_epi16(h0, 8), _mm_srli_epi16(h1, 8))};
}
static inline table32 make_table32(const float *values, float absmax, int dtype) {
    __m256 a = _mm256_set1_ps(absmax);
    table32 t = {_mm256_mul_ps(_mm256_loadu_ps(values), a), _mm256_mul_ps(_mm256_loadu_ps(values + 8), a)};
    if (dtype == FLOAT32) return t;
    return (table32){wide(halves(t.first, dtype), dtype), wide(halves(t.second, dtype), dtype)};
}
static inline void store_table16(table16 t, uint16_t *out) {
    _mm_storeu_si128((void *)out, _mm_unpacklo_epi8(t.low, t.high));
    _mm_storeu_si128((void *)(out + 8), _mm_unpackhi_epi8(t.low, t.high));
}
static inline void store_table32(table32 t, float *out) {
    _mm256_storeu_ps(out, t.first);
    _mm256_storeu_ps(out + 8, t.second);
}

static inline void expand16(table16 t, const uint8_t *bytes, uint16_t *out) {
    const __m128i mask = _mm_set1_epi8(15);
    __m128i b = _mm_loadu_si128((const void *)bytes);
    __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), mask), odd = _mm_and_si128(b, mask);
    for (int half = 0; half < 2; half++) {
        __m128i codes = half ? _mm_unpackhi_epi8(even, odd) : _mm_unpacklo_epi8(even, odd);
        __m128i low = _mm_shuffle_epi8(t.low, codes), high = _mm_shuffle_epi8(t.high, codes);
        _mm_storeu_si128((void *)(out + 16 * half), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128((void *)(out + 16 * half + 8), _mm_unpackhi_epi8(low, high));
    }
}
static inline void expand32(table32 t, const uint8_t *bytes, float *out) {
    const __m256i shifts = _mm256_set1_epi64x(4);
    for (int quarter = 0; quarter < 4; quarter++) {
        int32_t four;
        memcpy(&four, bytes + 4 * quarter, 4);
        __m128i b = _mm_cvtsi32_si128(four);
        __m256i codes = _mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(b, b)), shifts);
        __m256 low = _mm256_permutevar8x32_ps(t.first, codes), high = _mm256_permutevar8x32_ps(t.second, codes);
        /* bit 3 of the code, moved to the sign, chooses the half */
        __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        _mm256_storeu_ps(out + 8 * quarter, _mm256_blendv_ps(low, high, upper));
    }
}

static inline __m256 load8(const void *x, int dtype, int64_t i) {
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)x + i);
    return wide(_mm_loadu_si128((const void *)((const uint16_t *)x + i)), dtype);
}

static inline void quantize32(const void *x, int dtype, int64_t i, float r, const codebook *book, uint8_t *out) {
    const __m256 one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    for (int quarter = 0; quarter < 4; quarter++) {
        __m256 s = _mm256_mul_ps(load8(x, dtype, i + 8 * quarter), _mm256_set1_ps(r));
        __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(s, _mm256_setzero_ps(), _CMP_LT_OQ));
        s = _mm256_max_ps(_mm256_min_ps(s, one), _mm256_xor_ps(one, sign));
        if (!book->is_signed) s = _mm256_andnot_ps(sign, s);
        __m256i rank = _mm256_setzero_si256();
        for (int t = 0; t < book->thresholds_count; t++) /* a true comparison is -1 */
            rank = _mm256_sub_epi32(rank, _mm256_castps_si256(_mm256_cmp_ps(s, _mm256_set1_ps(book->thresholds[t]), _CMP_GT_OQ)));
        if (!book->is_signed) {
            rank = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const void *)book->rank_codes), rank);
            rank = _mm256_add_epi32(rank, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
        }
        __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(rank, 4), _mm256_srli_epi64(rank, 32));
        for (int j = 0; j < 2; j++) {
            __m128i half = j ? _mm256_extracti128_si256(pairs, 1) : _mm256_castsi256_si128(pairs);
            out[4 * quarter + 2 * j] = _mm_extract_epi8(half, 0);
            out[4 * quarter + 2 * j + 1] = _mm_extract_epi8(half, 8);
        }
    }
}

static inline void widen32(const void *x, int dtype, int64_t i, float *out) {
    for (int j = 0; j < 32; j += 8) _mm256_storeu_ps(out + j, load8(x, dtype, i + j));
}
static inline void narrow32(const float *x, int dtype, void *out, int64_t i) {
    for (int j = 0; j < 32; j += 8) {
        __m256 f = _mm256_loadu_ps(x + j);
        if (dtype == FLOAT32) _mm256_storeu_ps((float *)out + i + j, f);
        else _mm_storeu_si128((void *)((uint16_t *)out + i + j), halves(f, dtype));
    }
}

static inline void decode16(const uint8_t *codes, float scale, float offset, float *out) {
    for (int half = 0; half < 16; half += 8) {
        __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(codes + half)));
        __m256 product = _mm256_mul_ps(_mm256_i32gather_ps(dynamic_map, index, 4), _mm256_set1_ps(scale));
        _mm256_storeu_ps(out + half, _mm256_add_ps(product, _mm256_set1_ps(offset)));
    }
}
