/* What the C files of the native CPU engine share: dtypes, the 4-bit weight, the functions each instruction set provides. */
#ifndef POSTTRAIN_NATIVE_H
#define POSTTRAIN_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* FLOAT32, FLOAT16, BFLOAT16 name a tensor's dtype, and the dtype a decoded value is rounded to. */
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

/* The tables Python hands over once (kernels/codebooks.py is their one definition), and what set_codebooks derives from
 * them. Scaled values in [-1, 1] (NF4) or magnitudes in [0, 1] (FP4) fall into 32 equal buckets, each holding at most one
 * threshold, so that a code is one table entry and one comparison: rank = bucket_rank[b] + (s > bucket_threshold[b]). */
typedef struct {
    float values[16];           /* code -> value */
    int thresholds_count;       /* 15 for NF4, 7 for FP4 */
    float thresholds[15];       /* ascending midpoints; of magnitudes for FP4 */
    int32_t rank_codes[16];     /* rank among the values (FP4: the magnitudes) -> code */
    int is_signed;              /* NF4: thresholds are signed; FP4: sign bit 8 + magnitude */
    float bucket_scale, bucket_shift; /* bucket = (int)(s * bucket_scale + bucket_shift) */
    float bucket_threshold[32];
    int32_t bucket_rank[32];
} codebook;

extern codebook codebooks[2]; /* 0: NF4, 1: FP4 */
extern float dynamic_map[256], dynamic_thresholds[255];

/* A weight in 4 bits: element i (flattened) is nibble i of packed, high nibble first; its block is i / block_size. */
typedef struct {
    const uint8_t *packed;
    const void *absmax;         /* float32, or uint8 codes when nested_absmax is not NULL */
    const float *nested_absmax; /* absmax_b = dynamic_map[code_b] * nested_absmax[b / nested_block_size] + offset */
    float offset;
    int64_t nested_block_size, block_size;
    const codebook *book;
} weight;

static inline weight make_weight(const uint8_t *packed, const void *absmax, const float *nested_absmax, const float *nested_offset,
                                 int64_t nested_block_size, int64_t block_size, int64_t quant_type) {
    return (weight){packed, absmax, nested_absmax, nested_absmax ? *nested_offset : 0, nested_block_size, block_size,
                    &codebooks[quant_type]};
}
struct sampled_row; /* sampled_row.h */
struct leftover;
struct race_noise;

/* One instruction set's inner loops. Every set returns the same bytes from the first five; sums may differ in rounding. */
typedef struct {
    const char *name;
    /* Quantizes blocks [first, last) of x (n elements, dtype) into packed and absmax. */
    void (*quantize)(const void *x, int dtype, int64_t n, int64_t block_size, const codebook *book, int64_t first,
                     int64_t last, uint8_t *packed, float *absmax);
    /* absmax of blocks [first, first + count) as float32. */
    void (*decode_absmax)(const weight *w, int64_t first, int64_t count, float *out);
    /* Elements [start, start + count), rounded to dtype, written in dtype. `absmax[0]` belongs to block start / block_size. */
    void (*dequantize)(const weight *w, const float *absmax, int64_t start, int64_t count, int dtype, void *out);
    /* The same, widened again to float32 after the rounding: what the fp32 dot products read. */
    void (*dequantize_wide)(const weight *w, const float *absmax, int64_t start, int64_t count, int dtype, float *out);
    /* Codes of blocks [first, last) of nested_block_size absmax values around `offset`. */
    void (*double_quantize)(const float *absmax, int64_t n, int64_t block_size, float offset, int64_t first, int64_t last,
                            uint8_t *codes, float *nested_absmax);
    void (*widen)(const void *x, int dtype, int64_t n, float *out);
    void (*narrow)(const float *x, int dtype, int64_t n, void *out);
    /* dots[r * M + m] += sum_k w[r * stride + k] * x[m * ldx + k] for 4 rows of w. */
    void (*dots)(const float *w, int64_t stride, const float *x, int64_t ldx, int64_t M, int64_t K, float *dots);
    /* acc[m * ldacc + k] += sum_r dy[m * lddy + r] * w[r * stride + k] for `rows` rows of w. */
    void (*axpys)(const float *w, int64_t stride, int64_t rows, const float *dy, int64_t lddy, int64_t M, int64_t K,
                  float *acc, int64_t ldacc);
    /* One row of V logits: log p of the label and (unless NULL) the entropy; with `gradient` the row becomes onehot - softmax. */
    void (*logit_row)(void *z, int dtype, int64_t V, int64_t label, int gradient, float *logprob, float *entropy);
    /* One row of D elements, w padded with zeros to a multiple of 64; the gradients dx and, unless NULL, dw, which is added to. */
    void (*rms_norm_row)(const void *x, int dtype, const float *w, int64_t D, float eps, void *y, float *rstd);
    void (*rms_norm_row_backward)(const void *x, const void *dy, int dtype, const float *w, int64_t D, float rstd, void *dx, float *dw);
    /* n <= SWIGLU_RUN elements. */
    void (*swiglu_run)(const void *gate, const void *up, int dtype, int64_t n, void *y);
    void (*swiglu_run_backward)(const void *gate, const void *up, const void *dy, int dtype, int64_t n, void *dgate, void *dup);
    /* One position's heads, `stride` elements apart in x and contiguous in y, of two halves each; cos and signed sin of a whole head. */
    void (*rope_position)(const void *x, int64_t stride, int64_t heads, const void *cos, const void *sin, int dtype, int64_t half,
                          int transposed, void *y);
    /* The index of the first of the largest logits, or -1; a row's filter; what is left of a row, its sum and a draw from it. */
    int64_t (*first_largest)(const void *z, int dtype, int64_t V);
    void (*filter_row)(struct sampled_row *row, int64_t top_k, double top_p, float *memory);
    double (*leftover_mass)(const struct leftover *left);
    int64_t (*race)(const struct leftover *left, const struct race_noise *noise);
} isa;

enum { SWIGLU_RUN = 512 };

extern const isa isa_portable, isa_avx2, isa_avx512, isa_neon;

static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }
/* ceil(a / b), and the start of part i when n things are cut into `parts` runs of whole `unit`s. */
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t part_start(int64_t n, int64_t unit, int64_t part, int64_t parts) {
    int64_t start = ceil_div(n, unit) * part / parts * unit;
    return start < n ? start : n;
}

/* Rows of `columns` elements as float32 rows of `ld`, zero beyond the columns. */
static inline void widen_rows(const isa *engine, const void *from, int dtype, int64_t rows, int64_t columns, float *to, int64_t ld) {
    for (int64_t i = 0; i < rows; i++, to += ld) {
        engine->widen((const char *)from + i * columns * (dtype == FLOAT32 ? 4 : 2), dtype, columns, to);
        memset(to + columns, 0, (ld - columns) * sizeof(float));
    }
}

/* runtime.c */
typedef void (*task)(void *context, int64_t thread, int64_t threads);
void run_parallel(task function, void *context, int64_t threads);
/* A core may be much slower than its neighbour, whose other thread another machine uses: each takes work as it gets done. */
static inline int64_t take_unit(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
/* 64-byte aligned memory of the calling thread, kept for its next call; `slot` < SCRATCH_SLOTS. NULL when out of memory. */
enum { SCRATCH_SLOTS = 4 };
void *scratch(int slot, size_t bytes);

/* One product with the weight: y = x W^T + bias, x (M, K), y (M, N); or, in the *_dx functions, x holds dY (M, N), y is
 * dX (M, K) = dY W and bias is NULL. x, y and bias are contiguous in `dtype`. The functions return 0, or -1 out of memory. */
typedef struct low_rank low_rank; /* low_rank.h */
typedef struct {
    const void *x, *bias;
    void *y;
    int dtype;
    int64_t M, N, K, threads;
    const weight *w;
    const isa *engine;
    const low_rank *low; /* to be added to y; NULL: none. lookup_linear alone takes one */
} linear_args;

int wide_linear(const linear_args *a);
int wide_linear_dx(const linear_args *a);

/* Whether rows of the weight are whole groups of 128 elements, the last one possibly half, with at most two blocks in each. */
static inline int in_groups_of_128(const linear_args *a) {
    int64_t block_size = a->w->block_size;
    return a->K % block_size == 0 && (block_size == 64 || block_size % 128 == 0);
}

/* What some machines do faster: AVX-512 for few rows, AMX for bfloat16; `usable` says whether it takes this shape. */
int lookup_usable(const linear_args *a);
int lookup_linear(const linear_args *a);
int amx_available(void);
int amx_usable(const linear_args *a);
int amx_linear(const linear_args *a);
int amx_dx_usable(const linear_args *a);
int amx_linear_dx(const linear_args *a);

#endif
