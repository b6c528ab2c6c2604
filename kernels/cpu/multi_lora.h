/* Rows with adapters of their own: what the products of every instruction set share. */
#ifndef POSTTRAIN_MULTI_LORA_H
#define POSTTRAIN_MULTI_LORA_H

#include "native.h"

/* y[m, :] += scaling[i] (x[m, :] A[i]^T) B[i]^T, i = ids[m], over the first ranks[i] of r columns. All contiguous; x and y in `dtype`,
 * A and B in `factors`: that, or float32. */
typedef struct {
    const void *x, *A, *B; /* (M, K), (n, r, K), (n, N, r) */
    void *y;               /* (M, N) */
    const float *scaling;
    const int32_t *ranks;  /* NULL: r everywhere */
    const int64_t *ids;    /* -1: nothing to add */
    int dtype, factors;
    int64_t M, N, K, n, r, threads;
    const isa *engine;
} multi_lora_args;

/* Rows of one adapter: `order` holds them from `first` on. The products cut each segment into units of work, numbered through. */
typedef struct {
    int64_t adapter, first, count, rank;
    int64_t shrink_unit, expand_unit; /* numbers of this segment's first unit in either product */
} segment;

enum { ROW_BLOCK = 16, RANK_BLOCK = 16, EXPAND_COLUMNS = 256 };

typedef struct {
    const multi_lora_args *args;
    const int64_t *order;
    const segment *segments; /* `count` of them, and one more that ends the numbering */
    int64_t count;
    void *s;                 /* x A^T by place in `order`: (rows, ld), zero beyond the rank */
    int64_t ld;
    int64_t next;            /* the unit to be taken next: threads take one after another, so no thread waits for a heavy one */
    int failed;
} multi_lora_job;

/* 0; -1 out of memory; 2 + 2 m when row m's id is none of the adapters'; 3 + 2 i when adapter i's rank is not one of 0 to r. */
int64_t multi_lora(const multi_lora_args *a, int bf16_units);

/* Special units, bfloat16 only. `shrink` fills s as bfloat16, `expand` reads it. */
int multi_lora_bf16_usable(const multi_lora_args *a);
void multi_lora_bf16_shrink(void *job, int64_t thread, int64_t threads);
void multi_lora_bf16_expand(void *job, int64_t thread, int64_t threads);

#endif
