/* A position's heads turned (kernels/rope.py). Part of template.h, after swiglu.h, whose MULTIPLY_ADD takes the sine's product unrounded,
 * as PyTorch's addcmul does. cos and sin are widened ROPE_RUN pairs at a time, once for all heads. */

enum { ROPE_RUN = 64 };

/* The factors of a run: to a pair's low half belong lo cos_lo + hi sin_lo, to its high one hi cos_hi + lo sin_hi. */
typedef struct {
    float cos_lo[ROPE_RUN], cos_hi[ROPE_RUN], sin_lo[ROPE_RUN], sin_hi[ROPE_RUN];
} rope_run;

/* n pairs, at i of the run, in place. */
static inline void rope_pairs(float *lo, float *hi, const rope_run *r, int64_t i, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        const float a = lo[j], b = hi[j];
        lo[j] = MULTIPLY_ADD(b, r->sin_lo[i + j], a * r->cos_lo[i + j]);
        hi[j] = MULTIPLY_ADD(a, r->sin_hi[i + j], b * r->cos_hi[i + j]);
    }
}

/* n pairs whose halves are `other` bytes apart. Whole runs of 32 stay in registers, which takes arrays that no call sees. */
static inline void rope_half(const char *x, int64_t other, int dtype, const rope_run *r, int64_t n, char *y) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        float lo[32], hi[32];
        widen32(x, dtype, i, lo), widen32(x + other, dtype, i, hi);
        rope_pairs(lo, hi, r, i, 32);
        narrow32(lo, dtype, y, i), narrow32(hi, dtype, y + other, i);
    }
    for (; i < n; i++) {
        float lo = load_float(x, dtype, i), hi = load_float(x + other, dtype, i);
        rope_pairs(&lo, &hi, r, i, 1);
        store_float(lo, dtype, y, i), store_float(hi, dtype, y + other, i);
    }
}

/* Heads of x are `stride` elements apart, of y they follow each other. */
static inline void rope_heads(const char *x, int64_t stride, int64_t heads, const char *cos, const char *sin, int dtype, int64_t half,
                              int transposed, char *y) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2, other = half * size;
    for (int64_t start = 0; start < half; start += ROPE_RUN) {
        const int64_t n = half - start < ROPE_RUN ? half - start : ROPE_RUN, at = start * size;
        rope_run r;
        widen(cos + at, dtype, n, r.cos_lo), widen(cos + at + other, dtype, n, r.cos_hi);
        widen(sin + at, dtype, n, transposed ? r.sin_hi : r.sin_lo), widen(sin + at + other, dtype, n, transposed ? r.sin_lo : r.sin_hi);
        for (int64_t h = 0; h < heads; h++) rope_half(x + h * stride * size + at, other, dtype, &r, n, y + 2 * h * other + at);
    }
}

static void rope_position(const void *x, int64_t stride, int64_t heads, const void *cos, const void *sin, int dtype, int64_t half,
                          int transposed, void *y) {
    /* dtype becomes a constant of each copy of the loop */
    if (dtype == FLOAT32) rope_heads(x, stride, heads, cos, sin, FLOAT32, half, transposed, y);
    else if (dtype == FLOAT16) rope_heads(x, stride, heads, cos, sin, FLOAT16, half, transposed, y);
    else rope_heads(x, stride, heads, cos, sin, BFLOAT16, half, transposed, y);
}
