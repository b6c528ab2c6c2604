/* Verification of drafted tokens (kernels/spec_verify.py, spec_verify_tree.py): what Python hands over. */
#ifndef POSTTRAIN_SPEC_VERIFY_H
#define POSTTRAIN_SPEC_VERIFY_H

#include "native.h"

/* A chain, or with `parents` a tree, of N nodes at most for each of B requests. Rows of logits are contiguous, the strides between
 * them in elements; row 0 is the root's, row i + 1 node i's, and a draft's row is that of the parent. Everything else is contiguous. */
typedef struct {
    const int64_t *nodes, *parents, *num; /* (B, N), (N,) or (B, N), (B,) */
    int64_t parents_stride;
    const char *target, *draft; /* draft NULL: chosen, not drawn */
    int target_dtype, draft_dtype, with_replacement;
    int64_t target_stride, target_row, draft_stride, draft_row;
    int64_t B, N, V, draft_V, depth;
    double temperature, top_p; /* unless `settings` (B, 3) holds each request's temperature, top_k, top_p */
    int64_t top_k;
    const double *settings, *uniforms, *gumbel; /* (B, N) and (B, V), or NULL: made */
    int64_t seed;
    const int64_t *seeds, *offsets;       /* (B,) or NULL */
    int64_t *tokens, *num_accepted, *path; /* (B, depth + 1), (B,), (B, depth) or NULL */
    int64_t threads;
    const isa *engine;
} spec_args;

typedef struct {
    const char *logits;
    int dtype;
    int64_t N, V, stride;
    double temperature, top_p;
    int64_t top_k;
    const double *settings;
    float *threshold, *log_total;
    int64_t threads;
    const isa *engine;
} filter_args;

/* 0; -1 out of memory; 1 a request's num or a parent is out of range, or it stopped at a row from which nothing can be drawn. */
int spec_verify_requests(const spec_args *a);
int filter_rows(const filter_args *a);

#endif
