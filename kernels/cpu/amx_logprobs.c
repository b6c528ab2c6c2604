/* Log-probabilities of labels through a head of bfloat16 or in 4 bits, and the direction of their gradient, with AMX. No logit leaves
 * the second-level cache.
 *
 *     z = h W^T + bias     e_v = exp(z_v - top)     log p = z_label - top - log sum e     direction = W[label] - sum e_v W_v / sum e
 *
 * This is attention whose keys and values are both W. Some words of W at a time are packed, once as the right factor of z and once as
 * that of the direction; every block of 32 rows of h goes through them, and keeps its largest logit so far (top), its sum of
 * exponentials and, in float32, its sum of e_v W_v, scaled down where a larger logit comes (Milakov and Gimelshein, arXiv:1805.02867).
 * The label's own term stays out of both sums until the end: with p its probability, the direction is (1 - p) W[label] less the
 * others' share, and no 1 - p is found as a difference.
 *
 * Flops: 2 N V H, and as many for the direction. Bytes: W once for all the rows whose sums SUM_BYTES hold, h once for some words, the
 * sums of the direction read and written as often. Every row is one thread's at a time, the words in their order. */
#include "native.h"
#include "many_rows.h"

typedef struct {
    const uint16_t *hidden;      /* (N, H) */
    const int64_t *labels;       /* (N,) */
    float *logprobs, *entropies; /* (N,); entropies NULL where not wanted */
    uint16_t *direction;         /* (N, H), or NULL */
    void *workspace;             /* logprobs_bytes() */
    int64_t N, H, ignore_index, threads;
    many_rows_layer head; /* W (V, H), its N being V, and bias */
} logprobs_args;

#if defined(__x86_64__) && defined(__linux__)
#include <math.h>

#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prfchw")
#include "amx_base.h"
#include "exp512.h"

/* W's packed words leave the second-level cache room for a block's sums; the sums of the rows that share W's packing lie behind it. */
enum { WORD_BYTES = 3 << 18, SUM_BYTES = 1 << 24 };
static const float LOWEST = -3e38f;

/* Of one row, so far. `others` and `moment` are the sums of e_v and e_v (z_v - top) over all words but the label. */
typedef struct {
    float top[BLOCK], others[BLOCK], moment[BLOCK], label[BLOCK];
} row_state;

typedef struct {
    const logprobs_args *args;
    weight base;
    int64_t h_steps;               /* of a logit's sum; and panels of the direction */
    int64_t panels, most_panels;   /* of 32 words: all, and at a time */
    int64_t blocks, most_blocks;   /* of 32 rows: all, and at a time */
    int64_t first_panel, last_panel, first_block, last_block;
    uint16_t *of_z, *of_direction; /* right factors [panel][step of H] and [panel of H][step of words] */
    float *sums;                   /* [block][panel of H] sums of e_v W_v */
    row_state *rows;               /* [block] */
    int64_t next;
    int failed;
} logprobs_job;

static int64_t set_up(logprobs_job *j, const logprobs_args *a) {
    *j = (logprobs_job){.args = a, .base = base_of(&a->head), .h_steps = steps_of(a->H)};
    const int64_t step = STEP * sizeof(uint16_t), factors = a->direction ? 2 : 1, of_block = j->h_steps * SUMS * sizeof(float);
    j->panels = steps_of(a->head.N), j->blocks = steps_of(a->N);
    const int64_t panels = WORD_BYTES / (factors * j->h_steps * step), blocks = SUM_BYTES / of_block;
    j->most_panels = at_most(j->panels, panels ? panels : 1);
    j->most_blocks = at_most(j->blocks, a->direction && blocks ? blocks : j->blocks);
    char *at = a->workspace;
    j->of_z = (uint16_t *)at, at += j->most_panels * j->h_steps * step;
    j->of_direction = (uint16_t *)at, at += a->direction ? j->most_panels * j->h_steps * step : 0;
    j->sums = (float *)at, at += a->direction ? j->most_blocks * of_block : 0;
    j->rows = (row_state *)at, at += j->most_blocks * sizeof(row_state);
    return at - (char *)a->workspace;
}

static void run_units(logprobs_job *j, task function) {
    j->next = 0;
    run_parallel(function, j, j->args->threads);
}

/* A panel's words a unit. */
static void pack_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    logprobs_job *j = context;
    const int64_t H = j->args->H, count = j->last_panel - j->first_panel;
    uint16_t room[BLOCK * PIECE] __attribute__((aligned(64)));
    for (int64_t p; (p = take_unit(&j->next)) < count;)
        for (int64_t k = 0; k < H; k += PIECE) {
            const factor words = rows_of_base(&j->args->head, &j->base, (j->first_panel + p) * BLOCK, BLOCK, H, k, at_most(H - k, PIECE), room);
            pack_transposed(&words, 0, j->of_z + (p * j->h_steps + k / 32) * STEP);
            if (j->args->direction)
                pack_step(&words, 0, 0, words.columns, j->of_direction + (k / 32 * count + p) * STEP, count * STEP);
        }
}

/* Of 32 rows' logits [panel][SUMS], the row r's of panel p begin here; the second half of its 32 lies 256 further. */
static inline float *logits_of(float *z, int64_t p, int64_t r) { return z + p * SUMS + r / 16 * 512 + r % 16 * 16; }

static void add_bias(const uint16_t *bias, int64_t words, float *z, int64_t panels) {
    for (int64_t p = 0; p < panels; p++) {
        const __mmask32 kept = first_words(words - p * BLOCK);
        const __m512 low = widened(bias + p * BLOCK, (__mmask16)kept), high = widened(bias + p * BLOCK + 16, (__mmask16)(kept >> 16));
        for (int64_t r = 0; r < BLOCK; r++) {
            float *at = logits_of(z, p, r);
            _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), low));
            _mm512_store_ps(at + 256, _mm512_add_ps(_mm512_load_ps(at + 256), high));
        }
    }
}

static void hide_words_from(int64_t words, float *z, int64_t panels) {
    for (int64_t v = words; v < panels * BLOCK; v++)
        for (int64_t r = 0; r < BLOCK; r++) logits_of(z, v / BLOCK, r)[v % BLOCK / 16 * 256 + v % 16] = -INFINITY;
}

/* The rows' largest logits. A NaN is none, but what is computed with it stays one. */
static void find_tops(const float *z, int64_t panels, float *tops) {
    for (int half = 0; half < 2; half++) {
        __m512 most[16];
        for (int r = 0; r < 16; r++) most[r] = _mm512_set1_ps(tops[16 * half + r]);
        for (int64_t p = 0; p < panels; p++)
            for (int r = 0; r < 16; r++) {
                const float *at = z + p * SUMS + half * 512 + r * 16;
                most[r] = _mm512_max_ps(_mm512_load_ps(at + 256), _mm512_max_ps(_mm512_load_ps(at), most[r]));
            }
        for (int r = 0; r < 16; r++) tops[16 * half + r] = _mm512_reduce_max_ps(most[r]);
    }
}

/* Logits to exponentials below their row's top, as a left factor over the words; their sums, and those of e (z - top), are added. */
static inline __attribute__((always_inline)) void soften(const float *z, int64_t panels, uint16_t *e, row_state *s, int entropy) {
    for (int half = 0; half < 2; half++) {
        __m512 sums[16], moments[16];
        for (int r = 0; r < 16; r++) sums[r] = moments[r] = _mm512_setzero_ps();
        for (int64_t p = 0; p < panels; p++)
            for (int r = 0; r < 16; r++) {
                const float *at = z + p * SUMS + half * 512 + r * 16;
                const __m512 top = _mm512_set1_ps(s->top[16 * half + r]);
                const __m512 a = at_least_104(_mm512_sub_ps(_mm512_load_ps(at), top));
                const __m512 b = at_least_104(_mm512_sub_ps(_mm512_load_ps(at + 256), top));
                const __m512 ea = exp512(a), eb = exp512(b);
                sums[r] = _mm512_add_ps(sums[r], _mm512_add_ps(ea, eb));
                if (entropy) moments[r] = _mm512_fmadd_ps(ea, a, _mm512_fmadd_ps(eb, b, moments[r]));
                _mm512_store_si512(e + p * STEP + half * TILE + r * 32, (__m512i)_mm512_cvtne2ps_pbh(eb, ea));
            }
        for (int r = 0; r < 16; r++) {
            s->others[16 * half + r] += _mm512_reduce_add_ps(sums[r]);
            if (entropy) s->moment[16 * half + r] += _mm512_reduce_add_ps(moments[r]);
        }
    }
}

/* A larger top makes everything before it smaller: all but the direction's sums, for which `scale` is left. Returns whether any is. */
static int rescale(row_state *s, const float *tops, float *scale) {
    float shift[BLOCK] __attribute__((aligned(64)));
    int changed = 0;
    for (int r = 0; r < BLOCK; r += 16) {
        const __m512 before = _mm512_loadu_ps(s->top + r), after = _mm512_loadu_ps(tops + r);
        const __m512 below = at_least_104(_mm512_sub_ps(before, after));
        changed |= _mm512_cmpneq_ps_mask(before, after);
        _mm512_store_ps(shift + r, below);
        _mm512_store_ps(scale + r, exp512(below));
    }
    for (int r = 0; r < BLOCK && changed; r++) {
        s->moment[r] = (s->moment[r] + s->others[r] * shift[r]) * scale[r];
        s->others[r] *= scale[r];
        s->top[r] = tops[r];
    }
    return changed;
}

static void scale_sums(float *sums, const float *scale) {
    for (int r = 0; r < BLOCK; r++) {
        float *at = logits_of(sums, 0, r);
        const __m512 by = _mm512_set1_ps(scale[r]);
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
        _mm512_store_ps(at + 256, _mm512_mul_ps(_mm512_load_ps(at + 256), by));
    }
}

/* The labels' logits are kept and leave the others. */
static void take_labels(const logprobs_job *j, int64_t block, int64_t word, int64_t words, float *z, row_state *s) {
    const logprobs_args *a = j->args;
    for (int64_t r = 0; r < at_most(a->N - block * BLOCK, BLOCK); r++) {
        const int64_t v = a->labels[block * BLOCK + r] - word;
        if (v < 0 || v >= words) continue;
        float *at = logits_of(z, v / BLOCK, r) + v % BLOCK / 16 * 256 + v % 16;
        s->label[r] = *at;
        *at = -INFINITY;
    }
}

/* Blocks of rows through the words of this pass. */
static void product_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    logprobs_job *j = context;
    const logprobs_args *a = j->args;
    const int64_t panels = j->last_panel - j->first_panel, word = j->first_panel * BLOCK, words = at_most(a->head.N - word, panels * BLOCK);
    float *z = scratch(0, panels * SUMS * sizeof(float));
    uint16_t *e = scratch(1, panels * STEP * sizeof(uint16_t)), *room = scratch(2, j->h_steps * STEP * sizeof(uint16_t));
    if (!z || !e || !room) {
        j->failed = 1;
        return;
    }
    const factor hidden = {.values = a->hidden, .stride = a->H, .rows = a->N, .columns = a->H};
    float tops[BLOCK], scale[BLOCK] __attribute__((aligned(64)));
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | SUBNORMALS_ARE_ZERO);
    configure_tiles(16, 16);
    for (int64_t b; (b = j->first_block + take_unit(&j->next)) < j->last_block;) {
        row_state *s = &j->rows[b - j->first_block];
        const left_steps h = block_of(&hidden, b * BLOCK, room);
        for (int64_t p = 0; p < panels; p++) {
            clear_sums();
            multiply(h, j->of_z + p * j->h_steps * STEP);
            put_sums(z + p * SUMS);
        }
        if (a->head.bias) add_bias(a->head.bias + word, words, z, panels);
        hide_words_from(words, z, panels);
        memcpy(tops, s->top, sizeof tops);
        find_tops(z, panels, tops);
        take_labels(j, b, word, words, z, s);
        const int changed = rescale(s, tops, scale);
        if (a->entropies) soften(z, panels, e, s, 1);
        else soften(z, panels, e, s, 0);
        for (int64_t q = 0; q < j->h_steps && a->direction; q++) {
            float *sums = j->sums + ((b - j->first_block) * j->h_steps + q) * SUMS;
            if (changed) scale_sums(sums, scale);
            fetch_sums(sums);
            multiply(packed_steps(e, panels), j->of_direction + q * panels * STEP);
            put_sums(sums);
        }
    }
    _tile_release();
    _mm_setcsr(before);
}

/* direction = (1 - p) W[label] - the others' e_v W_v / sum e. */
static void put_direction(const logprobs_job *j, int64_t n, float others, float all, const float *sums, uint16_t *room) {
    const logprobs_args *a = j->args;
    const __m512 own = _mm512_set1_ps(others / all), share = _mm512_set1_ps(1.0f / all);
    for (int64_t k = 0; k < a->H; k += PIECE) {
        const factor w = rows_of_base(&a->head, &j->base, a->labels[n], 1, a->H, k, at_most(a->H - k, PIECE), room);
        for (int64_t c = 0; c < w.columns; c += 16) {
            const __mmask16 kept = (__mmask16)first_words(w.columns - c);
            const float *at = sums + (k + c) / BLOCK * SUMS + (k + c) % BLOCK / 16 * 256;
            const __m512 d = _mm512_fmsub_ps(own, widened(w.values + c, kept), _mm512_mul_ps(share, _mm512_load_ps(at)));
            _mm256_mask_storeu_epi16(a->direction + n * a->H + k + c, kept, (__m256i)_mm512_cvtneps_pbh(d));
        }
    }
}

/* Blocks of rows whose words have all been seen. */
static void finish_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    logprobs_job *j = context;
    const logprobs_args *a = j->args;
    uint16_t room[BLOCK * PIECE] __attribute__((aligned(64)));
    for (int64_t b; (b = j->first_block + take_unit(&j->next)) < j->last_block;)
        for (int64_t r = 0, n = b * BLOCK; r < BLOCK && n < a->N; r++, n++) {
            const row_state *s = &j->rows[b - j->first_block];
            const float below = s->label[r] - s->top[r], e = expf(below), all = s->others[r] + e;
            const int ignored = a->labels[n] == a->ignore_index;
            a->logprobs[n] = ignored ? 0 : below - logf(all);
            if (a->entropies) a->entropies[n] = ignored ? 0 : logf(all) - (s->moment[r] + (e > 0 ? e * below : 0)) / all;
            if (!a->direction) continue;
            if (ignored) memset(a->direction + n * a->H, 0, a->H * sizeof(uint16_t));
            else put_direction(j, n, s->others[r], all, logits_of(j->sums + (b - j->first_block) * j->h_steps * SUMS, 0, r), room);
        }
}

int64_t logprobs_bytes(const logprobs_args *a) {
    logprobs_job j;
    return set_up(&j, a);
}

int linear_logprobs(const logprobs_args *a) {
    logprobs_job j;
    set_up(&j, a);
    for (; j.first_block < j.blocks && !j.failed; j.first_block = j.last_block) {
        j.last_block = at_most(j.first_block + j.most_blocks, j.blocks);
        const int64_t blocks = j.last_block - j.first_block;
        for (int64_t b = 0; b < blocks; b++) {
            j.rows[b] = (row_state){0};
            for (int r = 0; r < BLOCK; r++) j.rows[b].top[r] = LOWEST;
        }
        if (a->direction) memset(j.sums, 0, blocks * j.h_steps * SUMS * sizeof(float));
        for (j.first_panel = 0; j.first_panel < j.panels && !j.failed; j.first_panel = j.last_panel) {
            j.last_panel = at_most(j.first_panel + j.most_panels, j.panels);
            run_units(&j, pack_task);
            run_units(&j, product_task);
        }
        if (!j.failed) run_units(&j, finish_task);
    }
    return -j.failed;
}
END_TARGET
#else
int64_t logprobs_bytes(const logprobs_args *a) { return (void)a, 0; }
int linear_logprobs(const logprobs_args *a) { return (void)a, -1; }
#endif
