/* Products of bfloat16 matrices in AMX tiles: what amx_many.c is made of. Included under a target with amx-bf16.
 *
 * A step is 32 products of the sum: of the left factor two tiles of 16 rows, of the right one two tiles of 16 columns whose rows
 * hold two products side by side, which has to be packed. 32 rows (a block) times 32 columns (a panel) are four sums, which stay
 * in tiles for as long as both factors last: four tiles are loaded for four products of 16 cycles, as fast as the second-level
 * cache gives them. */
#ifndef POSTTRAIN_AMX_GEMM_H
#define POSTTRAIN_AMX_GEMM_H

#include <string.h>

#include "amx.h"

enum { TILE = 512 /* bf16 in a tile */, STEP = 2 * TILE, BLOCK = 32 /* rows, columns and products of a step */ };
enum { PIECE = 512 /* columns of a right factor that are gathered or decoded at a time */ };
enum { SUMS = 4 * 256 };

/* A factor in memory: rows of bfloat16. Rows beyond `rows` and columns beyond `columns` read as zeros. */
typedef struct {
    const uint16_t *values;
    int64_t stride, rows, columns;
} factor;

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

/* The right factor is f transposed: rows [row, row + 32) become one panel's columns. The next panel's rows are fetched meanwhile:
 * each is too short to be found out as a stream. */
static inline void pack_transposed(const factor *f, int64_t row, uint16_t *out) {
    uint16_t padded[16 * 32] __attribute__((aligned(64)));
    for (int64_t k = 0; k < f->columns; k += 32)
        for (int t = 0; t < 2; t++, out += TILE) {
            const uint16_t *tile = f->values + (row + 16 * t) * f->stride + k;
            int64_t stride = f->stride;
            const int64_t rows = f->rows - row - 16 * t;
            for (int64_t r = 0; r < 16; r++) _mm_prefetch((const char *)(tile + (BLOCK + r) * stride), _MM_HINT_T1);
            if (rows < 16 || f->columns - k < 32 || stride % 2) {
                const __mmask32 kept = first_words(f->columns - k);
                for (int64_t r = 0; r < 16; r++)
                    _mm512_store_si512(padded + 32 * r, _mm512_maskz_loadu_epi16(r < rows ? kept : 0, tile + r * stride));
                tile = padded, stride = 32;
            }
            __m512 pairs[16];
            transpose16((const float *)tile, stride / 2, pairs);
            for (int i = 0; i < 16; i++) _mm512_store_ps((float *)out + 16 * i, pairs[i]);
        }
}

/* Two rows side by side as rows of two right tiles. */
static inline void interleave(__m512i even, __m512i odd, uint16_t *out) {
    const __m512i low = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,  //
                                         0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_store_si512(out, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(out + TILE, _mm512_permutex2var_epi16(even, high, odd));
}

/* The right factor is f itself: rows [row, row + 32) become one step of the panels of columns [column, column + count).
 * `panel_stride` bf16 lie between a panel and the next. The next step's rows are fetched meanwhile. */
static inline void pack_step(const factor *f, int64_t row, int64_t column, int64_t count, uint16_t *out, int64_t panel_stride) {
    const int64_t rows = f->rows - row;
    for (int64_t r = 0; r < BLOCK; r += 2, out += 32) {
        const uint16_t *even = f->values + (row + r) * f->stride + column, *odd = even + f->stride;
        uint16_t *to = out;
        int64_t k = 0;
        for (; k + 32 <= count && r + 1 < rows; k += 32, to += panel_stride) {
            _mm_prefetch((const char *)(even + BLOCK * f->stride + k), _MM_HINT_T1);
            _mm_prefetch((const char *)(odd + BLOCK * f->stride + k), _MM_HINT_T1);
            interleave(_mm512_loadu_si512(even + k), _mm512_loadu_si512(odd + k), to);
        }
        for (; k < count; k += 32, to += panel_stride) {
            const __mmask32 kept = first_words(count - k), of_even = r < rows ? kept : 0, of_odd = r + 1 < rows ? kept : 0;
            interleave(_mm512_maskz_loadu_epi16(of_even, even + k), _mm512_maskz_loadu_epi16(of_odd, odd + k), to);
        }
    }
}

/* A block of a left factor: `row` elements from a row to the next, `half` from row 0 to row 16, `step` from a step to the next. */
typedef struct {
    const uint16_t *values;
    int64_t row, half, step, steps;
} left_steps;

static inline left_steps packed_steps(const uint16_t *left, int64_t steps) { return (left_steps){left, 32, TILE, STEP, steps}; }

/* The factor's block of rows from `row` on: as it lies where it has whole tiles, else packed to `room`. */
static inline left_steps block_of(const factor *f, int64_t row, uint16_t *room) {
    const int64_t steps = ceil_div(f->columns, 32);
    if (row + BLOCK <= f->rows && f->columns % 32 == 0)
        return (left_steps){f->values + row * f->stride, f->stride, 16 * f->stride, 32, steps};
    pack_left(f, row, room);
    return packed_steps(room, steps);
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

static inline void multiply(left_steps l, const uint16_t *right) {
    for (; l.steps; l.steps--, l.values += l.step, right += STEP) {
        _tile_loadd(4, l.values, 2 * l.row);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, l.values + l.half, 2 * l.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* A product on the same sums waits for the one before, longer than two others take. So a factor of 16 ranks or fewer, which fills
 * one of its two tiles, uses the other half's sums for every other step; the two halves are added up in the end. */

/* 16 columns: tiles 0 and 2 (right tile 0) take the even steps, 1 and 3 the odd ones. */
static inline void multiply_16_columns(left_steps l, const uint16_t *right) {
    for (int64_t s = 0; s < l.steps; s++, l.values += l.step, right += STEP) {
        _tile_loadd(4, l.values, 2 * l.row);
        _tile_loadd(5, l.values + l.half, 2 * l.row);
        if (s % 2 == 0) {
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        } else {
            _tile_loadd(7, right, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}
static inline void add_odd_columns(float *sums) {
    for (int half = 0; half < SUMS; half += 512)
        for (int i = 0; i < 256; i++) sums[half + i] += sums[half + 256 + i], sums[half + 256 + i] = 0;
}

/* 16 rows: tiles 0 and 1 take the even steps, 2 and 3 the odd ones. */
static inline void multiply_16_rows(left_steps l, const uint16_t *right) {
    for (int64_t s = 0; s < l.steps; s++, l.values += l.step, right += STEP) {
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + TILE, 64);
        if (s % 2 == 0) {
            _tile_loadd(4, l.values, 2 * l.row);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        } else {
            _tile_loadd(5, l.values, 2 * l.row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}
static inline void add_odd_rows(float *sums) {
    for (int i = 0; i < 512; i++) sums[i] += sums[512 + i], sums[512 + i] = 0;
}

static inline __m512 widened(const uint16_t *x, __mmask16 kept) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, x)), 16));
}

/* A block's place in the result: `columns` of the panel's 32 exist. */
typedef struct {
    uint16_t *y;
    int64_t stride, rows, columns;
} place;

/* The result's lines are fetched to be written while the sums are made: stores would wait for each of them in turn. */
static inline void expect_block(const place *to) {
    for (int64_t r = 0; r < to->rows; r++) __builtin_prefetch(to->y + r * to->stride, 1, 3);
}

/* y = sums + bias, or y += sums. */
static inline void put_block(const float *sums, const place *to, const uint16_t *bias) {
    const __mmask32 kept = first_words(to->columns);
    const __m512 low = bias ? widened(bias, (__mmask16)kept) : _mm512_setzero_ps();
    const __m512 high = bias ? widened(bias + 16, (__mmask16)(kept >> 16)) : _mm512_setzero_ps();
    for (int64_t r = 0; r < to->rows; r++) {
        const float *row = sums + r / 16 * 512 + r % 16 * 16;
        __m512 a = _mm512_add_ps(_mm512_load_ps(row), low), b = _mm512_add_ps(_mm512_load_ps(row + 256), high);
        _mm512_mask_storeu_epi16(to->y + r * to->stride, kept, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}
static inline void add_block(const float *sums, const place *to) {
    const __mmask32 kept = first_words(to->columns);
    for (int64_t r = 0; r < to->rows; r++) {
        const float *row = sums + r / 16 * 512 + r % 16 * 16;
        uint16_t *y = to->y + r * to->stride;
        __m512 a = _mm512_add_ps(widened(y, (__mmask16)kept), _mm512_load_ps(row));
        __m512 b = _mm512_add_ps(widened(y + 16, (__mmask16)(kept >> 16)), _mm512_load_ps(row + 256));
        _mm512_mask_storeu_epi16(y, kept, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

#endif
