/* The low rank beside a product of few rows: scaling x A^T B^T forward, and its gradients. */
#ifndef POSTTRAIN_LOW_RANK_H
#define POSTTRAIN_LOW_RANK_H

#include "native.h"

struct low_rank {
    const void *x;     /* (M, K) in `dtype`, after dropout */
    const void *A, *B; /* (r, K), (N, r) in `factors`: `dtype`, or FLOAT32 */
    int dtype, factors;
    int64_t M, N, K, r, threads;
    float scaling;
    const isa *engine;
};

/* Widened rows, and s = scaling x A^T in rows of `ld`, zero beyond the rank: memory of low_rank_floats(l) floats. */
static inline int64_t low_rank_ld(const low_rank *l) { return ceil_div(l->r, 16) * 16; }
static inline int64_t low_rank_floats(const low_rank *l) { return l->M * (ceil_div(l->K, 16) * 16 + low_rank_ld(l)); }

/* Returns s, which lies in `memory`; NULL when out of memory. */
float *low_rank_down(const low_rank *l, float *memory);

/* With V = scaling dY B: dX += V A, dA = V^T x, dB = scaling dY^T (x A^T) of dY (M, N); dX (M, K) in `dtype`, dA and dB float32; NULL
 * where not needed. Returns 0, or -1 out of memory. */
int low_rank_backward(const low_rank *l, const void *dy, void *dx, float *dA, float *dB);

#endif
