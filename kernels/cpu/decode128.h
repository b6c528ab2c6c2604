/* 128 weights of bfloat16 decoded in registers, in an order that costs nothing (AVX-512 BF16).
 *
 * A 64-byte load holds 32 words of four nibbles. Shifted by 4, 0, 12 or 8 bits, the low nibble of every word is a code, so
 * vector j holds elements 4 * i + j at word i: no shuffle. Products take x in the same order (order128). The words 0..15 and
 * 16..31 may belong to two blocks: vpermw reads a table of 32 words, block 0's sixteen values and block 1's. */
#ifndef POSTTRAIN_DECODE128_H
#define POSTTRAIN_DECODE128_H

#include "simd_avx512.h"

static inline void decode128(const float *values, __m512i bytes, float absmax0, float absmax1, __m512i *out) {
    const __m512i code = _mm512_set1_epi8(15);
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    __m512 v = _mm512_loadu_ps(values);
    __m512i table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(v, _mm512_set1_ps(absmax1)), _mm512_mul_ps(v, _mm512_set1_ps(absmax0)));
    /* 0xea: (a & b) | c. Both bytes of a word become indices at once, the upper one moved down by a shift. */
    __m512i odd = _mm512_ternarylogic_epi32(bytes, code, half, 0xea);
    __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), code, half, 0xea);
    out[0] = _mm512_permutexvar_epi16(even, table);
    out[1] = _mm512_permutexvar_epi16(odd, table);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
}

/* The bytes of a row's group g, zero beyond the row. */
static inline __m512i group_bytes(const uint8_t *row, int64_t g, int64_t K) {
    __mmask16 whole = (g + 1) * 128 <= K ? 0xffff : 0x00ff;
    return _mm512_maskz_loadu_epi32(whole, row + g * 64);
}

/* K values of x in the order of decode128, zero up to a multiple of 128. */
static inline void order128(const uint16_t *x, int64_t K, uint16_t *out) {
    for (int64_t k = 0; k < K; k += 128, out += 128)
        for (int part = 0; part < 4; part++) { /* eight words of each vector */
            __m512i v = k + 32 * part < K ? _mm512_loadu_si512(x + k + 32 * part) : _mm512_setzero_si512();
            for (int j = 0; j < 4; j++)
                _mm_storeu_si128((void *)(out + 32 * j + 8 * part), _mm512_cvtepi64_epi16(_mm512_srli_epi64(v, 16 * j)));
        }
}

/* bfloat16 of sums, which may be anything, in the low halves of dwords. */
static inline __m512i rounded_dwords(__m512 f) {
    return _mm512_mask_mov_epi32(bf16_dwords(f), _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}

#endif
