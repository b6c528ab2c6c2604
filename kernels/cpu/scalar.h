/* Scalar conversions and codes: the tails of every instruction set, and the whole of the portable one. */
#ifndef POSTTRAIN_SCALAR_H
#define POSTTRAIN_SCALAR_H

#include <math.h>
#include <string.h>

#include "native.h"

static inline uint32_t float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

static inline uint16_t float_to_bf16(float x) {
    uint32_t u = float_bits(x);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

/* The exponent is rebased by a multiplication, which is exact and mends subnormals; infinity and NaN keep a full exponent. */
static inline float fp16_to_float(uint16_t h) {
    uint32_t magnitude = h & 0x7fff, sign = (uint32_t)(h & 0x8000) << 16;
    float x = bits_float(magnitude << 13) * 0x1p112f;
    uint32_t u = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : float_bits(x);
    return bits_float(u | sign);
}

/* Round to nearest even. Adding 1.5 * 2^(e + 13 - 23 + ...) style constants is what the hardware does; here the rounding
 * is spelled out on the bits: below 2^-14 the result is a multiple of 2^-24, which one fp32 addition rounds to. */
static inline uint16_t float_to_fp16(float x) {
    uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00; /* 65520 and above round to infinity */
    if (u < 0x38800000) return sign | (float_bits(bits_float(u) + 0.5f) - float_bits(0.5f));
    return sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13);
}

static inline float round_float(float x, int dtype) {
    if (dtype == BFLOAT16) return bf16_to_float(float_to_bf16(x));
    if (dtype == FLOAT16) return fp16_to_float(float_to_fp16(x));
    return x;
}

static inline float load_float(const void *x, int dtype, int64_t i) {
    if (dtype == FLOAT32) return ((const float *)x)[i];
    uint16_t h = ((const uint16_t *)x)[i];
    return dtype == BFLOAT16 ? bf16_to_float(h) : fp16_to_float(h);
}

static inline void store_float(float x, int dtype, void *out, int64_t i) {
    if (dtype == FLOAT32) ((float *)out)[i] = x;
    else ((uint16_t *)out)[i] = dtype == BFLOAT16 ? float_to_bf16(x) : float_to_fp16(x);
}

static inline int nibble(const uint8_t *packed, int64_t i) { return i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4; }

/* The code of a scaled value in [-1, 1]: thresholds strictly below it are counted, so a tie takes the lower code. */
static inline int scalar_code(const codebook *book, float s) {
    float compared = book->is_signed ? s : fabsf(s);
    int rank = 0;
    for (int i = 0; i < book->thresholds_count; i++) rank += compared > book->thresholds[i];
    return book->rank_codes[rank] + (!book->is_signed && s < 0 ? 8 : 0);
}

#endif
