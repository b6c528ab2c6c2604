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

/* With V = scaling dY B: dX += V A, dA = V^T x, dB = scaling dY^T (x A^T) of dY (M, N); dX (M, K) in `dtype`, dA and dB float32; NULL
 * where not needed. Returns 0, or -1 out of memory. */
int low_rank_backward(const low_rank *l, const void *dy, void *dx, float *dA, float *dB);

#endif
