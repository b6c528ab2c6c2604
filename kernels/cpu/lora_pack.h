/* What the products of lora_amx.c are made of: where each layer's ranks, steps and panels lie, and the right factors packed. Included
 * under a target with amx-bf16. */
#ifndef POSTTRAIN_LORA_PACK_H
#define POSTTRAIN_LORA_PACK_H

#include "amx_gemm.h"
#include "lora.h"

enum { MAX_LAYERS = 4 };
/* dA and dB are summed over GROUP blocks at a time while x's and dY's rows are in the cache, then over parts of the rows: as many
 * parts whatever the number of threads, so that sums have the same order. */
enum { GROUP = 4, PARTS = 16, SUMS = 4 * 256 };

typedef struct {
    const lora_args *args;
    int64_t first_panel[MAX_LAYERS + 1]; /* where the layer's panels of 32 columns begin, which are also steps of a sum over all N */
    int64_t first_rank[MAX_LAYERS], rank_step[MAX_LAYERS], rank_steps[MAX_LAYERS]; /* columns of s and V; steps that hold them */
    int64_t k_steps, n_steps, m_steps; /* over K, over all the layers' N, over M */
    int64_t ranks, all_rank_steps;
    int wide;        /* whether s and V have more than 16 columns */
    uint16_t *up;    /* the right factor of what is added to y or dx, panel by panel, all_rank_steps each */
    uint16_t *s, *v; /* the right factors of s, panels of [steps of K], and of V, panels of [steps of all N] */
    int need_A, need_B;
    int64_t parts, part_blocks; /* parts of the rows, and their blocks */
    float *sums;                /* [part][panel of x's columns, then of the dYs'][step of ranks] SUMS */
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

static void set_up(lora_job *j, const lora_args *a, int backward) {
    *j = (lora_job){.args = a};
    place_ranks(j);
    int64_t panels = 0;
    for (int64_t i = 0; i < a->layers; i++) {
        j->first_panel[i] = panels;
        panels += steps_of(a->layer[i].N);
    }
    j->k_steps = steps_of(a->K), j->n_steps = panels, j->m_steps = steps_of(a->M);
    j->first_panel[a->layers] = panels;
    const int64_t up = (backward ? j->k_steps : panels) * j->all_rank_steps * STEP;
    j->up = a->workspace;
    j->s = j->up + up;
    j->v = j->s + j->all_rank_steps * j->k_steps * STEP;
    j->sums = (float *)(j->v + (backward ? j->all_rank_steps * j->n_steps * STEP : 0));
    for (int64_t i = 0; i < a->layers; i++) j->need_A |= a->layer[i].dA != NULL, j->need_B |= a->layer[i].dB != NULL;
    j->part_blocks = ceil_div(ceil_div(j->m_steps, PARTS), GROUP) * GROUP;
    j->parts = j->part_blocks ? ceil_div(j->m_steps, j->part_blocks) : 0;
}

/* Where a part's sums of a panel are. */
static inline float *sums_of(const lora_job *j, int64_t part, int64_t panel, int64_t step) {
    return j->sums + ((part * (j->k_steps + j->n_steps) + panel) * j->all_rank_steps + step) * SUMS;
}

/* Right factors are made by all threads: each takes a run of steps or of panels. */

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

/* A step of the right factor of V A: ranks are what is summed over. */
static void pack_step_of_A(const lora_job *j, int64_t step, uint16_t *out) {
    const int64_t K = j->args->K, panel_stride = j->all_rank_steps * STEP;
    uint16_t rows[BLOCK * PIECE] __attribute__((aligned(64)));
    for (int64_t k = 0; k < K; k += PIECE, out += PIECE / 32 * panel_stride) {
        const factor A = rows_of_A(j, step, k, at_most(K - k, PIECE), rows);
        pack_step(&A, 0, 0, A.columns, out, panel_stride);
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
    uint16_t rows[BLOCK * BLOCK] __attribute__((aligned(64)));
    const int64_t stop = part_start(j->n_steps, 1, thread + 1, threads);
    for (int64_t p = part_start(j->n_steps, 1, thread, threads); p < stop; p++) {
        const int64_t i = layer_of_panel(j, p), n = (p - j->first_panel[i]) * BLOCK;
        for (int64_t e = 0; e < j->rank_steps[i]; e++) {
            const factor B = rows_of_B(j, i, n, j->rank_step[i] + e, rows);
            pack_transposed(&B, 0, j->up + (p * j->all_rank_steps + e) * STEP);
        }
    }
    for (int64_t e = thread; e < j->all_rank_steps; e += threads) pack_ranks_of_A(j, e, j->s + e * j->k_steps * STEP);
}

static void pack_backward(void *context, int64_t thread, int64_t threads) {
    lora_job *j = context;
    uint16_t rows[BLOCK * BLOCK] __attribute__((aligned(64)));
    const int64_t stop = part_start(j->n_steps, 1, thread + 1, threads);
    for (int64_t p = part_start(j->n_steps, 1, thread, threads); p < stop; p++) {
        const int64_t i = layer_of_panel(j, p), n = (p - j->first_panel[i]) * BLOCK;
        for (int64_t e = 0; e < j->all_rank_steps; e++) {
            const factor B = rows_of_B(j, i, n, e, rows);
            pack_step(&B, 0, 0, BLOCK, j->v + (e * j->n_steps + p) * STEP, 0);
        }
    }
    for (int64_t e = thread; e < j->all_rank_steps; e += threads) {
        if (j->need_B) pack_ranks_of_A(j, e, j->s + e * j->k_steps * STEP);
        if (j->args->dx && !j->args->low_rank) pack_step_of_A(j, e, j->up + e * STEP);
    }
}

#endif
