/* dX = dY W for rows of bfloat16 with AMX: 128 or 512 rows of W are decoded 128 columns at a time, two rows interleaved as the right
 * factor of a tile product wants them; a thread owns a range of columns and keeps their sums.
 *
 * Bytes: the packed weight once, dY once for each 128 columns from the cache. Flops: 2 M N K. */
#include "native.h"

#if defined(__x86_64__) && defined(__linux__)
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "amx.h"

enum { FEW_ROWS = 128, MANY_ROWS = 512, AHEAD = 8 /* rows prefetched ahead */, RIGHT_TILE = 512 /* bf16 in a tile */ };

typedef struct {
    const linear_args *args;
    const uint16_t *left; /* dY, rows padded to a multiple of 16 (or M when M < 16) and columns to a multiple of 32 */
    int64_t stride;
    int left_rows, failed;
} dx_job;

/* Rows [n, n + rows) of column group g to right: [32 rows of W][vector j][half h][pair of rows][16 columns][2]. */
static inline void decode_pairs(const linear_args *a, const float *absmax, int64_t blocks, int64_t n, int64_t rows, int64_t g,
                                int64_t first_group, uint16_t *right) {
    const int64_t K = a->K, block_size = a->w->block_size;
    const int64_t block = g * 128 / block_size - first_group * 128 / block_size, second = block_size == 64 && block + 1 < blocks;
    for (int64_t r = 0; r < ceil_div(rows, 32) * 32; r += 2) {
        __m512i w[2][4];
        for (int i = 0; i < 2; i++) {
            const uint8_t *row = a->w->packed + (n + r + i) * K / 2;
            const float *am = absmax + (r + i) * blocks + block;
            _mm_prefetch((const char *)row + AHEAD * K / 2 + 64 * g, _MM_HINT_T0);
            if (r + i < rows) decode128(a->w->book->values, group_bytes(row, g, K), am[0], am[second], w[i]);
            else w[i][0] = w[i][1] = w[i][2] = w[i][3] = _mm512_setzero_si512();
        }
        uint16_t *out = right + r / 32 * 8 * RIGHT_TILE + r % 32 * 16;
        for (int j = 0; j < 4; j++) {
            _mm512_store_si512(out + 2 * j * RIGHT_TILE, _mm512_unpacklo_epi16(w[0][j], w[1][j]));
            _mm512_store_si512(out + (2 * j + 1) * RIGHT_TILE, _mm512_unpackhi_epi16(w[0][j], w[1][j]));
        }
    }
}

/* Sums of 16 or 32 rows of dY by two right tiles += `steps` products over 32 rows of W each. */
static inline void multiply(float *sums, int fresh, const uint16_t *left, int64_t stride, const uint16_t *right, int64_t steps,
                            int both) {
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(2, sums + 512, 64);
        if (both) _tile_loadd(1, sums + 256, 64);
        if (both) _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, left + 32 * s, 2 * stride);
        _tile_loadd(6, right + 8 * RIGHT_TILE * s, 64);
        _tile_loadd(7, right + 8 * RIGHT_TILE * s + RIGHT_TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 4, 7);
        if (both) {
            _tile_loadd(5, left + 16 * stride + 32 * s, 2 * stride);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 512, 64);
    if (both) _tile_stored(1, sums + 256, 64);
    if (both) _tile_stored(3, sums + 768, 64);
}

/* One row of one group: sums of vector j's half h at sums + 1024 * j + 512 * h, back in the order of the columns. */
static inline void write_group(const float *sums, uint16_t *dx, int64_t count) {
    __m512i v[4];
    for (int j = 0; j < 4; j++) /* lane by lane, as unpacklo and unpackhi took them apart */
        v[j] = _mm512_packus_epi32(rounded_dwords(_mm512_loadu_ps(sums + 1024 * j)),
                                   rounded_dwords(_mm512_loadu_ps(sums + 1024 * j + 512)));
    uint16_t row[128];
    for (int h = 0; h < 2; h++) { /* word i of vector j is column 4 i + j */
        __m512i v01 = h ? _mm512_unpackhi_epi16(v[0], v[1]) : _mm512_unpacklo_epi16(v[0], v[1]);
        __m512i v23 = h ? _mm512_unpackhi_epi16(v[2], v[3]) : _mm512_unpacklo_epi16(v[2], v[3]);
        __m512i low = _mm512_unpacklo_epi32(v01, v23), high = _mm512_unpackhi_epi32(v01, v23);
        uint16_t *out = row + 16 * h;
        _mm_storeu_si128((void *)out, _mm512_castsi512_si128(low));
        _mm_storeu_si128((void *)(out + 8), _mm512_castsi512_si128(high));
        _mm_storeu_si128((void *)(out + 32), _mm512_extracti32x4_epi32(low, 1));
        _mm_storeu_si128((void *)(out + 40), _mm512_extracti32x4_epi32(high, 1));
        _mm_storeu_si128((void *)(out + 64), _mm512_extracti32x4_epi32(low, 2));
        _mm_storeu_si128((void *)(out + 72), _mm512_extracti32x4_epi32(high, 2));
        _mm_storeu_si128((void *)(out + 96), _mm512_extracti32x4_epi32(low, 3));
        _mm_storeu_si128((void *)(out + 104), _mm512_extracti32x4_epi32(high, 3));
    }
    memcpy(dx, row, count * sizeof(uint16_t));
}

static void dx_task(void *context, int64_t thread, int64_t threads) {
    dx_job *j = context;
    const linear_args *a = j->args;
    const int64_t block_size = a->w->block_size, unit = block_size > 128 ? block_size : 128;
    const int64_t first = part_start(a->K, unit, thread, threads), last = part_start(a->K, unit, thread + 1, threads);
    const int64_t first_group = first / 128, groups = ceil_div(last, 128) - first_group, pairs = ceil_div(a->M, 32);
    const int64_t blocks = (last - first) / block_size, row_blocks = a->K / block_size;
    if (first == last) return;
    /* rows of W decoded at a time: what the first-level cache holds, or more so that many sums are moved more rarely */
    const int64_t chunk = pairs == 1 ? FEW_ROWS : MANY_ROWS;
    const size_t right_bytes = chunk * 128 * 2, sums_bytes = pairs * groups * 4096 * sizeof(float);
    char *memory = scratch(1, right_bytes + sums_bytes + (chunk * blocks + 16) * sizeof(float));
    if (!memory) {
        j->failed = 1;
        return;
    }
    uint16_t *right = (uint16_t *)memory;
    float *sums = (float *)(memory + right_bytes), *absmax = (float *)(memory + right_bytes + sums_bytes);
    configure_tiles(j->left_rows, 16);
    for (int64_t n = 0; n < a->N; n += chunk) {
        int64_t rows = a->N - n < chunk ? a->N - n : chunk;
        for (int64_t r = 0; r < rows; r++)
            a->engine->decode_absmax(a->w, (n + r) * row_blocks + first / block_size, blocks, absmax + r * blocks);
        for (int64_t g = 0; g < groups; g++) {
            decode_pairs(a, absmax, blocks, n, rows, first_group + g, first_group, right);
            for (int64_t p = 0; p < pairs; p++)
                for (int64_t v = 0; v < 4; v++) {
                    float *s = sums + ((p * groups + g) * 4 + v) * 1024;
                    const uint16_t *left = j->left + 32 * p * j->stride + n, *r = right + 2 * v * RIGHT_TILE;
                    if (32 * p + 16 < a->M) multiply(s, n == 0, left, j->stride, r, ceil_div(rows, 32), 1);
                    else multiply(s, n == 0, left, j->stride, r, ceil_div(rows, 32), 0);
                }
        }
    }
    _tile_release();
    for (int64_t m = 0; m < a->M; m++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t k = first + 128 * g, count = last - k < 128 ? last - k : 128;
            write_group(sums + (m / 32 * groups + g) * 4096 + m % 32 * 16, (uint16_t *)a->y + m * a->K + k, count);
        }
}

int amx_dx_usable(const linear_args *a) { return amx_usable(a) && a->N >= 1; }

static void pad_task(void *context, int64_t thread, int64_t threads) {
    const dx_job *j = context;
    const linear_args *a = j->args;
    const int64_t rows = ceil_div(a->M, 16) * 16;
    for (int64_t m = part_start(rows, 1, thread, threads); m < part_start(rows, 1, thread + 1, threads); m++) {
        uint16_t *to = (uint16_t *)j->left + m * j->stride;
        int64_t count = m < a->M ? a->N : 0;
        memcpy(to, (const uint16_t *)a->x + m * a->N, count * sizeof(uint16_t));
        memset(to + count, 0, (j->stride - count) * sizeof(uint16_t));
    }
}

int amx_linear_dx(const linear_args *a) {
    dx_job j = {.args = a, .left = a->x, .stride = a->N, .left_rows = a->M < 16 ? a->M : 16};
    if (a->N % 32 || a->M > 16) { /* a stride of a power of two would put the rows of a tile into a few cache sets: 32 more */
        j.stride = ceil_div(a->N, 32) * 32 + 32;
        j.left = scratch(0, ceil_div(a->M, 16) * 16 * j.stride * sizeof(uint16_t));
        if (!j.left) return -1;
        run_parallel(pad_task, &j, a->M > 16 ? a->threads : 1);
    }
    run_parallel(dx_task, &j, a->threads);
    return -j.failed;
}
END_TARGET
#else
int amx_dx_usable(const linear_args *a) { return (void)a, 0; }
int amx_linear_dx(const linear_args *a) { return (void)a, -1; }
#endif
