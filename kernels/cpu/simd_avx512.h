/* The primitives in AVX-512 F/BW/VL/DQ; each is specified in simd_portable.h. */
#include <immintrin.h>

#include "scalar.h"

#define W 16
typedef __m512 vf;
typedef uint64_t vq __attribute__((vector_size(4 * W)));
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline vq vq_mul(vq a, vq b) { return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

/* A table of 16-bit values keeps each twice, in both halves of a dword, so that the index of vpermw is 2 * code + anything:
 * five bits cut out of the packed bytes by one shift, with no mask. */
typedef __m512i table16;
typedef __m512 table32;

static inline __m512i bf16_dwords(__m512 f) { /* bfloat16 of finite values in the low halves */
    __m512i u = _mm512_castps_si512(f);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
}
static inline __m512i twice(__m512i low) { return _mm512_or_si512(low, _mm512_slli_epi32(low, 16)); }

static inline __m512i table_of_nonfinite(const float *values, float absmax, int dtype) {
    uint32_t t[16];
    for (int i = 0; i < 16; i++)
        t[i] = dtype == BFLOAT16 ? float_to_bf16(values[i] * absmax) : float_to_fp16(values[i] * absmax);
    return _mm512_loadu_si512(t);
}
static inline __m512i dword_table(const float *values, float absmax, int dtype) {
    if (__builtin_expect(!(fabsf(absmax) < INFINITY), 0)) return table_of_nonfinite(values, absmax, dtype);
    __m512 f = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(absmax));
    if (dtype == BFLOAT16) return bf16_dwords(f);
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
}
static inline table16 make_table16(const float *values, float absmax, int dtype) {
    return twice(dword_table(values, absmax, dtype));
}
static inline table32 make_table32(const float *values, float absmax, int dtype) {
    if (dtype == FLOAT32) return _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(absmax));
    __m512i low = dword_table(values, absmax, dtype);
    if (dtype == BFLOAT16) return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(low));
}
static inline void store_table16(table16 t, uint16_t *out) { _mm256_storeu_si256((void *)out, _mm512_cvtepi32_epi16(t)); }
static inline void store_table32(table32 t, float *out) { _mm512_storeu_ps(out, t); }

static inline void expand16(table16 t, const uint8_t *bytes, uint16_t *out) {
    /* word 2i and 2i + 1 get byte i in their upper half; shifted by 11 and 7 their low five bits are (code, bit) */
    const __m512i spread = _mm512_set_epi8(15, -1, 15, -1, 14, -1, 14, -1, 13, -1, 13, -1, 12, -1, 12, -1,  //
                                           11, -1, 11, -1, 10, -1, 10, -1, 9, -1, 9, -1, 8, -1, 8, -1,      //
                                           7, -1, 7, -1, 6, -1, 6, -1, 5, -1, 5, -1, 4, -1, 4, -1,          //
                                           3, -1, 3, -1, 2, -1, 2, -1, 1, -1, 1, -1, 0, -1, 0, -1);
    __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)bytes));
    __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(b, spread), _mm512_set1_epi32(7 << 16 | 11));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, t));
}
static inline void expand32(table32 t, const uint8_t *bytes, float *out) {
    /* vpermps reads the low four bits of each dword, here byte i / 2 shifted by 4 or 0 */
    const __m512i shifts = _mm512_set1_epi64(4);
    for (int half = 0; half < 2; half++) {
        __m128i b = _mm_loadl_epi64((const void *)(bytes + 8 * half));
        __m512i index = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(b, b)), shifts);
        _mm512_storeu_ps(out + 16 * half, _mm512_permutexvar_ps(index, t));
    }
}

static inline __m512 load16(const void *x, int dtype, int64_t i) {
    if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)x + i);
    __m256i h = _mm256_loadu_si256((const void *)((const uint16_t *)x + i));
    if (dtype == FLOAT16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline void quantize32(const void *x, int dtype, int64_t i, float r, const codebook *book, uint8_t *out) {
    const __m512 one = _mm512_set1_ps(1);
    for (int half = 0; half < 2; half++) {
        __m512 s = _mm512_mul_ps(load16(x, dtype, i + 16 * half), _mm512_set1_ps(r));
        __mmask16 negative = _mm512_cmp_ps_mask(s, _mm512_setzero_ps(), _CMP_LT_OQ);
        s = _mm512_max_ps(_mm512_min_ps(s, one), _mm512_sub_ps(_mm512_setzero_ps(), one));
        if (!book->is_signed) s = _mm512_abs_ps(s);
        __m512i bucket = _mm512_cvttps_epi32(
            _mm512_fmadd_ps(s, _mm512_set1_ps(book->bucket_scale), _mm512_set1_ps(book->bucket_shift)));
        __m512 threshold = _mm512_permutex2var_ps(_mm512_loadu_ps(book->bucket_threshold), bucket,
                                                  _mm512_loadu_ps(book->bucket_threshold + 16));
        __m512i rank = _mm512_permutex2var_epi32(_mm512_loadu_si512(book->bucket_rank), bucket,
                                                 _mm512_loadu_si512(book->bucket_rank + 16));
        rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(s, threshold, _CMP_GT_OQ), rank, _mm512_set1_epi32(1));
        if (!book->is_signed) {
            rank = _mm512_permutexvar_epi32(rank, _mm512_loadu_si512(book->rank_codes));
            rank = _mm512_mask_add_epi32(rank, negative, rank, _mm512_set1_epi32(8));
        }
        /* each qword holds an even and an odd code: (even << 4 | odd) ends up in its lowest byte */
        __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(rank, 4), _mm512_srli_epi64(rank, 32));
        _mm_storel_epi64((void *)(out + 8 * half), _mm512_cvtepi64_epi8(bytes));
    }
}

static inline void widen32(const void *x, int dtype, int64_t i, float *out) {
    _mm512_storeu_ps(out, load16(x, dtype, i));
    _mm512_storeu_ps(out + 16, load16(x, dtype, i + 16));
}
static inline void narrow32(const float *x, int dtype, void *out, int64_t i) {
    for (int half = 0; half < 32; half += 16) {
        __m512 f = _mm512_loadu_ps(x + half);
        __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
        if (dtype == FLOAT32) {
            _mm512_storeu_ps((float *)out + i + half, f);
            continue;
        }
        __m256i h = dtype == FLOAT16 ? _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT) : _mm512_cvtepi32_epi16(bf16_dwords(f));
        h = _mm256_mask_mov_epi16(h, nan, _mm256_set1_epi16(dtype == FLOAT16 ? 0x7e00 : 0x7fc0));
        _mm256_storeu_si256((void *)((uint16_t *)out + i + half), h);
    }
}

static inline void decode16(const uint8_t *codes, float scale, float offset, float *out) {
    __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)codes));
    __m512 product = _mm512_mul_ps(_mm512_i32gather_ps(index, dynamic_map, 4), _mm512_set1_ps(scale));
    _mm512_storeu_ps(out, _mm512_add_ps(product, _mm512_set1_ps(offset)));
}
