/* Products of bfloat16 matrices of which one is thin, in AMX tiles: what lora_amx.c is made of. Included under a target with amx-bf16.
 *
 * Left and right factors are packed before they are multiplied. A step is 32 products of the sum: of the left factor two tiles
 * of 16 rows, of the right one two tiles of 16 columns whose rows hold two products side by side. 32 rows (a block) times 32
 * columns (a panel) are four sums, which stay in tiles for as long as both factors last. */
#ifndef POSTTRAIN_AMX_GEMM_H
#define POSTTRAIN_AMX_GEMM_H

#include <string.h>

#include "amx.h"

enum { TILE = 512 /* bf16 in a tile */, STEP = 2 * TILE, BLOCK = 32 /* rows, columns and products of a step */ };
enum { PIECE = 512 /* columns of A at a time, rows of ranks that are laid out for packing */ };

/* A factor in memory: rows of bfloat16. Rows beyond `rows` and columns beyond `columns` read as zeros. */
typedef struct {
    const uint16_t *values;
    int64_t stride, rows, columns;
} factor;

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline __mmask32 first_words(int64_t count) { return count >= 32 ? 0xffffffff : count <= 0 ? 0 : (1u << count) - 1; }

/* 32 rows from `row` on as left steps. */
static inline void pack_left(const factor *f, int64_t row, uint16_t *out) {
    for (int64_t r = 0; r < BLOCK; r++) {
        const uint16_t *from = f->values + (row + r) * f->stride;
        uint16_t *to = out + r / 16 * TILE + r % 16 * 32;
        const int64_t columns = row + r < f->rows ? f->columns : 0;
        for (int64_t k = 0; k < f->columns; k += 32, to += STEP)
            _mm512_store_si512(to, _mm512_maskz_loadu_epi16(first_words(columns - k), from + k));
    }
}

/* The right factor is f transposed: rows [row, row + 32) become one panel's columns. */
static inline void pack_transposed(const factor *f, int64_t row, uint16_t *out) {
    uint16_t padded[16 * 32] __attribute__((aligned(64)));
    for (int64_t k = 0; k < f->columns; k += 32)
        for (int t = 0; t < 2; t++, out += TILE) {
            const uint16_t *tile = f->values + (row + 16 * t) * f->stride + k;
            int64_t stride = f->stride;
            const int64_t rows = f->rows - row - 16 * t;
            if (rows < 16 || f->columns - k < 32 || stride % 2) {
                for (int64_t r = 0; r < 16; r++)
                    _mm512_store_si512(padded + 32 * r, _mm512_maskz_loadu_epi16(r < rows ? first_words(f->columns - k) : 0, tile + r * stride));
                tile = padded, stride = 32;
            }
            __m512 pairs[16];
            transpose16((const float *)tile, stride / 2, pairs);
            for (int i = 0; i < 16; i++) _mm512_store_ps((float *)out + 16 * i, pairs[i]);
        }
}

/* The right factor is f itself: rows [row, row + 32) become one step of the panels of columns [column, column + count).
 * `panel_stride` bf16 lie between a panel and the next. */
static inline void pack_step(const factor *f, int64_t row, int64_t column, int64_t count, uint16_t *out, int64_t panel_stride) {
    const __m512i low = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,  //
                                         0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const uint16_t *from = f->values + row * f->stride + column;
    const int64_t rows = f->rows - row;
    for (int64_t k = 0; k < count; k += 32, out += panel_stride) {
        const __mmask32 kept = first_words(count - k);
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m512i a = _mm512_maskz_loadu_epi16(r < rows ? kept : 0, from + r * f->stride + k);
            __m512i b = _mm512_maskz_loadu_epi16(r + 1 < rows ? kept : 0, from + (r + 1) * f->stride + k);
            _mm512_store_si512(out + 16 * r, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(out + TILE + 16 * r, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

/* Tile 2 i + j sums rows of the left tile i times columns of the right tile j. */
static inline void clear_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
static inline void fetch_sums(const float *sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
}
static inline void put_sums(float *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

/* A thin factor fills one of its two tiles: `tall` and `wide` say whether the second counts. */
static inline void multiply(const uint16_t *left, const uint16_t *right, int64_t steps, int tall, int wide) {
    if (tall && wide)
        for (; steps; steps--, left += STEP, right += STEP) {
            _tile_loadd(4, left, 64);
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, right + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, left + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else
        for (; steps; steps--, left += STEP, right += STEP) {
            _tile_loadd(4, left, 64);
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (wide) {
                _tile_loadd(7, right + TILE, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (tall) {
                _tile_loadd(5, left + TILE, 64);
                _tile_dpbf16ps(2, 5, 6);
            }
        }
}

static inline __m512 widened(const uint16_t *x, __mmask16 kept) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, x)), 16));
}

/* Rows of y += a block's sums; `columns` of the panel's 32 exist. */
static inline void add_block(const float *sums, uint16_t *y, int64_t stride, int64_t rows, int64_t columns) {
    const __mmask32 kept = first_words(columns);
    for (int64_t r = 0; r < rows; r++, y += stride) {
        const float *row = sums + r / 16 * 512 + r % 16 * 16;
        __m512 a = _mm512_add_ps(widened(y, (__mmask16)kept), _mm512_loadu_ps(row));
        __m512 b = _mm512_add_ps(widened(y + 16, (__mmask16)(kept >> 16)), _mm512_loadu_ps(row + 256));
        _mm512_mask_storeu_epi16(y, kept, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

#endif
