/* Rows of a layer's weight, dense or in 4 bits, as a factor of a product. Included under a target with amx-bf16. */
#ifndef POSTTRAIN_AMX_BASE_H
#define POSTTRAIN_AMX_BASE_H

#include "amx_gemm.h"
#include "many_rows.h"

static inline int64_t steps_of(int64_t n) { return ceil_div(n, BLOCK); }
static inline int has_base(const many_rows_layer *l) { return l->dense || l->packed; }

static inline weight base_of(const many_rows_layer *l) {
    if (!l->packed) return (weight){0};
    return make_weight(l->packed, l->absmax, l->nested_absmax, l->nested_offset, l->nested_block_size, l->block_size, l->quant_type);
}

/* Rows [n, n + most) of W (N, K), as far as there are any, and columns [k, k + count); `room` (most, PIECE) is where 4 bits are decoded. */
static inline factor rows_of_base(const many_rows_layer *l, const weight *w, int64_t n, int64_t most, int64_t K, int64_t k, int64_t count,
                                  uint16_t *room) {
    const int64_t rows = at_most(l->N - n, most);
    if (l->dense) return (factor){.values = l->dense + n * K + k, .stride = K, .rows = rows, .columns = count};
    float absmax[PIECE / 16 + 2];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t start = (n + r) * K + k, first = start / w->block_size;
        isa_avx512.decode_absmax(w, first, (start + count - 1) / w->block_size - first + 1, absmax);
        isa_avx512.dequantize(w, absmax, start, count, BFLOAT16, room + r * PIECE);
    }
    return (factor){.values = room, .stride = PIECE, .rows = rows, .columns = count};
}

#endif
