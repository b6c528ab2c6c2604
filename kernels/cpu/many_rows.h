/* Linear layers over many rows of bfloat16, as Python fills them in (kernels/cpu/native_many.py). */
#ifndef POSTTRAIN_MANY_ROWS_H
#define POSTTRAIN_MANY_ROWS_H

#include "native.h"

/* One of the layers that read the same x: its base, dense or in 4 bits, and its low rank, if r > 0. All products are in bfloat16;
 * W (N, K), A (r, K) and B (N, r) are contiguous. */
typedef struct {
    const uint16_t *dense; /* W (N, K); NULL where it is in 4 bits */
    const uint8_t *packed; /* W in 4 bits. Both NULL: y (dx) already holds the base product, to which the low rank is added */
    const void *absmax;
    const float *nested_absmax, *nested_offset;
    int64_t nested_block_size, block_size, quant_type;
    const uint16_t *bias;
    const void *A, *B;
    int64_t factors; /* A's and B's dtype: BFLOAT16, or FLOAT32, of which they are rounded */
    uint16_t *y;    /* (M, N); dY backward */
    float *dA, *dB; /* (r, K), (N, r); NULL where not needed */
    int64_t N, r;
    double scaling;
} many_rows_layer;

typedef struct {
    const uint16_t *x;       /* (M, K) */
    const uint16_t *dropped; /* x as the low rank reads it, after dropout; or x */
    uint16_t *dx;            /* (M, K); NULL where not needed */
    uint16_t *low_rank;      /* NULL, or (M, sum of r): V = scaling dY B instead of V A in dx */
    void *workspace;         /* many_rows_bytes() */
    int64_t M, K, layers, threads;
    const many_rows_layer *layer;
} many_rows_args;

enum { MAX_LAYERS = 4 };

#endif
