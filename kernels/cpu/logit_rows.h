/* A row of logits to log p, entropy and, in place, onehot - softmax (kernels/logit_rows.py). Part of template.h: the loops over lanes
 * become vectors of the instruction set. Sums are online by chunks that stay in the first-level cache. */

enum { LOGIT_LANES = 64, LOGIT_CHUNK = 32 * LOGIT_LANES };

/* exp(x) for x <= 0, 0 below -87; a NaN stays. 2^n by the exponent's bits times a polynomial in the rest, off by 2 units at most. */
static inline float exp_down(float given) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits */
    float x = given < -87.0f ? -87.0f : given;
    float shifted = x * 1.44269504f + magic, n = shifted - magic;
    float f = x - n * 0.693359375f; /* ln 2 in two parts, the first of few digits: the product is exact */
    f = f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    p *= bits_float((float_bits(shifted) + 127) << 23);
    return given < -87.0f ? 0.0f : p;
}

static float lanes_sum(const float *lanes) {
    float part[LOGIT_LANES];
    memcpy(part, lanes, sizeof part);
    for (int width = LOGIT_LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) part[j] += part[j + width];
    return part[0];
}

static int64_t widen_logits(const void *z, int dtype, int64_t V, int64_t start, float *out) {
    int64_t count = V - start < LOGIT_CHUNK ? V - start : LOGIT_CHUNK, padded = ceil_div(count, LOGIT_LANES) * LOGIT_LANES;
    widen((const char *)z + start * (dtype == FLOAT32 ? 4 : 2), dtype, count, out);
    for (int64_t i = count; i < padded; i++) out[i] = -INFINITY;
    return padded;
}

static void logit_row(void *z, int dtype, int64_t V, int64_t label, int gradient, float *logprob, float *entropy) {
    float x[LOGIT_CHUNK], sums[LOGIT_LANES] = {0}, moments[LOGIT_LANES] = {0}, top = -3e38f;
    for (int64_t start = 0; start < V; start += LOGIT_CHUNK) {
        const int64_t count = widen_logits(z, dtype, V, start, x);
        float tops[LOGIT_LANES], new_top = top;
        memcpy(tops, x, sizeof tops);
        for (int64_t i = LOGIT_LANES; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) tops[j] = x[i + j] > tops[j] ? x[i + j] : tops[j];
        for (int j = 0; j < LOGIT_LANES; j++) new_top = tops[j] > new_top ? tops[j] : new_top;
        if (new_top > top) {
            const float scale = exp_down(top - new_top), shift = top - new_top < -87.0f ? -87.0f : top - new_top;
            for (int j = 0; j < LOGIT_LANES; j++) moments[j] = (moments[j] + sums[j] * shift) * scale, sums[j] *= scale;
            top = new_top;
        }
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) {
                float below = x[i + j] - top, e = exp_down(below);
                sums[j] += e;
                if (entropy) moments[j] += e * (below < -87.0f ? -87.0f : below);
            }
    }
    const float total = lanes_sum(sums), inverse = 1.0f / total;
    *logprob = (load_float(z, dtype, label) - top) - logf(total);
    if (entropy) *entropy = logf(total) - lanes_sum(moments) / total;
    if (!gradient) return;
    for (int64_t start = 0; start < V; start += LOGIT_CHUNK) {
        const int64_t count = widen_logits(z, dtype, V, start, x);
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) x[i + j] = -exp_down(x[i + j] - top) * inverse;
        if (label >= start && label < start + LOGIT_CHUNK) x[label - start] += 1.0f;
        narrow(x, dtype, V - start < LOGIT_CHUNK ? V - start : LOGIT_CHUNK, (char *)z + start * (dtype == FLOAT32 ? 4 : 2));
    }
}
