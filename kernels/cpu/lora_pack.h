/* What the products of lora_amx.c are made of: where each layer's ranks, steps and panels lie, and the right factors packed. Included
 * under a target with amx-bf16. */
#ifndef POSTTRAIN_LORA_PACK_H
#define POSTTRAIN_LORA_PACK_H

#include "amx_gemm.h"
#include "lora.h"

/* A block's left factor meets DEPTH steps of WIDTH panels, which stay in the second-level cache while ROWS rows pass; between
 * depths the sums wait in memory. */
enum { DEPTH = 24, WIDTH = 16, BLOCKS = 16, MAX_LAYERS = 4 };

typedef struct {
    const lora_args *args;
    factor weight[MAX_LAYERS];
    weight packed[MAX_LAYERS];
    int64_t steps[MAX_LAYERS];      /* of the sum: over K forward, over N backward; where the layer's first begins */
    int64_t first_step[MAX_LAYERS];
    int64_t first_rank[MAX_LAYERS], rank_step[MAX_LAYERS], rank_steps[MAX_LAYERS]; /* columns of s and V; steps that hold them */
    int64_t first_panel[MAX_LAYERS + 1];
    int64_t main_steps, all_rank_steps, ranks, panel_stride;
    int wide;                       /* whether s and V have more than 16 columns */
    uint16_t *right;                /* the product's right factor, panel by panel */
    uint16_t *low;                  /* the right factors of s (forward, backward) and V (backward) */
    uint16_t *columns_V, *columns_s; /* V^T and s^T as left factors over M: [32 ranks][step of M] */
    int64_t m_steps;
    int failed;
} lora_job;

static int64_t steps_of(int64_t n) { return ceil_div(n, BLOCK); }

/* Where each layer's ranks go: side by side in one step if that holds them all, else each layer begins a new step. */
static void place_ranks(lora_job *j) {
    const lora_args *a = j->args;
    int64_t total = 0;
    for (int64_t i = 0; i < a->layers; i++) total += a->layer[i].r;
    const int together = total <= BLOCK;
    int64_t rank = 0;
    for (int64_t i = 0; i < a->layers; i++) {
        if (!together) rank = steps_of(rank) * BLOCK;
        j->first_rank[i] = rank;
        j->rank_step[i] = rank / BLOCK;
        j->rank_steps[i] = together ? steps_of(total) : steps_of(a->layer[i].r);
        rank += a->layer[i].r;
    }
    j->ranks = rank;
    j->all_rank_steps = steps_of(rank);
    j->wide = rank > 16;
}

static void set_up(lora_job *j, const lora_args *a, const isa *engine, int backward) {
    *j = (lora_job){.args = a};
    place_ranks(j);
    int64_t panels = 0, steps = 0;
    for (int64_t i = 0; i < a->layers; i++) {
        const lora_layer *l = &a->layer[i];
        j->weight[i] = (factor){.values = l->weight, .stride = a->K, .rows = l->N, .columns = a->K, .engine = engine};
        if (l->block_size) {
            j->packed[i] = (weight){l->weight, l->absmax, l->nested_absmax, l->nested_absmax ? *l->nested_offset : 0,
                                    l->nested_block_size, l->block_size, &codebooks[l->quant_type]};
            j->weight[i].w = &j->packed[i];
        }
        j->first_panel[i] = panels, j->first_step[i] = backward ? steps : 0;
        j->steps[i] = steps_of(backward ? l->N : a->K);
        panels += steps_of(l->N), steps += j->steps[i];
    }
    j->first_panel[a->layers] = backward ? steps_of(a->K) : panels;
    j->main_steps = backward ? steps : steps_of(a->K);
    j->panel_stride = (j->main_steps + j->all_rank_steps) * STEP;
    j->m_steps = steps_of(a->M);
    j->right = a->workspace;
}

/* Right factors are made by all threads: each takes a run of steps or of panels. */
typedef struct {
    lora_job *job;
    uint16_t *s, *v; /* the right factors of s, panels of [steps of K], and of V, panels of [steps of all N] */
} low_factors;

static low_factors low_of(lora_job *j) {
    return (low_factors){j, j->low, j->low + j->all_rank_steps * steps_of(j->args->K) * STEP};
}

/* Columns [k, k + count) of the layers' A, each row at its place among the ranks of `panel`: out (32, PIECE). */
static factor rows_of_A(const lora_job *j, int64_t panel, int64_t k, int64_t count, uint16_t *out) {
    const lora_args *a = j->args;
    memset(out, 0, BLOCK * PIECE * sizeof *out);
    for (int64_t i = 0; i < a->layers; i++)
        for (int64_t r = 0; r < a->layer[i].r; r++) {
            const int64_t at = j->first_rank[i] + r - panel * BLOCK;
            if (at >= 0 && at < BLOCK) memcpy(out + at * PIECE, a->layer[i].A + r * a->K + k, count * sizeof *out);
        }
    return (factor){.values = out, .stride = PIECE, .rows = BLOCK, .columns = count};
}

/* The right factor of s = x A^T: ranks become columns. */
static void pack_ranks_of_A(const lora_job *j, int64_t panel, uint16_t *out) {
    const int64_t K = j->args->K;
    uint16_t rows[BLOCK * PIECE] __attribute__((aligned(64)));
    for (int64_t k = 0; k < K; k += PIECE, out += PIECE / 32 * STEP) {
        const factor A = rows_of_A(j, panel, k, at_most(K - k, PIECE), rows);
        pack_transposed(&A, 0, out);
    }
}

/* The last steps of [W ; A]: ranks are what is summed over. */
static void pack_step_of_A(const lora_job *j, int64_t step, uint16_t *out) {
    const int64_t K = j->args->K;
    uint16_t rows[BLOCK * PIECE] __attribute__((aligned(64)));
    for (int64_t k = 0; k < K; k += PIECE, out += PIECE / 32 * j->panel_stride) {
        const factor A = rows_of_A(j, step, k, at_most(K - k, PIECE), rows);
        pack_step(&A, 0, 0, A.columns, out, j->panel_stride);
    }
}

/* 32 rows n of a layer's B (N, r), their ranks at their places among those of `panel`: out (32, 32). */
static factor rows_of_B(const lora_job *j, int64_t i, int64_t n, int64_t panel, uint16_t *out) {
    const lora_layer *l = &j->args->layer[i];
    memset(out, 0, BLOCK * BLOCK * sizeof *out);
    for (int64_t row = 0; row < BLOCK && n + row < l->N; row++)
        for (int64_t r = 0; r < l->r; r++) {
            int64_t at = j->first_rank[i] + r - panel * BLOCK;
            if (at >= 0 && at < BLOCK) out[row * BLOCK + at] = l->B[(n + row) * l->r + r];
        }
    return (factor){.values = out, .stride = BLOCK, .rows = BLOCK, .columns = BLOCK};
}

static int64_t layer_of_panel(const lora_job *j, int64_t panel) {
    int64_t i = 0;
    while (i + 1 < j->args->layers && panel >= j->first_panel[i + 1]) i++;
    return i;
}

static void pack_forward(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    uint16_t rows[BLOCK * BLOCK] __attribute__((aligned(64)));
    const int64_t panels = j->first_panel[a->layers], stop = part_start(panels, 1, thread + 1, threads);
    for (int64_t p = part_start(panels, 1, thread, threads); p < stop; p++) {
        const int64_t i = layer_of_panel(j, p), n = (p - j->first_panel[i]) * BLOCK;
        uint16_t *out = j->right + p * j->panel_stride;
        pack_transposed(&j->weight[i], n, out);
        for (int64_t e = 0; e < j->rank_steps[i]; e++) {
            const factor B = rows_of_B(j, i, n, j->rank_step[i] + e, rows);
            pack_transposed(&B, 0, out + (j->main_steps + e) * STEP);
        }
    }
    for (int64_t e = thread; e < j->all_rank_steps; e += threads) pack_ranks_of_A(j, e, low_of(j).s + e * j->main_steps * STEP);
}

static void pack_backward(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    const lora_args *a = j->args;
    uint16_t rows[BLOCK * BLOCK] __attribute__((aligned(64)));
    const int64_t stop = part_start(j->main_steps, 1, thread + 1, threads);
    for (int64_t s = part_start(j->main_steps, 1, thread, threads), i = 0; s < stop; s++) {
        while (s >= j->first_step[i] + j->steps[i]) i++;
        const int64_t n = (s - j->first_step[i]) * BLOCK;
        if (a->dx) pack_step(&j->weight[i], n, 0, a->K, j->right + s * STEP, j->panel_stride);
        for (int64_t e = 0; e < j->all_rank_steps; e++) {
            const factor B = rows_of_B(j, i, n, e, rows);
            pack_step(&B, 0, 0, BLOCK, low_of(j).v + (e * j->main_steps + s) * STEP, 0);
        }
    }
    for (int64_t e = thread; e < j->all_rank_steps; e += threads) {
        pack_ranks_of_A(j, e, low_of(j).s + e * steps_of(a->K) * STEP);
        if (a->dx && !a->low_rank) pack_step_of_A(j, e, j->right + (j->main_steps + e) * STEP);
    }
}

#endif
