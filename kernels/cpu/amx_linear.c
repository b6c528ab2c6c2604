/* x W^T for rows of bfloat16 with AMX: 32 rows of W are decoded 128 columns at a time into 8 KiB of the first-level cache and
 * multiplied from there, y^T = W x^T, so that W lies as it is decoded and only x, which is small, is rearranged.
 *
 * Bytes: the packed weight once for up to 32 rows of x (the sums stay in tiles), and for more (the sums then go
 * through memory once every 512 columns). Flops: 2 M N K; a tile product is 16384 flops in 16 cycles. */
#include "native.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "amx.h"

enum { ROWS = 32, STRIPES = 8, CHUNK = 512, AHEAD = 4 /* groups prefetched ahead */ };

typedef struct {
    const linear_args *args;
    uint32_t *right; /* x^T in pairs: (tiles of 16 rows of x) x (K padded to 128) / 2 x columns */
    int64_t padded;  /* K rounded up to 128 */
    int columns;     /* rows of x in a tile: 16, or M when M < 16 */
    int failed;
} amx_job;

/* Tiles of 16 rows of x: reordered as decode128 orders W, then transposed by pairs. */
static void pack_task(void *context, int64_t thread, int64_t threads) {
    amx_job *j = context;
    const linear_args *a = j->args;
    uint16_t *ordered = scratch(1, (16 * j->padded + 1) * sizeof(uint16_t));
    if (!ordered) {
        j->failed = 1;
        return;
    }
    int64_t tiles = ceil_div(a->M, 16), pairs = j->padded / 2;
    for (int64_t t = part_start(tiles, 1, thread, threads); t < part_start(tiles, 1, thread + 1, threads); t++) {
        int64_t rows = a->M - 16 * t < 16 ? a->M - 16 * t : 16;
        for (int64_t r = 0; r < rows; r++)
            order128((const uint16_t *)a->x + (16 * t + r) * a->K, a->K, ordered + r * j->padded);
        memset(ordered + rows * j->padded, 0, (16 - rows) * j->padded * sizeof(uint16_t));
        uint32_t *out = j->right + t * pairs * j->columns;
        if (j->columns == 1) {
            memcpy(out, ordered, pairs * sizeof(uint32_t));
            continue;
        }
        __mmask16 kept = (1 << j->columns) - 1;
        for (int64_t p = 0; p < pairs; p += 16) {
            __m512 rows16[16];
            transpose16((const float *)ordered + p, pairs, rows16);
            for (int i = 0; i < 16; i++) _mm512_mask_storeu_ps((float *)out + (p + i) * j->columns, kept, rows16[i]);
        }
    }
}

/* Groups [first, last) of 128 columns of up to 32 rows of W, to tile (32, 128 * (last - first)). */
static inline void decode_rows(const linear_args *a, const float *absmax, int64_t n, int64_t rows, int64_t first, int64_t last,
                               uint16_t *tile) {
    const int64_t K = a->K, block_size = a->w->block_size, blocks = K / block_size, groups = ceil_div(K, 128);
    const int64_t stride = 128 * (last - first);
    for (int64_t g = first; g < last; g++) {
        /* the next rows' beginning follows this row's end */
        int64_t ahead = g + AHEAD < groups ? 64 * AHEAD : 64 * (AHEAD - groups) + ROWS * K / 2;
        int64_t block = g * 128 / block_size, second = block_size == 64 && block + 1 < blocks;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *row = a->w->packed + (n + r) * K / 2;
            const float *am = absmax + r * blocks + block;
            __m512i w[4];
            _mm_prefetch((const char *)row + 64 * g + ahead, _MM_HINT_T0);
            decode128(a->w->book->values, group_bytes(row, g, K), am[0], am[second], w);
            for (int v = 0; v < 4; v++) _mm512_store_si512(tile + r * stride + (g - first) * 128 + 32 * v, w[v]);
        }
    }
}

/* sums (tiles 0..3: rows 0..15 and 16..31 of W by one or two tiles of x) += the tile of W times x over `steps` of 32 columns; steps
 * are a multiple of 4. A tile product waits for the one before on the same sums: with one tile of x, tiles 2 and 3 take every
 * other step of it, and add_halves adds them up in the end. */
static inline void multiply(const uint16_t *w, int64_t stride, const uint32_t *x0, const uint32_t *x1, int columns, int64_t steps,
                            int both) {
    for (int64_t s = 0; s < steps; s += both ? 1 : 2) {
        _tile_loadd(4, w + 32 * s, stride * 2);
        _tile_loadd(5, w + 16 * stride + 32 * s, stride * 2);
        _tile_loadd(6, x0 + 16 * s * columns, 4 * columns);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (both) {
            _tile_loadd(7, x1 + 16 * s * columns, 4 * columns);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_loadd(4, w + 32 * (s + 1), stride * 2);
            _tile_loadd(5, w + 16 * stride + 32 * (s + 1), stride * 2);
            _tile_loadd(7, x0 + 16 * (s + 1) * columns, 4 * columns);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}
static inline void add_halves(float *sums) {
    for (int i = 0; i < 512; i++) sums[i] += sums[512 + i];
}

static inline void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
static inline void store_sums(float *sums, int columns) {
    _tile_stored(0, sums, 4 * columns);
    _tile_stored(1, sums + 256, 4 * columns);
    _tile_stored(2, sums + 512, 4 * columns);
    _tile_stored(3, sums + 768, 4 * columns);
}
static inline void load_sums(const float *sums, int columns) {
    _tile_loadd(0, sums, 4 * columns);
    _tile_loadd(1, sums + 256, 4 * columns);
    _tile_loadd(2, sums + 512, 4 * columns);
    _tile_loadd(3, sums + 768, 4 * columns);
}

/* y[m, n .. n + 16) for the rows of x of one tile, from sums (16, columns) of y^T. */
static void write_outputs(const linear_args *a, const float *sums, int columns, int64_t n, int64_t m, int64_t rows, int64_t outputs) {
    uint16_t *y = (uint16_t *)a->y;
    const uint16_t *bias = a->bias;
    if (columns < 16) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t o = 0; o < outputs; o++)
                y[(m + i) * a->N + n + o] = float_to_bf16(sums[o * columns + i] + (bias ? bf16_to_float(bias[n + o]) : 0));
        return;
    }
    __m512 transposed[16], b = _mm512_setzero_ps();
    __mmask16 kept = outputs < 16 ? (1 << outputs) - 1 : 0xffff;
    transpose16(sums, 16, transposed);
    if (bias) b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, bias + n)), 16));
    for (int64_t i = 0; i < rows; i++)
        _mm256_mask_storeu_epi16(y + (m + i) * a->N + n, kept,
                                 _mm512_cvtepi32_epi16(rounded_dwords(_mm512_add_ps(transposed[i], b))));
}

static void amx_task(void *context, int64_t thread, int64_t threads) {
    amx_job *j = context;
    const linear_args *a = j->args;
    const int64_t groups = j->padded / 128, pairs = ceil_div(a->M, 32), blocks = a->K / a->w->block_size;
    /* up to 32 rows of x: the sums stay in tiles; else they go through memory, and each 32 rows of x that come into the first-level
     * cache meet 256 rows of W */
    const int64_t chunk = pairs == 1 ? 1 : CHUNK / 128, stripes = pairs == 1 ? 1 : STRIPES, stripe = ROWS * chunk * 128;
    const int64_t pair_stride = j->padded * j->columns;
    const size_t tile_bytes = stripes * stripe * 2, sums_bytes = stripes * pairs * 4096;
    char *memory = scratch(1, tile_bytes + sums_bytes + (stripes * ROWS * blocks + 16) * sizeof(float));
    if (!memory) {
        j->failed = 1;
        return;
    }
    uint16_t *tile = (uint16_t *)memory;
    float *sums = (float *)(memory + tile_bytes), *absmax = (float *)(memory + tile_bytes + sums_bytes);
    memset(tile, 0, tile_bytes);
    configure_tiles(16, j->columns);
    const int64_t stop = part_start(a->N, ROWS, thread + 1, threads);
    for (int64_t n = part_start(a->N, ROWS, thread, threads); n < stop; n += stripes * ROWS) {
        const int64_t rows = stop - n < stripes * ROWS ? stop - n : stripes * ROWS, here = ceil_div(rows, ROWS);
        a->engine->decode_absmax(a->w, n * blocks, rows * blocks, absmax);
        zero_sums();
        for (int64_t g = 0; g < groups; g += chunk) {
            const int64_t last = g + chunk < groups ? g + chunk : groups, stride = 128 * (last - g), steps = 4 * (last - g);
            for (int64_t i = 0; i < here; i++)
                decode_rows(a, absmax + i * ROWS * blocks, n + i * ROWS, rows - i * ROWS < ROWS ? rows - i * ROWS : ROWS, g, last,
                            tile + i * stripe);
            for (int64_t p = 0; p < pairs; p++) {
                const uint32_t *x0 = j->right + p * pair_stride + g * 64 * j->columns, *x1 = x0 + pair_stride / 2;
                for (int64_t i = 0; i < here; i++) {
                    float *s = sums + (p * stripes + i) * 1024;
                    if (pairs > 1) g ? load_sums(s, 16) : zero_sums();
                    if (p * 32 + 16 < a->M) multiply(tile + i * stripe, stride, x0, x1, j->columns, steps, 1);
                    else multiply(tile + i * stripe, stride, x0, x1, j->columns, steps, 0);
                    if (pairs > 1) store_sums(s, 16);
                }
            }
        }
        if (pairs == 1) store_sums(sums, j->columns);
        for (int64_t p = 0; p < pairs; p++) {
            if (p * 32 + 16 >= a->M)
                for (int64_t i = 0; i < here; i++) add_halves(sums + (p * stripes + i) * 1024);
            for (int64_t q = 0; q < 4 * here; q++) { /* a quarter of four: W's half q % 2, x's tile q / 2 % 2 */
                int64_t from = q / 4 * ROWS + q % 2 * 16, m = p * 32 + q / 2 % 2 * 16;
                if (m < a->M && from < rows)
                    write_outputs(a, sums + (p * stripes + q / 4) * 1024 + q % 4 * 256, j->columns, n + from, m,
                                  a->M - m < 16 ? a->M - m : 16, rows - from < 16 ? rows - from : 16);
            }
        }
    }
    _tile_release();
}

/* The processor has tiles, the system saves them, and this process may use them (Linux asks for that once). */
int amx_available(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx >> 22 & 1) || !(edx >> 24 & 1)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return 0;
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

int amx_usable(const linear_args *a) { return a->dtype == BFLOAT16 && a->M >= 1 && in_groups_of_128(a); }

int amx_linear(const linear_args *a) {
    amx_job j = {.args = a, .padded = ceil_div(a->K, 128) * 128, .columns = a->M < 16 ? a->M : 16};
    j.right = scratch(0, (ceil_div(a->M, 32) * 32 / 16 * j.padded / 2 * j.columns + 16) * sizeof(uint32_t));
    if (!j.right) return -1;
    run_parallel(pack_task, &j, a->M > 16 ? a->threads : 1);
    if (!j.failed) run_parallel(amx_task, &j, a->threads);
    return -j.failed;
}
END_TARGET
#else
int amx_available(void) { return 0; }
int amx_usable(const linear_args *a) { return (void)a, 0; }
int amx_linear(const linear_args *a) { return (void)a, -1; }
#endif
