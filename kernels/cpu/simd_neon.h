/* The primitives in NEON (AArch64); each is specified in simd_portable.h. */
#include <arm_neon.h>

#include "scalar.h"

#define W 4
typedef float32x4_t vf;
typedef uint64_t vq __attribute__((vector_size(4 * W)));
static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline void vf_store(float *p, vf a) { vst1q_f32(p, a); }
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline float vf_sum(vf a) { return vaddvq_f32(a); }
static inline vq vq_mul(vq a, vq b) { return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b)); }

/* Tables by byte of the value: tbl looks each byte up, st2 / st4 interleave them in memory. */
typedef struct { uint8x16x2_t bytes; } table16;
typedef struct { uint8x16x4_t bytes; } table32;

static inline uint16x4_t halves(float32x4_t f, int dtype) { /* four 16-bit values; a NaN becomes canonical */
    uint32x4_t number = vceqq_f32(f, f);
    if (dtype == FLOAT16) {
        uint16x4_t h = vreinterpret_u16_f16(vcvt_f16_f32(f));
        return vbsl_u16(vmovn_u32(number), h, vdup_n_u16(0x7e00));
    }
    uint32x4_t u = vreinterpretq_u32_f32(f);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    u = vshrq_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
    return vmovn_u32(vbslq_u32(number, u, vdupq_n_u32(0x7fc0)));
}
static inline float32x4_t wide(uint16x4_t h, int dtype) {
    if (dtype == FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

static inline table16 make_table16(const float *values, float absmax, int dtype) {
    uint16_t t[16];
    for (int i = 0; i < 16; i += 4) vst1_u16(t + i, halves(vmulq_n_f32(vld1q_f32(values + i), absmax), dtype));
    return (table16){vld2q_u8((const uint8_t *)t)};
}
static inline table32 make_table32(const float *values, float absmax, int dtype) {
    float t[16];
    for (int i = 0; i < 16; i += 4) {
        float32x4_t f = vmulq_n_f32(vld1q_f32(values + i), absmax);
        vst1q_f32(t + i, dtype == FLOAT32 ? f : wide(halves(f, dtype), dtype));
    }
    return (table32){vld4q_u8((const uint8_t *)t)};
}
static inline void store_table16(table16 t, uint16_t *out) { vst2q_u8((uint8_t *)out, t.bytes); }
static inline void store_table32(table32 t, float *out) { vst4q_u8((uint8_t *)out, t.bytes); }

static inline uint8x16x2_t codes_of(const uint8_t *bytes) { /* the codes of elements 0..15 and 16..31 */
    uint8x16_t b = vld1q_u8(bytes), even = vshrq_n_u8(b, 4), odd = vandq_u8(b, vdupq_n_u8(15));
    return (uint8x16x2_t){{vzip1q_u8(even, odd), vzip2q_u8(even, odd)}};
}
static inline void expand16(table16 t, const uint8_t *bytes, uint16_t *out) {
    uint8x16x2_t codes = codes_of(bytes), v;
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 2; i++) v.val[i] = vqtbl1q_u8(t.bytes.val[i], codes.val[half]);
        vst2q_u8((uint8_t *)(out + 16 * half), v);
    }
}
static inline void expand32(table32 t, const uint8_t *bytes, float *out) {
    uint8x16x2_t codes = codes_of(bytes);
    uint8x16x4_t v;
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++) v.val[i] = vqtbl1q_u8(t.bytes.val[i], codes.val[half]);
        vst4q_u8((uint8_t *)(out + 16 * half), v);
    }
}

static inline float32x4_t load4(const void *x, int dtype, int64_t i) {
    return dtype == FLOAT32 ? vld1q_f32((const float *)x + i) : wide(vld1_u16((const uint16_t *)x + i), dtype);
}

static inline void quantize32(const void *x, int dtype, int64_t i, float r, const codebook *book, uint8_t *out) {
    uint32_t codes[32];
    for (int j = 0; j < 32; j += 4) {
        float32x4_t s = vmulq_n_f32(load4(x, dtype, i + j), r);
        uint32x4_t negative = vcltq_f32(s, vdupq_n_f32(0));
        s = vmaxq_f32(vminq_f32(s, vdupq_n_f32(1)), vdupq_n_f32(-1));
        if (!book->is_signed) s = vabsq_f32(s);
        uint32x4_t rank = vdupq_n_u32(0);
        for (int t = 0; t < book->thresholds_count; t++) /* a true comparison is -1 */
            rank = vsubq_u32(rank, vcgtq_f32(s, vdupq_n_f32(book->thresholds[t])));
        vst1q_u32(codes + j, rank);
        if (!book->is_signed)
            for (int l = 0; l < 4; l++) codes[j + l] = book->rank_codes[codes[j + l]] + (negative[l] & 8);
    }
    for (int j = 0; j < 16; j++) out[j] = codes[2 * j] << 4 | codes[2 * j + 1];
}

static inline void widen32(const void *x, int dtype, int64_t i, float *out) {
    for (int j = 0; j < 32; j += 4) vst1q_f32(out + j, load4(x, dtype, i + j));
}
static inline void narrow32(const float *x, int dtype, void *out, int64_t i) {
    for (int j = 0; j < 32; j += 4) {
        if (dtype == FLOAT32) vst1q_f32((float *)out + i + j, vld1q_f32(x + j));
        else vst1_u16((uint16_t *)out + i + j, halves(vld1q_f32(x + j), dtype));
    }
}

static inline void decode16(const uint8_t *codes, float scale, float offset, float *out) {
    for (int i = 0; i < 16; i++) {
        float product = dynamic_map[codes[i]] * scale;
        out[i] = product + offset;
    }
}
