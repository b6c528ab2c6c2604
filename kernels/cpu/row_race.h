/* Draws from what is left of a row: argmax of weight / E, E standard exponential, which is log weight + Gumbel noise without logarithms
 * of weights (kernels/spec_verify.py). Part of template.h, after row_filter.h and swiglu.h. A filtered row is its list of kept words; no
 * other is looked at, and no noise made for it. */

enum { RACE_BLOCK = 1024 };

/* log2 of a normal x > 0, relative to its own size within 1.2e-6 also near 1, where x_minus_1 tells more: as in kernels/_spec_noise.py. */
static inline float log2_near(float x, float x_minus_1) {
    const uint32_t bits = float_bits(x), exponent = (bits - 0x3F3504F3) & 0xFF800000;
    const float y = exponent ? bits_float(bits - exponent) - 1.0f : x_minus_1;
    float p = MULTIPLY_ADD(y, 0.1716243624687195f, -0.2693201303482056f);
    p = MULTIPLY_ADD(y, p, 0.2956995368003845f);
    p = MULTIPLY_ADD(y, p, -0.3593716621398926f);
    p = MULTIPLY_ADD(y, p, 0.4806267619132996f);
    p = MULTIPLY_ADD(y, p, -0.7213636040687561f);
    p = MULTIPLY_ADD(y, p, 1.442696452140808f);
    return (float)(int32_t)exponent * 0x1p-23f + y * p;
}

/* v in (0, 1) of a word, with all its bits where v is small; and E / ln 2 = -log2(1 - v), no less than v / ln 2. */
static inline float uniform_of(uint32_t word) {
    const float v = ((float)word + 0.5f) * 0x1p-32f;
    return v < 1.0f - 0x1p-24f ? v : 1.0f - 0x1p-24f;
}
static inline float waiting_time(uint32_t word) { return -log2_near(1.0f - uniform_of(word), -uniform_of(word)); }

/* Words of noise for tokens start .. start + RACE_BLOCK - 1, start a multiple of 4: philox of sampled_row.h with a counter in each 64
 * bits, of whose words the upper halves are anything. */
static void words_from(const race_noise *noise, int64_t start, uint32_t *words) {
    enum { LANES = W / 2 };
    const vq m0 = (vq){0} + 0xD2511F53u, m1 = (vq){0} + 0xCD9E8D57u, low = (vq){0} + 0xFFFFFFFFu;
    uint64_t first[RACE_BLOCK / 4], second[RACE_BLOCK / 4], out[RACE_BLOCK / 2];
    vq counters;
    for (int j = 0; j < LANES; j++) counters[j] = (uint64_t)start / 4 + j;
    for (int i = 0; i < RACE_BLOCK / 4; i += LANES, counters += LANES) {
        vq c0 = counters, c1 = (vq){0} + DRAW_STREAM, c2 = (vq){0} + noise->offset, c3 = c2 >> 32;
        uint32_t k0 = (uint32_t)noise->seed, k1 = (uint32_t)(noise->seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
            const vq a = vq_mul(c0, m0), b = vq_mul(c2, m1);
            c0 = (b >> 32) ^ c1 ^ k0, c1 = b, c2 = (a >> 32) ^ c3 ^ k1, c3 = a;
        }
        const vq even = (c0 & low) | c1 << 32, odd = (c2 & low) | c3 << 32;
        memcpy(first + i, &even, sizeof even), memcpy(second + i, &odd, sizeof odd);
    }
    for (int i = 0; i < RACE_BLOCK / 4; i++) out[2 * i] = first[i], out[2 * i + 1] = second[i];
    memcpy(words, out, sizeof out);
}

static void words_of(const race_noise *noise, const int32_t *ids, int64_t count, uint32_t *words) {
    const uint64_t key = noise->seed;
    const uint32_t low = (uint32_t)noise->offset, high = (uint32_t)(noise->offset >> 32);
    for (int64_t i = 0; i < count; i++) {
        const philox_words w = philox((uint32_t)ids[i] / 4, DRAW_STREAM, low, high, key);
        const uint32_t even = ids[i] & 2 ? w.c2 : w.c0, odd = ids[i] & 2 ? w.c3 : w.c1;
        words[i] = ids[i] & 1 ? odd : even;
    }
}

/* Weights of RACE_BLOCK words from place `start` on, of p's list or of all words; returns how many, padded with zeros to whole lanes. */
static int64_t leftover_block(const leftover *r, int64_t start, float *w) {
    const sampled_row *p = r->p, *q = r->q;
    const int listed = p->kept >= 0;
    const int64_t left = (listed ? p->kept : p->V) - start, count = left < RACE_BLOCK ? left : RACE_BLOCK;
    const int64_t padded = ceil_div(count, LOGIT_LANES) * LOGIT_LANES;
    float other[RACE_BLOCK];
    if (listed) memcpy(w, p->weights + start, count * sizeof(float));
    else {
        widen((const char *)p->z + start * (p->dtype == FLOAT32 ? 4 : 2), p->dtype, count, w);
        for (int64_t i = 0; i < count; i++) w[i] = weight_of(w[i], p->top, p->inverse_temperature);
    }
    memset(w + count, 0, (padded - count) * sizeof(float));
    if (q) {
        const float by_p = (float)(1 / p->total), by_q = (float)(r->factor / q->total), threshold = q->threshold;
        if (listed)
            for (int64_t i = 0; i < count; i++) {
                const int32_t id = p->ids[start + i];
                other[i] = id < q->V ? load_float(q->z, q->dtype, id) : -INFINITY;
            }
        else {
            const int64_t both = q->V - start < 0 ? 0 : q->V - start < count ? q->V - start : count;
            widen((const char *)q->z + start * (q->dtype == FLOAT32 ? 4 : 2), q->dtype, both, other);
            for (int64_t i = both; i < count; i++) other[i] = -INFINITY;
        }
        for (int64_t i = 0; i < count; i++) {
            const float z = other[i] >= threshold ? other[i] : -INFINITY;
            const float taken = weight_of(z, q->top, q->inverse_temperature),
                        rest = w[i] * by_p - taken * by_q;
            w[i] = rest > 0.0f ? rest : 0.0f;
        }
    }
    for (int64_t n = 0; n < r->without_count; n++) {
        const int64_t at = r->without[n] - start;
        if (listed)
            for (int64_t i = 0; i < count; i++) w[i] = p->ids[start + i] == r->without[n] ? 0.0f : w[i];
        else if (at >= 0 && at < count) w[at] = 0;
    }
    return count;
}

static int64_t places(const sampled_row *p) { return p->kept >= 0 ? p->kept : p->V; }

/* The sum of the weights; of p's own where q is NULL, exp((z - top) / T). */
static double leftover_mass(const leftover *r) {
    double total = 0;
    float w[RACE_BLOCK];
    for (int64_t start = 0; start < places(r->p); start += RACE_BLOCK) {
        const int64_t count = leftover_block(r, start, w);
        float sums[LOGIT_LANES] = {0};
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) sums[j] += w[i + j];
        total += lanes_sum(sums);
    }
    return total;
}

/* The winner, the first of equals; -1 where no weight is positive. */
static int64_t race(const leftover *r, const race_noise *noise) {
    const sampled_row *p = r->p;
    const int listed = p->kept >= 0;
    float w[RACE_BLOCK], tops[LOGIT_LANES];
    uint32_t words[RACE_BLOCK];
    double best = 0;
    int64_t winner = -1;
    for (int64_t start = 0; start < places(p); start += RACE_BLOCK) {
        const int64_t count = leftover_block(r, start, w), padded = ceil_div(count, LOGIT_LANES) * LOGIT_LANES;
        if (noise->gumbel) {
            for (int64_t i = 0; i < count; i++) {
                if (!(w[i] > 0)) continue;
                const int64_t id = listed ? p->ids[start + i] : start + i;
                const double score = log(w[i]) + noise->gumbel[id];
                if (winner < 0 || score > best || (score == best && id < winner)) best = score, winner = id;
            }
            continue;
        }
        if (listed) words_of(noise, p->ids + start, count, words);
        else words_from(noise, start, words);
        int may_win = 0; /* weight / E above the best of earlier blocks, by the least E may be: few blocks, and no other needs logarithms */
        for (int64_t i = 0; i < count; i++) may_win |= w[i] > uniform_of(words[i]) * (float)best;
        if (!may_win) continue;
        for (int64_t i = 0; i < count; i++) w[i] /= waiting_time(words[i]);
        const float top = lanes_largest(w, padded, tops);
        if (!(top > 0) || top < best) continue;
        for (int64_t i = 0; i < count; i++) {
            const int64_t id = listed ? p->ids[start + i] : start + i;
            if (w[i] >= top && (top > best || id < winner)) best = top, winner = id;
        }
    }
    return winner;
}
