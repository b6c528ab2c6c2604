/* x W^T + bias for up to 32 rows of bfloat16 and a dense W, with AMX: the base of a batch of adapters, bound by the bytes of W.
 *
 * y^T = W x^T, so that 16 rows of W by 32 columns are a tile as they lie in memory, and only x, which is small, is rearranged. Each
 * result is one chain of sums over steps of 32 columns, whatever M is: a row of x gets the same bits in any batch of up to 32.
 * Bytes: W once; x in pairs (128 K bytes) once from the second-level cache for every 32 rows of W. Flops: 2 M N K. */
#include "native.h"

#if defined(__x86_64__) && defined(__linux__)
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "amx.h"

enum { AHEAD = 16 /* steps that W is prefetched ahead */ };

typedef struct {
    const uint16_t *x, *w, *bias;
    uint16_t *y;
    int64_t M, N, K;
    uint32_t *right; /* x^T in pairs: (tiles of 16 rows) x K / 2 x 16, zero for rows past M */
} dense_job;

static void pack_rows(const dense_job *j) {
    const int64_t pairs = j->K / 2;
    for (int64_t t = 0; t < ceil_div(j->M, 16); t++)
        for (int64_t p = 0; p < pairs; p += 16) {
            float in[16][16] __attribute__((aligned(64)));
            __m512 out[16];
            for (int64_t r = 0; r < 16; r++) {
                const float *row = (const float *)(j->x + (16 * t + r) * j->K) + p;
                _mm512_store_ps(in[r], 16 * t + r < j->M ? _mm512_loadu_ps(row) : _mm512_setzero_ps());
            }
            transpose16(in[0], 16, out);
            for (int i = 0; i < 16; i++) _mm512_storeu_ps((float *)(j->right + (t * pairs + p + i) * 16), out[i]);
        }
}

/* 16 or 32 rows of W (`halves`) by one or two tiles of x. */
static inline __attribute__((always_inline)) void multiply_rows(const dense_job *j, const uint16_t *w, int halves, int tiles) {
    const int64_t K = j->K;
    const uint32_t *x0 = j->right, *x1 = x0 + K / 2 * 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += 32, x0 += 256, x1 += 256) {
        /* past a row's end lies the beginning of the next rows' block: what comes next */
        const int64_t ahead = k + 32 * AHEAD < K ? k + 32 * AHEAD : k + 32 * AHEAD - K + 16 * halves * K;
        for (int r = 0; r < 16 * halves; r++) _mm_prefetch((const char *)(w + r * K + ahead), _MM_HINT_T0);
        _tile_loadd(4, w + k, 2 * K);
        _tile_loadd(6, x0, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles == 2) {
            _tile_loadd(7, x1, 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (halves == 2) {
            _tile_loadd(5, w + 16 * K + k, 2 * K);
            _tile_dpbf16ps(1, 5, 6);
            if (tiles == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

static void dense_task(void *context, int64_t thread, int64_t threads) {
    const dense_job *j = context;
    const int64_t stop = part_start(j->N, 32, thread + 1, threads);
    configure_tiles(16, 16);
    for (int64_t n = part_start(j->N, 32, thread, threads); n < stop; n += 32) {
        const int halves = stop - n >= 32 ? 2 : 1, tiles = j->M > 16 ? 2 : 1;
        const uint16_t *w = j->w + n * j->K;
        float sums[4][256] __attribute__((aligned(64)));
        if (halves == 2 && tiles == 2) multiply_rows(j, w, 2, 2);
        else if (halves == 2) multiply_rows(j, w, 2, 1);
        else if (tiles == 2) multiply_rows(j, w, 1, 2);
        else multiply_rows(j, w, 1, 1);
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int64_t q = 0; q < 4; q++) {
            const int64_t first = n + q % 2 * 16, m = q / 2 * 16;
            __m512 rows[16], b = _mm512_setzero_ps();
            if (q % 2 >= halves || m >= j->M) continue;
            transpose16(sums[q], 16, rows);
            if (j->bias) {
                __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(j->bias + first)));
                b = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            }
            for (int64_t i = 0; i < 16 && m + i < j->M; i++) {
                __m256i y = _mm512_cvtepi32_epi16(rounded_dwords(_mm512_add_ps(rows[i], b)));
                _mm256_storeu_si256((void *)(j->y + (m + i) * j->N + first), y);
            }
        }
    }
    _tile_release();
}

/* x (M, K), w (N, K), bias (N,) or NULL, y (M, N), contiguous; M <= 32, K a multiple of 32 and N of 16. Returns 0, or -1 out of
 * memory. */
int dense_linear(const void *x, int64_t M, const void *w, const void *bias, int64_t N, int64_t K, void *y, int64_t threads) {
    dense_job j = {x, w, bias, y, M, N, K, NULL};
    j.right = scratch(0, (ceil_div(M, 16) * K / 2 * 16 + 16) * sizeof(uint32_t));
    if (!j.right) return -1;
    pack_rows(&j);
    run_parallel(dense_task, &j, threads);
    return 0;
}
END_TARGET
#else
int dense_linear(const void *x, int64_t M, const void *w, const void *bias, int64_t N, int64_t K, void *y, int64_t threads) {
    return (void)x, (void)M, (void)w, (void)bias, (void)N, (void)K, (void)y, (void)threads, -1;
}
#endif
