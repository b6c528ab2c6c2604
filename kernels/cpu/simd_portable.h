/* The primitives every instruction set provides, in plain C. W is the width of `vf` in floats. */
#include "scalar.h"

#define W 4
typedef struct { float v[4]; } vf;
static inline vf vf_load(const float *p) { return (vf){{p[0], p[1], p[2], p[3]}}; }
static inline vf vf_set1(float x) { return (vf){{x, x, x, x}}; }
static inline void vf_store(float *p, vf a) { memcpy(p, a.v, sizeof a.v); }
static inline vf vf_add(vf a, vf b) {
    for (int i = 0; i < 4; i++) a.v[i] += b.v[i];
    return a;
}
static inline vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < 4; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
}
static inline float vf_sum(vf a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

/* Unsigned integers of 64 bits; vq_mul multiplies their low halves. */
typedef uint64_t vq __attribute__((vector_size(4 * W)));
static inline vq vq_mul(vq a, vq b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }

/* table16: code -> 16-bit value; table32: code -> float32 value, rounded to dtype. Built once a block. */
typedef struct { uint16_t v[16]; } table16;
typedef struct { float v[16]; } table32;

static inline table32 make_table32(const float *values, float absmax, int dtype) {
    table32 t;
    for (int i = 0; i < 16; i++) t.v[i] = round_float(values[i] * absmax, dtype);
    return t;
}
static inline table16 make_table16(const float *values, float absmax, int dtype) {
    table16 t;
    for (int i = 0; i < 16; i++)
        t.v[i] = dtype == BFLOAT16 ? float_to_bf16(values[i] * absmax) : float_to_fp16(values[i] * absmax);
    return t;
}
static inline void store_table16(table16 t, uint16_t *out) { memcpy(out, t.v, sizeof t.v); }
static inline void store_table32(table32 t, float *out) { memcpy(out, t.v, sizeof t.v); }

/* 16 bytes -> 32 values in order. */
static inline void expand16(table16 t, const uint8_t *bytes, uint16_t *out) {
    for (int i = 0; i < 16; i++) out[2 * i] = t.v[bytes[i] >> 4], out[2 * i + 1] = t.v[bytes[i] & 15];
}
static inline void expand32(table32 t, const uint8_t *bytes, float *out) {
    for (int i = 0; i < 16; i++) out[2 * i] = t.v[bytes[i] >> 4], out[2 * i + 1] = t.v[bytes[i] & 15];
}

/* 32 elements of x from index i, scaled by r and clamped: their codes, packed into 16 bytes. */
static inline void quantize32(const void *x, int dtype, int64_t i, float r, const codebook *book, uint8_t *out) {
    float s[32];
    uint8_t codes[32] = {0};
    for (int j = 0; j < 32; j++) {
        float v = load_float(x, dtype, i + j) * r;
        v = v > 1 ? 1 : v;
        s[j] = v < -1 ? -1 : v;
    }
    for (int t = 0; t < book->thresholds_count; t++)
        for (int j = 0; j < 32; j++) codes[j] += (book->is_signed ? s[j] : fabsf(s[j])) > book->thresholds[t];
    for (int j = 0; j < 32; j++) codes[j] = book->rank_codes[codes[j]] + (!book->is_signed && s[j] < 0 ? 8 : 0);
    for (int j = 0; j < 16; j++) out[j] = codes[2 * j] << 4 | codes[2 * j + 1];
}

static inline void widen32(const void *x, int dtype, int64_t i, float *out) {
    for (int j = 0; j < 32; j++) out[j] = load_float(x, dtype, i + j);
}
static inline void narrow32(const float *x, int dtype, void *out, int64_t i) {
    for (int j = 0; j < 32; j++) store_float(x[j], dtype, out, i + j);
}

/* 16 codes of double quantization decoded: two roundings. */
static inline void decode16(const uint8_t *codes, float scale, float offset, float *out) {
    for (int i = 0; i < 16; i++) {
        float product = dynamic_map[codes[i]] * scale;
        out[i] = product + offset;
    }
}
