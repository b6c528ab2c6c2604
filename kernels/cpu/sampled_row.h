/* A row of logits under temperature, top-k and top-p, and what is left of its probabilities when another row's are subtracted: what
 * the loops of each instruction set (row_filter.h, row_race.h) and the walk over drafts (spec_verify.c) share. */
#ifndef POSTTRAIN_SAMPLED_ROW_H
#define POSTTRAIN_SAMPLED_ROW_H

#include <stdint.h>

/* p[v] = exp((z[v] - top) / T) / total where z[v] >= threshold, else 0. Beyond -3e38 a logit counts as -inf, beyond 3e38 as 3e38. */
typedef struct sampled_row {
    const void *z;
    int dtype;
    int64_t V;
    double temperature;
    float inverse_temperature;
    float top;       /* the largest logit; -INFINITY: none is finite, and p is 0 */
    float threshold; /* -INFINITY: everything is kept */
    double total;
    int64_t kept;    /* words that a filter kept, listed here; -1: no filter, no list */
    float *values, *weights; /* logits, and exp((z - top) / T) */
    int32_t *ids;
} sampled_row;

/* Floats of memory that filter_row takes, or a little less: three lists of words, and the groups of row_filter.h. */
static inline int64_t filter_room(int64_t V) { return 4 * V + 512; }

/* max(p - factor q, 0), and 0 at the words `without`; q may be NULL, and may have fewer words. Not normalised. */
typedef struct leftover {
    const sampled_row *p, *q;
    double factor;
    const int64_t *without;
    int64_t without_count;
} leftover;

/* Gumbel noise by word, or NULL: made from (seed, offset), stream DRAW (kernels/_spec_noise.py). */
typedef struct race_noise {
    const double *gumbel;
    uint64_t seed, offset;
} race_noise;

enum { ACCEPT_STREAM = 0, DRAW_STREAM = 1 };

/* Philox4x32-10 (Salmon et al., SC 2011) of counter (c0, c1, c2, c3) under a key of 64 bits. */
typedef struct { uint32_t c0, c1, c2, c3; } philox_words;
static inline philox_words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        /* high and low halves apart: compilers know vector instructions for each, not for both */
        const uint32_t high_a = (uint32_t)((uint64_t)c0 * 0xD2511F53 >> 32), high_b = (uint32_t)((uint64_t)c2 * 0xCD9E8D57 >> 32);
        const uint32_t low_a = c0 * 0xD2511F53, low_b = c2 * 0xCD9E8D57;
        c0 = high_b ^ c1 ^ k0, c1 = low_b, c2 = high_a ^ c3 ^ k1, c3 = low_a;
    }
    return (philox_words){c0, c1, c2, c3};
}

#endif
