/* Rows of RMSNorm and their gradients (kernels/rms_norm.py). Part of template.h, after logit_rows.h, whose lanes it sums in. The
 * weight is float32, padded with zeros to whole runs of lanes; a row is widened by chunks that stay in the first-level cache. */

enum { NORM_CHUNK = 16 * LOGIT_LANES };

/* Elements [start, start + NORM_CHUNK) of a row, zeros up to the next run of lanes. Returns how many there are, without the zeros. */
static inline int64_t widen_chunk(const void *x, int dtype, int64_t D, int64_t start, float *out) {
    const int64_t count = D - start < NORM_CHUNK ? D - start : NORM_CHUNK;
    widen((const char *)x + start * (dtype == FLOAT32 ? 4 : 2), dtype, count, out);
    for (int64_t i = count; i % LOGIT_LANES; i++) out[i] = 0;
    return count;
}

static void rms_norm_row(const void *x, int dtype, const float *w, int64_t D, float eps, void *y, float *rstd) {
    float v[NORM_CHUNK], sums[LOGIT_LANES] = {0};
    for (int64_t start = 0; start < D; start += NORM_CHUNK) {
        const int64_t count = widen_chunk(x, dtype, D, start, v);
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) sums[j] += v[i + j] * v[i + j];
    }
    const float r = *rstd = 1.0f / sqrtf(lanes_sum(sums) / D + eps);
    for (int64_t start = 0; start < D; start += NORM_CHUNK) {
        const int64_t count = D > NORM_CHUNK ? widen_chunk(x, dtype, D, start, v) : D;
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) v[i + j] = v[i + j] * r * w[start + i + j];
        narrow(v, dtype, count, (char *)y + start * (dtype == FLOAT32 ? 4 : 2));
    }
}

/* dx = r (w dy - n mean(w dy n)) with n = r x; and dw += dy n, unless dw is NULL. */
static void rms_norm_row_backward(const void *x, const void *dy, int dtype, const float *w, int64_t D, float r, void *dx, float *dw) {
    float v[NORM_CHUNK], g[NORM_CHUNK], sums[LOGIT_LANES] = {0};
    for (int64_t start = 0; start < D; start += NORM_CHUNK) {
        const int64_t count = widen_chunk(x, dtype, D, start, v);
        widen_chunk(dy, dtype, D, start, g);
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) sums[j] += g[i + j] * w[start + i + j] * (v[i + j] * r);
        if (dw)
            for (int64_t i = 0; i < count; i++) dw[start + i] += g[i] * (v[i] * r);
    }
    const float mean = lanes_sum(sums) / D;
    for (int64_t start = 0; start < D; start += NORM_CHUNK) {
        const int64_t count = D > NORM_CHUNK ? widen_chunk(x, dtype, D, start, v) : D;
        if (D > NORM_CHUNK) widen_chunk(dy, dtype, D, start, g);
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) g[i + j] = (g[i + j] * w[start + i + j] - v[i + j] * r * mean) * r;
        narrow(g, dtype, count, (char *)dx + start * (dtype == FLOAT32 ? 4 : 2));
    }
}
