/* A position's heads turned (kernels/rope.py). Part of template.h, after swiglu.h. Halves are widened ROPE_RUN pairs at a time: those of
 * cos and sin once for all heads. No product is fused with its sum: every instruction set returns the same bits. */

enum { ROPE_RUN = 64 };

/* n pairs: lo cos_lo + hi sin_lo, hi cos_hi + lo sin_hi. `table` has cos_lo, cos_hi, sin_lo, sin_hi, ROPE_RUN apart. */
static inline void rope_pairs(const float *lo, const float *hi, const float *table, int64_t n, float *out_lo, float *out_hi) {
    const float *cos_lo = table, *cos_hi = table + ROPE_RUN, *sin_lo = table + 2 * ROPE_RUN, *sin_hi = table + 3 * ROPE_RUN;
    for (int64_t i = 0; i < n; i++) {
        out_lo[i] = lo[i] * cos_lo[i] + hi[i] * sin_lo[i];
        out_hi[i] = hi[i] * cos_hi[i] + lo[i] * sin_hi[i];
    }
}

/* Heads of x are `stride` elements apart, of y they follow each other. */
static inline void rope_heads(const char *x, int64_t stride, int64_t heads, const char *cos, const char *sin, int dtype, int64_t half,
                              int transposed, char *y) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2, other = half * size;
    for (int64_t start = 0; start < half; start += ROPE_RUN) {
        const int64_t n = half - start < ROPE_RUN ? half - start : ROPE_RUN, at = start * size;
        float table[4 * ROPE_RUN], lo[ROPE_RUN], hi[ROPE_RUN], out_lo[ROPE_RUN], out_hi[ROPE_RUN];
        widen(cos + at, dtype, n, table), widen(cos + at + other, dtype, n, table + ROPE_RUN);
        widen(sin + at, dtype, n, table + (transposed ? 3 : 2) * ROPE_RUN);
        widen(sin + at + other, dtype, n, table + (transposed ? 2 : 3) * ROPE_RUN);
        for (int64_t h = 0; h < heads; h++) {
            const char *from = x + h * stride * size + at;
            char *to = y + 2 * h * other + at;
            int64_t i = 0;
            for (; i + 32 <= n; i += 32) { /* of a fixed length: these stay in registers */
                widen32(from, dtype, i, lo), widen32(from + other, dtype, i, hi);
                rope_pairs(lo, hi, table + i, 32, out_lo, out_hi);
                narrow32(out_lo, dtype, to, i), narrow32(out_hi, dtype, to + other, i);
            }
            if (i == n) continue;
            widen(from + i * size, dtype, n - i, lo), widen(from + other + i * size, dtype, n - i, hi);
            rope_pairs(lo, hi, table + i, n - i, out_lo, out_hi);
            narrow(out_lo, dtype, n - i, to + i * size), narrow(out_hi, dtype, n - i, to + other + i * size);
        }
    }
}

static void rope_position(const void *x, int64_t stride, int64_t heads, const void *cos, const void *sin, int dtype, int64_t half,
                          int transposed, void *y) {
    /* dtype becomes a constant of each copy of the loop */
    if (dtype == FLOAT32) rope_heads(x, stride, heads, cos, sin, FLOAT32, half, transposed, y);
    else if (dtype == FLOAT16) rope_heads(x, stride, heads, cos, sin, FLOAT16, half, transposed, y);
    else rope_heads(x, stride, heads, cos, sin, BFLOAT16, half, transposed, y);
}
