/* lora_linear's native part, as Python fills it in (kernels/cpu/native_lora.py). */
#ifndef POSTTRAIN_LORA_H
#define POSTTRAIN_LORA_H

#include "native.h"

/* One of the layers that read the same x. All products are in bfloat16; A (r, K) and B (N, r) are contiguous. */
typedef struct {
    const uint16_t *A, *B;
    uint16_t *y;    /* (M, N): the base product, to which the low rank is added, forward; dY backward */
    float *dA, *dB; /* (r, K), (N, r); NULL where not needed */
    int64_t N, r;
    double scaling;
} lora_layer;

typedef struct {
    const uint16_t *x;  /* (M, K), with dropout where there is any */
    uint16_t *dx;       /* the base's dX (M, K), to which V A is added; NULL where not needed */
    uint16_t *low_rank; /* NULL, or (M, sum of r): V = scaling dY B instead of adding V A to dx */
    void *workspace;    /* lora_amx_bytes() for the right factors */
    int64_t M, K, layers, threads;
    const lora_layer *layer;
} lora_args;

#endif
