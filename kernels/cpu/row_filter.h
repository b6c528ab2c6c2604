/* What temperature, top-k and top-p leave of a row of logits (kernels/logit_filter.py). Part of template.h, after swiglu.h.
 *
 * One pass over the row finds its largest logit, its mass and the largest of each group: lane j of a chunk, every LOGIT_LANES-th of
 * LOGIT_CHUNK logits. The k-th of the groups' largest, or the one where their mass alone reaches top_p, is below the true threshold and
 * seldom by much; the groups that reach it hold all that may be kept, and only these are looked at again. */

static const float LARGEST_LOGIT = 3.0e38f;
enum { NEAR = 8, EXACT = INT32_MAX }; /* steps of a search */

/* exp((z - top) / T); 0 for NaN and below exp(-87). +inf counts as the top. The power of two is added to the bits. */
static inline float weight_of(float z, float top, float inverse_temperature) {
    const float given = (z - top) * inverse_temperature;
    float x = given < 0.0f ? given : 0.0f;
    x = x > -87.0f ? x : -87.0f;
    uint32_t n;
    const float p = exp_parts(x, &n);
    return given > -87.0f ? bits_float(float_bits(p) + (n << 23)) : 0.0f;
}

static inline float lanes_max(const float *lanes) {
    float part[LOGIT_LANES];
    memcpy(part, lanes, sizeof part);
    for (int width = LOGIT_LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) part[j] = part[j + width] > part[j] ? part[j + width] : part[j];
    return part[0];
}

/* The largest by lane of `count` values, whole lanes; NaN is passed over. Returns the largest of all. */
static inline float lanes_largest(const float *x, int64_t count, float *tops) {
    float top[LOGIT_LANES];
    for (int j = 0; j < LOGIT_LANES; j++) top[j] = -INFINITY;
    for (int64_t i = 0; i < count; i += LOGIT_LANES)
        for (int j = 0; j < LOGIT_LANES; j++) top[j] = x[i + j] > top[j] ? x[i + j] : top[j];
    for (int j = 0; j < LOGIT_LANES; j++) {
        top[j] = top[j] < LARGEST_LOGIT ? top[j] : LARGEST_LOGIT;
        top[j] = top[j] > -LARGEST_LOGIT ? top[j] : -INFINITY;
    }
    memcpy(tops, top, sizeof top);
    return lanes_max(top);
}

/* The first of the largest logits; -1 where none is finite. */
static int64_t first_largest(const void *z, int dtype, int64_t V) {
    float x[LOGIT_CHUNK], tops[LOGIT_LANES], top = -INFINITY;
    int64_t chunk = -1;
    for (int64_t start = 0; start < V; start += LOGIT_CHUNK) {
        const float here = lanes_largest(x, widen_logits(z, dtype, V, start, x), tops);
        if (here > top) top = here, chunk = start;
    }
    if (chunk < 0) return -1;
    while (!(load_float(z, dtype, chunk) >= top)) chunk++;
    return chunk;
}

/* `groups`, unless NULL: (ceil(V / LOGIT_CHUNK), LOGIT_LANES). */
static void read_row(sampled_row *r, float *groups, int mass) {
    float x[LOGIT_CHUNK], tops[LOGIT_LANES];
    r->top = -INFINITY, r->total = 0;
    for (int64_t start = 0; start < r->V; start += LOGIT_CHUNK) {
        const int64_t count = widen_logits(r->z, r->dtype, r->V, start, x);
        const float here = lanes_largest(x, count, tops);
        if (groups) memcpy(groups + start / LOGIT_CHUNK * LOGIT_LANES, tops, sizeof tops);
        if (here > r->top) {
            r->total *= exp(((double)r->top - here) * r->inverse_temperature);
            r->top = here;
        }
        if (!mass || r->top == -INFINITY) continue;
        float sums[LOGIT_LANES] = {0};
        for (int64_t i = 0; i < count; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) sums[j] += weight_of(x[i + j], r->top, r->inverse_temperature);
        r->total += lanes_sum(sums);
    }
}

/* The sum of n weights, padded with zeros to whole lanes; and that of those whose value is above `least`. */
static double sum_above(const float *values, const float *weights, int64_t n, float least) {
    double total = 0;
    for (int64_t start = 0; start < n; start += LOGIT_CHUNK) {
        const int64_t stop = n - start < LOGIT_CHUNK ? n : start + LOGIT_CHUNK;
        float sums[LOGIT_LANES] = {0};
        for (int64_t i = start; i < stop; i += LOGIT_LANES)
            for (int j = 0; j < LOGIT_LANES; j++) sums[j] += values[i + j] > least ? weights[i + j] : 0.0f;
        total += lanes_sum(sums);
    }
    return total;
}

/* The largest value that does not exceed `most`, and the least above `least`. */
static float largest_up_to(const float *values, int64_t n, float most) {
    float found[LOGIT_LANES];
    for (int j = 0; j < LOGIT_LANES; j++) found[j] = -INFINITY;
    for (int64_t i = 0; i < n; i += LOGIT_LANES)
        for (int j = 0; j < LOGIT_LANES; j++) {
            const float v = values[i + j] <= most ? values[i + j] : -INFINITY;
            found[j] = v > found[j] ? v : found[j];
        }
    return lanes_max(found);
}
static float least_above(const float *values, int64_t n, float least) {
    float found[LOGIT_LANES];
    for (int j = 0; j < LOGIT_LANES; j++) found[j] = -INFINITY;
    for (int64_t i = 0; i < n; i += LOGIT_LANES)
        for (int j = 0; j < LOGIT_LANES; j++) {
            const float v = values[i + j] > least ? -values[i + j] : -INFINITY;
            found[j] = v > found[j] ? v : found[j];
        }
    return -lanes_max(found);
}

/* The least of n finite values that has less than `limit` of the weights above it; padded with -INFINITY and 0 to whole lanes. Found
 * by halving between values that are there: after `steps` of it what is returned is one of them, not above the one wanted. */
static float least_of(const float *values, const float *weights, int64_t n, double limit, int steps) {
    float low = least_above(values, n, -INFINITY), high = largest_up_to(values, n, INFINITY);
    for (; low < high && steps; steps--) {
        const float half = low + (high - low) * 0.5f, middle = half < high ? half : low;
        if (sum_above(values, weights, n, middle) < limit) high = largest_up_to(values, n, middle);
        else low = least_above(values, n, middle);
    }
    return low;
}

/* Lists the finite logits that reach `least`, padded; returns how many. */
static int64_t list_words(sampled_row *r, const float *groups, float least) {
    float x[LOGIT_CHUNK];
    int64_t n = 0;
    least = least > -LARGEST_LOGIT ? least : -LARGEST_LOGIT;
    for (int64_t start = 0; start < r->V; start += LOGIT_CHUNK, groups += LOGIT_LANES) {
        int64_t count = 0;
        for (int j = 0; j < LOGIT_LANES; j++) {
            if (!(groups[j] >= least)) continue;
            if (!count) count = widen_logits(r->z, r->dtype, r->V, start, x);
            for (int64_t i = j; i < count; i += LOGIT_LANES) { /* no branch: nothing to predict */
                r->values[n] = x[i] < LARGEST_LOGIT ? x[i] : LARGEST_LOGIT;
                r->ids[n] = (int32_t)(start + i);
                n += x[i] >= least;
            }
        }
    }
    return n;
}

static void pad_list(float *values, float *weights, int64_t n) {
    for (; n % LOGIT_LANES; n++) values[n] = -INFINITY, weights[n] = 0;
}

/* Keeps the listed words that reach `threshold`. */
static void keep_words(sampled_row *r, float threshold) {
    int64_t n = 0;
    for (int64_t i = 0; i < r->kept; i++) {
        const float value = r->values[i];
        r->values[n] = value, r->weights[n] = r->weights[i], r->ids[n] = r->ids[i];
        n += value >= threshold;
    }
    r->kept = n;
    r->threshold = threshold;
    pad_list(r->values, r->weights, n);
    r->total = sum_above(r->values, r->weights, n, -INFINITY);
}

/* Fills in what follows r->temperature; top_k 0 and top_p 1 are off. memory: filter_room(V) floats, which hold the list. */
static void filter_row(sampled_row *r, int64_t top_k, double top_p, float *memory) {
    const int by_count = top_k > 0 && top_k < r->V, by_mass = top_p < 1;
    const int64_t groups_count = ceil_div(r->V, LOGIT_CHUNK) * LOGIT_LANES;
    float *groups = memory, *group_weights = groups + groups_count, least = -INFINITY;
    const double inverse = 1 / r->temperature;
    r->inverse_temperature = inverse < LARGEST_LOGIT ? (float)inverse : LARGEST_LOGIT;
    r->threshold = -INFINITY, r->kept = -1;
    r->values = group_weights + groups_count, r->weights = r->values + r->V + LOGIT_LANES;
    r->ids = (int32_t *)(r->weights + r->V + LOGIT_LANES);
    read_row(r, by_count || by_mass ? groups : NULL, !by_count);
    if (r->top == -INFINITY || !(by_count || by_mass)) return;
    for (int64_t g = 0; g < groups_count; g++)
        group_weights[g] = by_count ? (groups[g] > -INFINITY ? 1.0f : 0.0f) : weight_of(groups[g], r->top, r->inverse_temperature);
    const double limit = by_count ? (double)top_k : top_p * r->total;
    if (sum_above(groups, group_weights, groups_count, -INFINITY) >= limit)
        least = least_of(groups, group_weights, groups_count, limit, NEAR);
    r->kept = list_words(r, groups, least);
    pad_list(r->values, r->weights, r->kept);
    if (by_count) {
        for (int64_t i = 0; i < r->kept; i++) r->weights[i] = 1;
        if (r->kept >= top_k) r->threshold = least_of(r->values, r->weights, r->kept, limit, EXACT);
    }
    for (int64_t i = 0; i < r->kept; i++) r->weights[i] = weight_of(r->values[i], r->top, r->inverse_temperature);
    if (by_count) keep_words(r, r->threshold);
    if (by_mass) keep_words(r, least_of(r->values, r->weights, r->kept, top_p * r->total, EXACT));
}
