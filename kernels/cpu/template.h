/* The loops of one instruction set over the primitives of its simd_*.h. Included once by each isa_*.c, which defines ISA. */

static float block_absmax(const void *x, int dtype, int64_t start, int64_t count) {
    /* without the sign bit the bits of floats sort as integers, and a NaN sorts above infinity */
    if (dtype == FLOAT32) {
        const uint32_t *bits = (const uint32_t *)x + start;
        int32_t largest = 0;
        for (int64_t i = 0; i < count; i++) {
            int32_t v = bits[i] & 0x7fffffff;
            largest = v > largest ? v : largest;
        }
        return largest > 0x7f800000 ? bits_float(0x7fc00000) : bits_float(largest);
    }
    const uint16_t *bits = (const uint16_t *)x + start;
    int16_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int16_t v = bits[i] & 0x7fff;
        largest = v > largest ? v : largest;
    }
    if (largest > (dtype == BFLOAT16 ? 0x7f80 : 0x7c00)) return bits_float(0x7fc00000);
    return dtype == BFLOAT16 ? bf16_to_float(largest) : fp16_to_float(largest);
}

static void quantize_partial(const void *x, int dtype, int64_t start, int64_t count, float absmax, const codebook *book,
                             uint8_t *out) {
    float clamped = absmax > 1e-38f ? absmax : 1e-38f;
    for (int64_t i = 0; i < count; i++) {
        float v = load_float(x, dtype, start + i), s = v / clamped;
        if (isinf(v)) s = v > 0 ? 1 : -1;
        int code = absmax != absmax ? 0 : scalar_code(book, s > 1 ? 1 : s < -1 ? -1 : s);
        if (i & 1) out[i >> 1] |= code;
        else out[i >> 1] = code << 4;
    }
    if (count & 1) out[count >> 1] |= scalar_code(book, 0);
}

static inline void quantize_full(const void *x, int dtype, int64_t start, int64_t block_size, float absmax,
                                 const codebook *book, uint8_t *out) {
    float r = 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
    if (r < 1e-42f) r = 1e-42f; /* an infinite absmax: infinities stay outermost, finite values become 0 */
    for (int64_t i = 0; i < block_size; i += 32) quantize32(x, dtype, start + i, r, book, out + i / 2);
}

static inline void quantize_blocks(const void *x, int dtype, int64_t n, int64_t block_size, const codebook *book,
                                   int64_t first, int64_t last, uint8_t *packed, float *absmax) {
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * block_size, count = n - start < block_size ? n - start : block_size;
        uint8_t *out = packed + start / 2;
        absmax[b] = block_absmax(x, dtype, start, count);
        if (count < block_size) quantize_partial(x, dtype, start, count, absmax[b], book, out);
        else if (absmax[b] != absmax[b]) memset(out, 0, block_size / 2);
        else quantize_full(x, dtype, start, block_size, absmax[b], book, out);
    }
}

static void quantize(const void *x, int dtype, int64_t n, int64_t block_size, const codebook *book, int64_t first,
                     int64_t last, uint8_t *packed, float *absmax) {
    /* dtype becomes a constant of each copy of the loop */
    if (dtype == FLOAT32) quantize_blocks(x, FLOAT32, n, block_size, book, first, last, packed, absmax);
    else if (dtype == FLOAT16) quantize_blocks(x, FLOAT16, n, block_size, book, first, last, packed, absmax);
    else quantize_blocks(x, BFLOAT16, n, block_size, book, first, last, packed, absmax);
}

static void decode_absmax(const weight *w, int64_t first, int64_t count, float *out) {
    if (!w->nested_absmax) {
        memcpy(out, (const float *)w->absmax + first, count * sizeof(float));
        return;
    }
    const uint8_t *codes = (const uint8_t *)w->absmax + first;
    for (int64_t i = 0; i < count;) {
        int64_t nested = (first + i) / w->nested_block_size, stop = (nested + 1) * w->nested_block_size - first;
        float scale = w->nested_absmax[nested], offset = w->offset;
        stop = stop < count ? stop : count;
        for (; i + 16 <= stop; i += 16) decode16(codes + i, scale, offset, out + i);
        for (; i < stop; i++) {
            float product = dynamic_map[codes[i]] * scale;
            out[i] = product + offset;
        }
    }
}

static inline void dequantize16(const weight *w, const float *absmax, int64_t start, int64_t count, int dtype, uint16_t *out) {
    const int64_t end = start + count, aligned = !(start & 1);
    int64_t block_end = start / w->block_size * w->block_size;
    for (int64_t i = start; i < end; absmax++) {
        block_end += w->block_size;
        int64_t stop = block_end < end ? block_end : end;
        table16 t = make_table16(w->book->values, *absmax, dtype);
        if (aligned)
            for (; i + 32 <= stop; i += 32) expand16(t, w->packed + (i >> 1), out + (i - start));
        if (i < stop) {
            uint16_t entries[16];
            store_table16(t, entries);
            for (; i < stop; i++) out[i - start] = entries[nibble(w->packed, i)];
        }
    }
}

static inline void dequantize32(const weight *w, const float *absmax, int64_t start, int64_t count, int dtype, float *out) {
    const int64_t end = start + count, aligned = !(start & 1);
    int64_t block_end = start / w->block_size * w->block_size;
    for (int64_t i = start; i < end; absmax++) {
        block_end += w->block_size;
        int64_t stop = block_end < end ? block_end : end;
        table32 t = make_table32(w->book->values, *absmax, dtype);
        if (aligned)
            for (; i + 32 <= stop; i += 32) expand32(t, w->packed + (i >> 1), out + (i - start));
        if (i < stop) {
            float entries[16];
            store_table32(t, entries);
            for (; i < stop; i++) out[i - start] = entries[nibble(w->packed, i)];
        }
    }
}

static void dequantize(const weight *w, const float *absmax, int64_t start, int64_t count, int dtype, void *out) {
    if (dtype == FLOAT32) dequantize32(w, absmax, start, count, FLOAT32, out);
    else if (dtype == FLOAT16) dequantize16(w, absmax, start, count, FLOAT16, out);
    else dequantize16(w, absmax, start, count, BFLOAT16, out);
}

static void dequantize_wide(const weight *w, const float *absmax, int64_t start, int64_t count, int dtype, float *out) {
    if (dtype == FLOAT32) dequantize32(w, absmax, start, count, FLOAT32, out);
    else if (dtype == FLOAT16) dequantize32(w, absmax, start, count, FLOAT16, out);
    else dequantize32(w, absmax, start, count, BFLOAT16, out);
}

/* Codes of `count` values: how many thresholds lie strictly below, found by halving (255 = 128 + 64 + ... + 1), many searches
 * side by side. */
enum { SEARCHES = 64 };
static void search(const float *absmax, int64_t count, float offset, float r, int smallest, uint8_t *codes) {
    float scaled[SEARCHES] = {0};
    int32_t found[SEARCHES] = {0};
    for (int64_t i = 0; i < count; i++) scaled[i] = (absmax[i] - offset) * r;
    for (int bit = 7; bit >= 0; bit--) {
        const float *at = dynamic_thresholds + (1 << bit) - 1;
        for (int i = 0; i < SEARCHES; i++) found[i] += (scaled[i] > at[found[i]]) << bit; /* no branch: nothing to predict */
    }
    for (int64_t i = 0; i < count; i++) codes[i] = found[i] > smallest ? found[i] : smallest;
}

static void double_quantize(const float *absmax, int64_t n, int64_t block_size, float offset, int64_t first, int64_t last,
                            uint8_t *codes, float *nested_absmax) {
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * block_size, stop = start + block_size < n ? start + block_size : n;
        float largest = 0;
        for (int64_t i = start; i < stop; i++) {
            float distance = fabsf(absmax[i] - offset);
            largest = distance > largest ? distance : largest;
        }
        nested_absmax[b] = largest;
        float r = 1.0f / (largest > 1e-38f ? largest : 1e-38f);
        int smallest = 0; /* the first code whose reconstruction is not negative: less would flip the signs of a whole block */
        while (smallest < 255 && dynamic_map[smallest] * largest + offset < 0) smallest++;
        for (int64_t i = start; i < stop; i += SEARCHES) {
            int64_t count = stop - i < SEARCHES ? stop - i : SEARCHES;
            search(absmax + i, count, offset, r, smallest, codes + i);
        }
    }
}

static void widen(const void *x, int dtype, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) widen32(x, dtype, i, out + i);
    for (; i < n; i++) out[i] = load_float(x, dtype, i);
}

static void narrow(const float *x, int dtype, int64_t n, void *out) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) narrow32(x + i, dtype, out, i);
    for (; i < n; i++) store_float(x[i], dtype, out, i);
}

/* Runs of 64 products a lane, then the lanes' sums are added up: long chains of additions would lose digits. K is a multiple of
 * 16: callers pad with zeros. Four rows by two columns of sums stay in registers. */
static inline void dots_run(const float *w, int64_t stride, const float *x0, const float *x1, int64_t K, float *out0, float *out1,
                            int64_t M) {
    vf s00 = vf_set1(0), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00, s31 = s00;
    for (int64_t k = 0; k < K; k += W) {
        vf a = vf_load(x0 + k), b = vf_load(x1 + k), r;
        r = vf_load(w + k), s00 = vf_fma(r, a, s00), s01 = vf_fma(r, b, s01);
        r = vf_load(w + stride + k), s10 = vf_fma(r, a, s10), s11 = vf_fma(r, b, s11);
        r = vf_load(w + 2 * stride + k), s20 = vf_fma(r, a, s20), s21 = vf_fma(r, b, s21);
        r = vf_load(w + 3 * stride + k), s30 = vf_fma(r, a, s30), s31 = vf_fma(r, b, s31);
    }
    out0[0] += vf_sum(s00), out0[M] += vf_sum(s10), out0[2 * M] += vf_sum(s20), out0[3 * M] += vf_sum(s30);
    if (out1 != out0) out1[0] += vf_sum(s01), out1[M] += vf_sum(s11), out1[2 * M] += vf_sum(s21), out1[3 * M] += vf_sum(s31);
}

static void dots(const float *w, int64_t stride, const float *x, int64_t ldx, int64_t M, int64_t K, float *out) {
    for (int64_t m = 0; m < M; m += 2) {
        int64_t other = m + 1 < M;
        for (int64_t k = 0; k < K; k += 64 * W)
            dots_run(w + k, stride, x + m * ldx + k, x + (m + other) * ldx + k, K - k < 64 * W ? K - k : 64 * W, out + m,
                     out + m + other, M);
    }
}

/* K is a multiple of 16, and so are the strides: callers pad. The rows are summed before acc is added, as above. */
static void axpys(const float *w, int64_t stride, int64_t rows, const float *dy, int64_t lddy, int64_t M, int64_t K,
                  float *acc, int64_t ldacc) {
    for (int64_t k = 0; k < K; k += 16)
        for (int64_t m = 0; m < M; m++) {
            float *to = acc + m * ldacc + k;
            vf sums[16 / W];
            for (int j = 0; j < 16 / W; j++) sums[j] = vf_set1(0);
            for (int64_t r = 0; r < rows; r++) {
                vf g = vf_set1(dy[m * lddy + r]);
                for (int j = 0; j < 16 / W; j++) sums[j] = vf_fma(g, vf_load(w + r * stride + k + j * W), sums[j]);
            }
            for (int j = 0; j < 16 / W; j++) vf_store(to + j * W, vf_add(vf_load(to + j * W), sums[j]));
        }
}

#include "logit_rows.h"
#include "rms_norm.h"
#include "swiglu.h"
#include "rope.h"
#include "row_filter.h"
#include "row_race.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

const isa JOIN(isa_, ISA) = {
    STRING(ISA), quantize, decode_absmax, dequantize, dequantize_wide, double_quantize, widen, narrow, dots, axpys, logit_row,
    rms_norm_row, rms_norm_row_backward, swiglu_run, swiglu_run_backward, rope_position, first_largest, filter_row,
    leftover_mass, race,
};
