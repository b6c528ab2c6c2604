/* lora_linear's native part, as Python fills it in (kernels/cpu/native_lora.py). */
#ifndef POSTTRAIN_LORA_H
#define POSTTRAIN_LORA_H

#include "native.h"

/* One of the layers that read the same x. All products are in bfloat16; A (r, K) and B (N, r) are contiguous. */
typedef struct {
    const void *weight;     /* bfloat16 (N, K), or packed when block_size is not 0 */
    const void *absmax;
    const float *nested_absmax, *nested_offset;
    int64_t nested_block_size, block_size, quant_type;
    const uint16_t *A, *B, *bias;
    uint16_t *y;            /* (M, N): written forward, dY backward */
    float *dA, *dB;         /* (r, K), (N, r); NULL where not needed */
    int64_t N, r;
    double scaling;
} lora_layer;

typedef struct {
    const uint16_t *x, *dropped; /* (M, K); dropped is x where nothing is */
    uint16_t *dx;                /* NULL where not needed */
    uint16_t *low_rank;          /* NULL, or (M, sum of r): V = scaling dY B instead of adding V A to dx */
    void *workspace;             /* lora_amx_bytes() for the right factors */
    int64_t M, K, layers, threads;
    const lora_layer *layer;
} lora_args;

#endif
