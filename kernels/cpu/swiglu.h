/* Runs of SwiGLU and its gradients (kernels/swiglu.py). Part of template.h, after rms_norm.h. A run is at most SWIGLU_RUN long. */

#if defined(__FMA__) || defined(__aarch64__)
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* e^y for |y| <= 87 as a fraction times 2^n: returns the fraction, and in *n n's low bits. ln 2 in two parts, the first of few digits: the
 * product is exact; then a polynomial in the rest. 1.5 * 2^23 added rounds to an integer, which is then in the low bits. */
static inline float exp_parts(float y, uint32_t *n) {
    const float magic = 12582912.0f, shifted = MULTIPLY_ADD(y, 1.44269504f, magic), whole = shifted - magic;
    float f = MULTIPLY_ADD(whole, -0.693359375f, y);
    f = MULTIPLY_ADD(whole, 2.12194440e-4f, f);
    float p = MULTIPLY_ADD(1.9875691500e-4f, f, 1.3981999507e-3f);
    p = MULTIPLY_ADD(p, f, 8.3334519073e-3f);
    p = MULTIPLY_ADD(p, f, 4.1665795894e-2f);
    p = MULTIPLY_ADD(p, f, 1.6666665459e-1f);
    p = MULTIPLY_ADD(p, f, 5.0000001201e-1f);
    *n = float_bits(shifted);
    return MULTIPLY_ADD(p * f, f, f) + 1.0f;
}

/* sigmoid(x) and sigmoid(-x), neither by a difference: e / (1 + e) and 1 / (1 + e), e = exp(-x), which does not overflow up to 87. */
static inline float sigmoid(float x, float *opposite) {
    float y = x > 87.0f ? -87.0f : -x;
    y = x < -87.0f ? 87.0f : y;
    uint32_t n;
    const float p = exp_parts(y, &n);
    const float e = p * bits_float((n + 127) << 23), s = 1.0f / (1.0f + e);
    *opposite = e * s;
    return x < -87.0f ? 0.0f : s;
}

static inline void widen_run(const void *x, int dtype, int64_t n, float *out) {
    widen(x, dtype, n, out);
    for (int64_t i = n; i % LOGIT_LANES; i++) out[i] = 0;
}

static void swiglu_run(const void *gate, const void *up, int dtype, int64_t n, void *y) {
    float g[SWIGLU_RUN], u[SWIGLU_RUN], other;
    widen_run(gate, dtype, n, g), widen_run(up, dtype, n, u);
    for (int64_t i = 0; i < n; i += LOGIT_LANES)
        for (int j = 0; j < LOGIT_LANES; j++) u[i + j] *= g[i + j] * sigmoid(g[i + j], &other);
    narrow(u, dtype, n, y);
}

/* du = dy g s        dg = dy u s (1 + g (1 - s)), s = sigmoid(g) */
static void swiglu_run_backward(const void *gate, const void *up, const void *dy, int dtype, int64_t n, void *dgate, void *dup) {
    float g[SWIGLU_RUN], u[SWIGLU_RUN], d[SWIGLU_RUN];
    widen_run(gate, dtype, n, g), widen_run(up, dtype, n, u), widen_run(dy, dtype, n, d);
    for (int64_t i = 0; i < n; i += LOGIT_LANES)
        for (int j = 0; j < LOGIT_LANES; j++) {
            float rest, s = sigmoid(g[i + j], &rest), slope = s * (1.0f + g[i + j] * rest);
            float by_gate = d[i + j] * u[i + j] * slope;
            u[i + j] = d[i + j] * (g[i + j] * s);
            g[i + j] = by_gate;
        }
    narrow(g, dtype, n, dgate);
    narrow(u, dtype, n, dup);
}
