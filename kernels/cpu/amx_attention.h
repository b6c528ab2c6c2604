/* What both passes of amx_attention.c are made of: a head's matrices as factors, and what happens between two products. Included
 * under a target with amx-bf16.
 *
 * Scores are made transposed, 32 keys (rows) by 32 queries (columns): a query's maximum and sum are then lanes of a vector, and its
 * statistics a vector that serves all rows. Rows of probabilities are a left factor over queries as they are (dV, dK), and two of them
 * interleaved a right factor over keys (y, dQ), whose products come out transposed and are turned once a block. */
#ifndef POSTTRAIN_AMX_ATTENTION_H
#define POSTTRAIN_AMX_ATTENTION_H

#include "amx_base.h"
#include "attention.h"
#include "exp512.h"

/* Of 32 queries. */
typedef struct {
    float shift[BLOCK], inverse[BLOCK], delta[BLOCK];
} __attribute__((aligned(64))) query_rows;

typedef struct {
    const attention_args *args;
    int64_t blocks, steps; /* of 32 positions, of 32 channels */
    int64_t whole, units;  /* groups of heads that are one unit of work; with the heads of the others */
    int64_t next;          /* unit that is taken next */
    int64_t *done;         /* backward: heads done of each group that is not one unit */
    float *sums;           /* backward: dK and dV of each of these groups' heads, [head][2][block][step] of SUMS */
    int failed;
} attention_job;

/* Of the last groups each head is a unit of its own, so that no thread waits long for the others in the end. */
enum { SPLIT_GROUPS_A_THREAD = 2 };

static int64_t set_up(attention_job *j, const attention_args *a) {
    const int64_t groups = a->B * a->kv_heads, split = at_most(groups, SPLIT_GROUPS_A_THREAD * a->threads);
    const int64_t counts = ceil_div(split, 8) * 8, heads = split * (a->heads / a->kv_heads);
    *j = (attention_job){.args = a, .blocks = ceil_div(a->T, BLOCK), .steps = ceil_div(a->D, BLOCK), .done = a->workspace};
    j->whole = groups - split, j->units = j->whole + heads;
    j->sums = (float *)(j->done + counts);
    return counts * sizeof *j->done + 2 * heads * j->blocks * j->steps * SUMS * sizeof(float);
}

static factor rows_of(const attention_args *a, const head_rows *x, int64_t b, int64_t head) {
    return (factor){.values = x->values + b * x->batch + head * x->head, .stride = x->row, .rows = a->T, .columns = a->D};
}

/* Block `block` of step's columns in a result. */
static place place_of(const attention_args *a, const head_rows *x, int64_t b, int64_t head, int64_t block, int64_t step) {
    uint16_t *values = x->values + b * x->batch + head * x->head + block * BLOCK * x->row + step * BLOCK;
    return (place){values, x->row, at_most(a->T - block * BLOCK, BLOCK), a->D - step * BLOCK};
}

/* Rows that are read soon: each is too short to be found out as a stream. */
static void expect_rows(const factor *f, int64_t row) {
    for (int64_t r = row; r < at_most(row + BLOCK, f->rows); r++)
        for (int64_t c = 0; c < f->columns; c += 32) _mm_prefetch((const char *)(f->values + r * f->stride + c), _MM_HINT_T1);
}

/* A block of a result is written soon. */
static void expect_result(const attention_job *j, const head_rows *x, int64_t b, int64_t head, int64_t block) {
    for (int64_t s = 0; s < j->steps; s++) {
        const place to = place_of(j->args, x, b, head, block, s);
        expect_block(&to);
    }
}

/* All rows as a left factor over channels, [block][step]. */
static void pack_rows(const attention_job *j, const factor *f, uint16_t *out) {
    for (int64_t i = 0; i < j->blocks; i++) {
        expect_rows(f, (i + 1) * BLOCK);
        pack_left(f, i * BLOCK, out + i * j->steps * STEP);
    }
}

/* As a right factor over positions: panels of channels, [step][block]. */
static void pack_positions(const attention_job *j, const factor *f, uint16_t *out) {
    for (int64_t i = 0; i < j->blocks; i++) pack_step(f, i * BLOCK, 0, f->columns, out + i * STEP, j->blocks * STEP);
}

/* Transposed, as a left factor over positions: channels become rows, [step][block]. */
static void pack_channels(const attention_job *j, const factor *f, uint16_t *out) {
    pack_positions(j, f, out);
    for (uint16_t *tile = out; tile < out + j->blocks * j->steps * STEP; tile += TILE) {
        __m512 rows[16];
        transpose16((const float *)tile, 16, rows);
        for (int i = 0; i < 16; i++) _mm512_store_ps((float *)tile + 16 * i, rows[i]);
    }
}

/* Sums of 32 channels by 32 queries, each query's times its scale, to the queries' rows. */
static void put_turned(const float *sums, const place *to, const float *scale) {
    const __mmask32 kept = first_words(to->columns);
    for (int64_t first = 0; first < to->rows; first += 16) {
        __m512 low[16], high[16];
        transpose16(sums + 16 * first, 16, low);
        transpose16(sums + 16 * first + 512, 16, high);
        for (int64_t r = 0; r < 16 && first + r < to->rows; r++) {
            const __m512 factor = _mm512_set1_ps(scale[first + r]);
            const __m512 a = _mm512_mul_ps(low[r], factor), b = _mm512_mul_ps(high[r], factor);
            _mm512_mask_storeu_epi16(to->y + (first + r) * to->stride, kept, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
    }
}

/* Of the block on the diagonal: no query sees a key after its own. */
static void hide_later_keys(float *scores) {
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    for (int r = 0; r < BLOCK; r++) {
        float *row = scores + r / 16 * 512 + r % 16 * 16;
        _mm512_mask_store_ps(row, (__mmask16)first_words(r), hidden);
        _mm512_mask_store_ps(row + 256, (__mmask16)(first_words(r) >> 16), hidden);
    }
}

/* exp(scale score - shift); 0 for what a bfloat16 sum beside 1 would not show. */
static inline __m512 weight_of(__m512 score, __m512 scale, __m512 shift) {
    return exp512(at_least_104(_mm512_fmsub_ps(score, scale, shift)));
}

/* What a block of 32 queries knows of its scores: two halves, of sums even and odd rows. */
typedef struct {
    __m512 shift[2], largest[2], sum[4];
} softmax_state;

/* The shift is at first the largest score of one block of keys. It need not be the largest of all: weights may be as large as e^60, and
 * their products and sums are far from what float32 and bfloat16 hold. */
enum { SHIFT_LAGS_AT_MOST = 60 };

static inline void start_softmax(softmax_state *q) {
    for (int i = 0; i < 4; i++) q->sum[i] = _mm512_setzero_ps();
}
static inline void first_shift(softmax_state *q, const float *scores, __m512 scale) {
    for (int half = 0; half < 2; half++) {
        __m512 upper = _mm512_set1_ps(-INFINITY), lower = upper;
        for (int r = 0; r < 16; r++) {
            upper = _mm512_max_ps(upper, _mm512_load_ps(scores + 256 * half + 16 * r));
            lower = _mm512_max_ps(lower, _mm512_load_ps(scores + 512 + 256 * half + 16 * r));
        }
        q->largest[half] = _mm512_max_ps(upper, lower);
        q->shift[half] = _mm512_mul_ps(q->largest[half], scale);
    }
}
/* Whether the weights have to be made again, with the largest score of all. */
static inline int must_restart(softmax_state *q, __m512 scale) {
    int far = 0;
    for (int half = 0; half < 2; half++) {
        const __m512 lag = _mm512_fmsub_ps(q->largest[half], scale, q->shift[half]);
        far |= _mm512_cmp_ps_mask(lag, _mm512_set1_ps(SHIFT_LAGS_AT_MOST), _CMP_GT_OQ);
    }
    for (int half = 0; half < 2 && far; half++) q->shift[half] = _mm512_mul_ps(q->largest[half], scale);
    return far;
}

/* One block's weights, as a right step over keys. */
static inline void weigh(softmax_state *q, const float *scores, __m512 scale, uint16_t *out) {
    for (int r = 0; r < BLOCK; r += 2) {
        const float *row = scores + r / 16 * 512 + r % 16 * 16;
        __m512 w[4];
        for (int i = 0; i < 4; i++) {
            const __m512 score = _mm512_load_ps(row + i % 2 * 256 + i / 2 * 16);
            q->largest[i % 2] = _mm512_max_ps(q->largest[i % 2], score);
            w[i] = weight_of(score, scale, q->shift[i % 2]);
            q->sum[i] = _mm512_add_ps(q->sum[i], w[i]);
        }
        interleave((__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]), (__m512i)_mm512_cvtne2ps_pbh(w[3], w[2]), out + 16 * r);
    }
}
static inline void end_softmax(const softmax_state *q, query_rows *rows) {
    for (int half = 0; half < 2; half++) {
        const __m512 sum = _mm512_add_ps(q->sum[half], q->sum[half + 2]);
        _mm512_store_ps(rows->inverse + 16 * half, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
        _mm512_store_ps(rows->shift + 16 * half, q->shift[half]);
    }
}

/* Between the passes, as in attention_args. */
static void keep_rows(const attention_args *a, int64_t head, int64_t block, const query_rows *rows) {
    float *at = a->softmax + head * a->T + block * BLOCK;
    const int64_t bytes = at_most(a->T - block * BLOCK, BLOCK) * sizeof(float);
    memcpy(at, rows->shift, bytes);
    memcpy(at + a->B * a->heads * a->T, rows->inverse, bytes);
}
static void kept_rows(const attention_args *a, int64_t head, int64_t block, query_rows *rows) {
    const float *at = a->softmax + head * a->T + block * BLOCK;
    const int64_t bytes = at_most(a->T - block * BLOCK, BLOCK) * sizeof(float);
    memset(rows, 0, sizeof *rows);
    memcpy(rows->shift, at, bytes);
    memcpy(rows->inverse, at + a->B * a->heads * a->T, bytes);
}

/* p = exp(scale score - shift) inverse and ds = p (dp - delta) of one block: p and ds as left steps over queries, ds as a right one over
 * keys. */
static inline void softmax_backward(const float *scores, const float *dps, __m512 scale, const query_rows *q, uint16_t *p, uint16_t *ds,
                                    uint16_t *ds_right) {
    for (int r = 0; r < BLOCK; r += 2) {
        __m512i rows[2];
        for (int odd = 0; odd < 2; odd++) {
            const int at = r / 16 * 512 + (r % 16 + odd) * 16, to = r / 16 * TILE + (r % 16 + odd) * 32;
            __m512 w[2], d[2];
            for (int half = 0; half < 2; half++) {
                w[half] = weight_of(_mm512_load_ps(scores + at + 256 * half), scale, _mm512_load_ps(q->shift + 16 * half));
                w[half] = _mm512_mul_ps(w[half], _mm512_load_ps(q->inverse + 16 * half));
                d[half] = _mm512_sub_ps(_mm512_load_ps(dps + at + 256 * half), _mm512_load_ps(q->delta + 16 * half));
                d[half] = _mm512_mul_ps(w[half], d[half]);
            }
            _mm512_store_si512(p + to, (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
            rows[odd] = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]);
            _mm512_store_si512(ds + to, rows[odd]);
        }
        interleave(rows[0], rows[1], ds_right + 16 * r);
    }
}

/* The sum of dy y over channels, of 32 rows. */
static void find_delta(const factor *dy, const factor *y, int64_t row, float *delta) {
    for (int64_t r = 0; r < BLOCK; r++) {
        const int64_t columns = row + r < dy->rows ? dy->columns : 0;
        const uint16_t *a = dy->values + (row + r) * dy->stride, *b = y->values + (row + r) * y->stride;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < columns; c += 32) {
            const __mmask32 kept = first_words(columns - c);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(kept, a + c), (__m512bh)_mm512_maskz_loadu_epi16(kept, b + c));
        }
        delta[r] = _mm512_reduce_add_ps(sum);
    }
}

#endif
