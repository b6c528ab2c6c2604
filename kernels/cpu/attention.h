/* Causal attention as Python fills it in (kernels/cpu/native_attention.py). */
#ifndef POSTTRAIN_ATTENTION_H
#define POSTTRAIN_ATTENTION_H

#include "native.h"

/* bfloat16 (B, heads, T, D): elements from a row of the batch, a head and a position to the next. Those of D are side by side. */
typedef struct {
    uint16_t *values;
    int64_t batch, head, row;
} head_rows;

typedef struct {
    head_rows q, k, v, y;      /* k and v have kv_heads; y is written forward and read backward */
    head_rows dy, dq, dk, dv;  /* backward only */
    float *softmax;            /* (2, B, heads, T), shift and inverse: p = exp(scale q k^T - shift) inverse; read backward */
    void *workspace;           /* attention_bytes(), backward only */
    int64_t B, heads, kv_heads, T, D, threads;
    double scale;
} attention_args;

#endif
