/* What Python calls: argument structs filled, the work cut into parts, one engine chosen. Every function here returns 0, or
 * -1 when memory ran out. Shapes were checked by the caller; nothing here reads beyond them. */
#include <string.h>

#include "multi_lora.h"
#include "scalar.h"

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

static weight make_weight(const uint8_t *packed, const void *absmax, const float *nested_absmax, const float *nested_offset,
                          int64_t nested_block_size, int64_t block_size, int quant_type) {
    return (weight){packed, absmax, nested_absmax, nested_absmax ? *nested_offset : 0, nested_block_size, block_size,
                    &codebooks[quant_type]};
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

int linear_4bit(const void *x, int dtype, int64_t M, const uint8_t *packed, const void *absmax, const float *nested_absmax,
                const float *nested_offset, int64_t nested_block_size, int64_t block_size, int quant_type, const void *bias,
                int64_t N, int64_t K, void *y, int64_t threads) {
    weight w = make_weight(packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type);
    linear_args a = {x, bias, y, dtype, M, N, K, threads, &w, engine};
    /* one or two rows leave most of a tile empty; from three on AMX wins */
    if (special_units >= AMX && M > 2 && amx_usable(&a)) return amx_linear(&a);
    if (engine == &isa_avx512 && lookup_usable(&a)) return lookup_linear(&a);
    return wide_linear(&a);
}

int linear_4bit_dx(const void *dy, int dtype, int64_t M, const uint8_t *packed, const void *absmax, const float *nested_absmax,
                   const float *nested_offset, int64_t nested_block_size, int64_t block_size, int quant_type, int64_t N, int64_t K,
                   void *dx, int64_t threads) {
    weight w = make_weight(packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type);
    linear_args a = {dy, NULL, dx, dtype, M, N, K, threads, &w, engine};
    if (special_units >= AMX && amx_dx_usable(&a)) return amx_linear_dx(&a);
    return wide_linear_dx(&a);
}

int64_t multi_lora_add(const void *x, int dtype, int64_t M, const void *A, const void *B, const float *scaling, const int32_t *ranks,
                       const int64_t *ids, int64_t n, int64_t r, int64_t N, int64_t K, void *y, int64_t threads) {
    multi_lora_args a = {x, A, B, y, scaling, ranks, ids, dtype, M, N, K, n, r, threads, engine};
    return multi_lora(&a, special_units >= DOT_BF16);
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
