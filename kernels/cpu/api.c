/* What Python calls: argument structs filled, the work cut into parts, one engine chosen. Every function here returns 0, or
 * -1 when memory ran out. Shapes were checked by the caller; nothing here reads beyond them. */
#include <string.h>

#include "low_rank.h"
#include "multi_lora.h"
#include "scalar.h"
#include "spec_verify.h"

static const isa *engine;
enum { NO_UNITS, DOT_BF16, AMX };
static int special_units; /* what bf16 products may use besides the engine */

typedef struct {
    const char *name;
    const isa *engine;
    int units;
} level;

static int machine_levels(level *out) {
    int n = 0;
    out[n++] = (level){"portable", &isa_portable, NO_UNITS};
#if defined(__aarch64__)
    out[n++] = (level){"neon", &isa_neon, NO_UNITS};
#elif defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return n;
    out[n++] = (level){"avx2", &isa_avx2, NO_UNITS};
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return n;
    out[n++] = (level){"avx512", &isa_avx512, NO_UNITS};
    if (!__builtin_cpu_supports("avx512bf16")) return n;
    out[n++] = (level){"avx512_bf16", &isa_avx512, DOT_BF16};
    if (amx_available()) out[n++] = (level){"amx", &isa_avx512, AMX};
#endif
    return n;
}

/* Chooses `name`, or the best level of this machine when it is empty. Returns the level's name, NULL if it is not here. */
const char *set_isa(const char *name) {
    level levels[8];
    int n = machine_levels(levels);
    for (int i = n - 1; i >= 0; i--)
        if (!*name || !strcmp(name, levels[i].name)) {
            engine = levels[i].engine;
            special_units = levels[i].units;
            return levels[i].name;
        }
    return NULL;
}

/* The i-th level this machine can run, ascending; NULL past the last. */
const char *isa_level(int i) {
    level levels[8];
    return i < machine_levels(levels) ? levels[i].name : NULL;
}

typedef struct {
    const void *x;
    int dtype;
    int64_t n, block_size, first, last;
    const codebook *book;
    uint8_t *packed;
    float *absmax, offset;
    const weight *w;
    void *out;
} job;

static void quantize_task(void *context, int64_t thread, int64_t threads) {
    const job *j = context;
    int64_t blocks = ceil_div(j->n, j->block_size);
    engine->quantize(j->x, j->dtype, j->n, j->block_size, j->book, part_start(blocks, 1, thread, threads),
                     part_start(blocks, 1, thread + 1, threads), j->packed, j->absmax);
}

int quantize_4bit(const void *x, int dtype, int64_t n, int64_t block_size, int quant_type, uint8_t *packed, float *absmax,
                  int64_t threads) {
    job j = {.x = x, .dtype = dtype, .n = n, .block_size = block_size, .book = &codebooks[quant_type], .packed = packed, .absmax = absmax};
    run_parallel(quantize_task, &j, threads);
    return 0;
}

enum { ABSMAX_CHUNK = 256 }; /* absmax values decoded at a time, on the stack */

static void dequantize_task(void *context, int64_t thread, int64_t threads) {
    const job *j = context;
    const weight *w = j->w;
    const int64_t blocks = ceil_div(j->n, w->block_size), size = j->dtype == FLOAT32 ? 4 : 2;
    const int64_t stop = part_start(blocks, 1, thread + 1, threads);
    float absmax[ABSMAX_CHUNK];
    for (int64_t b = part_start(blocks, 1, thread, threads); b < stop; b += ABSMAX_CHUNK) {
        int64_t count = stop - b < ABSMAX_CHUNK ? stop - b : ABSMAX_CHUNK, start = b * w->block_size;
        int64_t end = (b + count) * w->block_size < j->n ? (b + count) * w->block_size : j->n;
        engine->decode_absmax(w, b, count, absmax);
        engine->dequantize(w, absmax, start, end - start, j->dtype, (char *)j->out + start * size);
    }
}

void advise_huge_pages(void *start, int64_t bytes);

int dequantize_4bit(const uint8_t *packed, const void *absmax, const float *nested_absmax, const float *nested_offset,
                    int64_t nested_block_size, int64_t block_size, int quant_type, int dtype, int64_t n, void *out,
                    int64_t threads) {
    weight w = make_weight(packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type);
    job j = {.w = &w, .dtype = dtype, .n = n, .out = out};
    advise_huge_pages(out, n * (dtype == FLOAT32 ? 4 : 2));
    run_parallel(dequantize_task, &j, threads);
    return 0;
}

static void double_quantize_task(void *context, int64_t thread, int64_t threads) {
    const job *j = context;
    int64_t blocks = ceil_div(j->n, j->block_size);
    engine->double_quantize(j->x, j->n, j->block_size, j->offset, part_start(blocks, 1, thread, threads),
                            part_start(blocks, 1, thread + 1, threads), j->packed, j->absmax);
}

int double_quantize(const float *absmax, int64_t n, int64_t block_size, const float *offset, uint8_t *codes,
                    float *nested_absmax, int64_t threads) {
    job j = {.x = absmax, .n = n, .block_size = block_size, .offset = *offset, .packed = codes, .absmax = nested_absmax};
    run_parallel(double_quantize_task, &j, threads);
    return 0;
}

static void double_dequantize_task(void *context, int64_t thread, int64_t threads) {
    const job *j = context;
    int64_t first = part_start(j->n, 1, thread, threads), last = part_start(j->n, 1, thread + 1, threads);
    engine->decode_absmax(j->w, first, last - first, (float *)j->out + first);
}

int double_dequantize(const uint8_t *codes, const float *absmax, const float *offset, int64_t block_size, int64_t n, float *out,
                      int64_t threads) {
    weight w = make_weight(NULL, codes, absmax, offset, block_size, 1, 0);
    job j = {.w = &w, .n = n, .out = out};
    run_parallel(double_dequantize_task, &j, threads);
    return 0;
}

/* y += scaling x A^T B^T for at most FEW_ROWS rows: the one adapter of a batch. */
enum { FEW_ROWS = 64 };
int low_rank_add(low_rank *l, void *y) {
    const int64_t ids[FEW_ROWS] = {0};
    const multi_lora_args a = {l->x, l->A, l->B, y, &l->scaling, NULL, ids, l->dtype, l->factors, l->M, l->N, l->K, 1, l->r, l->threads, engine};
    return (int)multi_lora(&a, special_units >= DOT_BF16);
}

/* `low`: NULL, or what is added to y, for at most FEW_ROWS rows; its engine is set here. */
int linear_4bit(const void *x, int dtype, int64_t M, const uint8_t *packed, const void *absmax, const float *nested_absmax,
                const float *nested_offset, int64_t nested_block_size, int64_t block_size, int quant_type, const void *bias,
                int64_t N, int64_t K, void *y, int64_t threads, low_rank *low) {
    weight w = make_weight(packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type);
    linear_args a = {x, bias, y, dtype, M, N, K, threads, &w, engine, low};
    if (low) low->engine = engine;
    /* one or two rows leave most of a tile empty; from three on AMX wins */
    const int tiles = special_units >= AMX && M > 2 && amx_usable(&a);
    if (!tiles && lookup_usable(&a)) return lookup_linear(&a);
    const int status = tiles ? amx_linear(&a) : wide_linear(&a);
    return status || !low ? status : low_rank_add(low, y);
}

int linear_4bit_dx(const void *dy, int dtype, int64_t M, const uint8_t *packed, const void *absmax, const float *nested_absmax,
                   const float *nested_offset, int64_t nested_block_size, int64_t block_size, int quant_type, int64_t N, int64_t K,
                   void *dx, int64_t threads) {
    weight w = make_weight(packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type);
    linear_args a = {dy, NULL, dx, dtype, M, N, K, threads, &w, engine, NULL};
    if (special_units >= AMX && amx_dx_usable(&a)) return amx_linear_dx(&a);
    return wide_linear_dx(&a);
}

int64_t multi_lora_add(const void *x, int dtype, int64_t M, const void *A, const void *B, int factors, const float *scaling,
                       const int32_t *ranks, const int64_t *ids, int64_t n, int64_t r, int64_t N, int64_t K, void *y, int64_t threads) {
    multi_lora_args a = {x, A, B, y, scaling, ranks, ids, dtype, factors, M, N, K, n, r, threads, engine};
    return multi_lora(&a, special_units >= DOT_BF16);
}

int few_rows_backward(low_rank *l, const void *dy, void *dx, float *dA, float *dB) {
    l->engine = engine;
    return low_rank_backward(l, dy, dx, dA, dB);
}

typedef struct {
    char *logits;
    const int64_t *labels;
    int dtype, gradient;
    int64_t N, V, stride, ignore_index;
    float *logprobs, *entropy;
} logit_job;

static void logit_task(void *context, int64_t thread, int64_t threads) {
    const logit_job *j = context;
    const int64_t size = j->dtype == FLOAT32 ? 4 : 2;
    for (int64_t row = part_start(j->N, 1, thread, threads); row < part_start(j->N, 1, thread + 1, threads); row++) {
        char *z = j->logits + row * j->stride * size;
        if (j->labels[row] != j->ignore_index) {
            engine->logit_row(z, j->dtype, j->V, j->labels[row], j->gradient, j->logprobs + row,
                              j->entropy ? j->entropy + row : NULL);
            continue;
        }
        j->logprobs[row] = 0; /* the entropies are zeros already */
        if (j->gradient) memset(z, 0, j->V * size);
    }
}

/* Labels lie in [0, V) or equal ignore_index; rows are `stride` elements apart; `entropy` holds zeros, or is NULL. */
int logit_rows(void *logits, int dtype, int64_t N, int64_t V, int64_t stride, const int64_t *labels, int64_t ignore_index, int gradient,
               float *logprobs, float *entropy, int64_t threads) {
    logit_job j = {logits, labels, dtype, gradient, N, V, stride, ignore_index, logprobs, entropy};
    run_parallel(logit_task, &j, threads);
    return 0;
}

typedef struct {
    const char *x, *dy;
    char *y; /* or dx */
    const float *w;
    float *rstd, *dw, eps;
    int dtype;
    int64_t N, D, stride, dy_stride, rows; /* rows of a part that sums its own dw */
} norm_job;

static void norm_task(void *context, int64_t thread, int64_t threads) {
    const norm_job *j = context;
    const int64_t size = j->dtype == FLOAT32 ? 4 : 2, last = part_start(j->N, 1, thread + 1, threads);
    for (int64_t i = part_start(j->N, 1, thread, threads); i < last; i++)
        engine->rms_norm_row(j->x + i * j->stride * size, j->dtype, j->w, j->D, j->eps, j->y + i * j->D * size, j->rstd + i);
}

static void norm_backward_task(void *context, int64_t thread, int64_t threads) {
    const norm_job *j = context;
    const int64_t size = j->dtype == FLOAT32 ? 4 : 2, last = part_start(j->N, j->rows, thread + 1, threads);
    for (int64_t i = part_start(j->N, j->rows, thread, threads); i < last; i++) {
        float *dw = j->dw ? j->dw + i / j->rows * j->D : NULL;
        if (dw && i % j->rows == 0) memset(dw, 0, j->D * sizeof(float));
        engine->rms_norm_row_backward(j->x + i * j->stride * size, j->dy + i * j->dy_stride * size, j->dtype, j->w, j->D, j->rstd[i],
                                      j->y + i * j->D * size, dw);
    }
}

/* The weight as rows need it: float32, zeros up to a multiple of 64. NULL when out of memory. */
static const float *wide_weight(const void *w, int dtype, int64_t D) {
    const int64_t padded = ceil_div(D, 64) * 64;
    float *out = scratch(0, padded * sizeof(float));
    if (!out) return NULL;
    engine->widen(w, dtype, D, out);
    memset(out + D, 0, (padded - D) * sizeof(float));
    return out;
}

/* Rows of x are `stride` elements apart; y is contiguous. */
int rms_norm(const void *x, int dtype, int64_t N, int64_t D, int64_t stride, const void *w, int w_dtype, float eps, void *y, float *rstd,
             int64_t threads) {
    norm_job j = {.x = x, .y = y, .w = wide_weight(w, w_dtype, D), .rstd = rstd, .eps = eps, .dtype = dtype, .N = N, .D = D, .stride = stride};
    if (!j.w) return -1;
    run_parallel(norm_task, &j, threads);
    return 0;
}

/* dw (ceil(N / rows), D), or NULL: each part of `rows` rows has its own sums, so that they do not depend on the threads. */
int rms_norm_backward(const void *x, int dtype, int64_t N, int64_t D, int64_t stride, const void *dy, int64_t dy_stride, const void *w,
                      int w_dtype, float *rstd, void *dx, float *dw, int64_t rows, int64_t threads) {
    norm_job j = {x, dy, dx, wide_weight(w, w_dtype, D), rstd, dw, 0, dtype, N, D, stride, dy_stride, rows};
    if (!j.w) return -1;
    run_parallel(norm_backward_task, &j, threads);
    return 0;
}

typedef struct {
    const char *gate, *up, *dy; /* dy NULL: forward */
    char *out, *dup;
    int dtype;
    int64_t N, D, gate_stride, up_stride, dy_stride;
} swiglu_job;

static void swiglu_task(void *context, int64_t thread, int64_t threads) {
    const swiglu_job *j = context;
    const int64_t size = j->dtype == FLOAT32 ? 4 : 2, runs = ceil_div(j->D, SWIGLU_RUN);
    const int64_t last = part_start(j->N * runs, 1, thread + 1, threads);
    for (int64_t i = part_start(j->N * runs, 1, thread, threads); i < last; i++) {
        const int64_t row = i / runs, start = i % runs * SWIGLU_RUN, n = j->D - start < SWIGLU_RUN ? j->D - start : SWIGLU_RUN;
        const char *gate = j->gate + (row * j->gate_stride + start) * size, *up = j->up + (row * j->up_stride + start) * size;
        const int64_t out = (row * j->D + start) * size;
        if (!j->dy) engine->swiglu_run(gate, up, j->dtype, n, j->out + out);
        else
            engine->swiglu_run_backward(gate, up, j->dy + (row * j->dy_stride + start) * size, j->dtype, n, j->out + out, j->dup + out);
    }
}

/* Rows of gate, up and dy are their strides apart; `out` is y where dy is NULL, else dgate, and dup beside it; both contiguous. */
int swiglu(const void *gate, const void *up, const void *dy, int dtype, int64_t N, int64_t D, int64_t gate_stride, int64_t up_stride,
           int64_t dy_stride, void *out, void *dup, int64_t threads) {
    swiglu_job j = {gate, up, dy, out, dup, dtype, N, D, gate_stride, up_stride, dy_stride};
    run_parallel(swiglu_task, &j, threads);
    return 0;
}

typedef struct {
    const char *x, *cos, *sin;
    char *y;
    int dtype, transposed;
    int64_t B, T, heads, D, stride_xb, stride_xt, stride_xh, stride_cb, stride_ct, stride_sb, stride_st;
} rope_job;

static void rope_task(void *context, int64_t thread, int64_t threads) {
    const rope_job *j = context;
    const int64_t size = j->dtype == FLOAT32 ? 4 : 2, last = part_start(j->B * j->T, 1, thread + 1, threads);
    for (int64_t i = part_start(j->B * j->T, 1, thread, threads); i < last; i++) {
        const int64_t b = i / j->T, t = i % j->T;
        engine->rope_position(j->x + (b * j->stride_xb + t * j->stride_xt) * size, j->stride_xh, j->heads,
                              j->cos + (b * j->stride_cb + t * j->stride_ct) * size, j->sin + (b * j->stride_sb + t * j->stride_st) * size,
                              j->dtype, j->D / 2, j->transposed, j->y + i * j->heads * j->D * size);
    }
}

/* x (B, T, heads, D), cos and sin (B, T, D) by their strides, D's being 1; y is contiguous. */
int rope(const void *x, const void *cos, const void *sin, int dtype, int64_t B, int64_t T, int64_t heads, int64_t D, int64_t stride_xb,
         int64_t stride_xt, int64_t stride_xh, int64_t stride_cb, int64_t stride_ct, int64_t stride_sb, int64_t stride_st, int transposed,
         void *y, int64_t threads) {
    rope_job j = {x, cos, sin, y, dtype, transposed, B, T, heads, D, stride_xb, stride_xt, stride_xh, stride_cb, stride_ct, stride_sb, stride_st};
    run_parallel(rope_task, &j, threads);
    return 0;
}

int logit_filter(const void *logits, int dtype, int64_t N, int64_t V, int64_t stride, double temperature, int64_t top_k, double top_p,
                 const double *settings, float *threshold, float *log_total, int64_t threads) {
    filter_args a = {logits, dtype, N, V, stride, temperature, top_p, top_k, settings, threshold, log_total, threads, engine};
    return filter_rows(&a);
}

int spec_verify(const int64_t *nodes, const int64_t *parents, int64_t parents_stride, const int64_t *num, const void *target,
                int target_dtype, int64_t target_stride, int64_t target_row, const void *draft, int draft_dtype, int64_t draft_stride,
                int64_t draft_row, int64_t B, int64_t N, int64_t V, int64_t draft_V, int64_t depth, int with_replacement,
                double temperature, int64_t top_k, double top_p, const double *settings, const double *uniforms, const double *gumbel,
                int64_t seed, const int64_t *seeds, const int64_t *offsets, int64_t *tokens, int64_t *num_accepted, int64_t *path,
                int64_t threads) {
    spec_args a = {nodes, parents, num, parents_stride, target, draft, target_dtype, draft_dtype, with_replacement, target_stride,
                   target_row, draft_stride, draft_row, B, N, V, draft_V, depth, temperature, top_p, top_k, settings, uniforms, gumbel,
                   seed, seeds, offsets, tokens, num_accepted, path, threads, engine};
    return spec_verify_requests(&a);
}
