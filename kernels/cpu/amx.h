/* AMX tiles of bfloat16: what the forward product and dX share. Included under a target with amx-tile and amx-bf16. */
#ifndef POSTTRAIN_AMX_H
#define POSTTRAIN_AMX_H

#include "decode128.h"

/* Tiles 0..3 hold sums (16 x 16 fp32), 4 and 5 the left factor (16 rows of 32 bf16), 6 and 7 the right one (16 rows of up to 16
 * pairs of bf16: rows 2i and 2i + 1 of the factor side by side). */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_config;

/* left_rows: rows of the left factor and of the sums; right_columns: columns of the right factor and of the sums. */
static inline void configure_tiles(int left_rows, int right_columns) {
    tile_config c = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        c.rows[t] = t < 6 ? left_rows : 16;
        c.bytes_per_row[t] = t == 4 || t == 5 ? 64 : 4 * right_columns;
    }
    __asm__ volatile("" : : "r"(&c) : "memory"); /* gcc believes that the instruction reads eight bytes: all 64 must be there */
    _tile_loadconfig(&c);
}

static inline void transpose16(const float *in, int64_t in_stride, __m512 *out) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * in_stride);
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    /* r[4q + c] holds, in 128-bit lane l, rows 4q..4q+3 of column 4l + c */
    for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), high = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), high2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        out[c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low, low2, 0x88));
        out[8 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low, low2, 0xdd));
        out[4 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(high, high2, 0x88));
        out[12 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

#endif
