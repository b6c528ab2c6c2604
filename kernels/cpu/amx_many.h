/* What the products of amx_many.c are made of: where each layer's ranks, steps and panels lie, and the right factors packed. Included
 * under a target with amx-bf16. */
#ifndef POSTTRAIN_AMX_MANY_H
#define POSTTRAIN_AMX_MANY_H

#include "amx_base.h"

/* Right factors are packed as many panels at a time as leave the second-level cache some room for the left one. */
enum { RIGHT_BYTES = 3 << 18 };

typedef struct {
    const many_rows_args *args;
    weight base[MAX_LAYERS];
    int64_t first_panel[MAX_LAYERS + 1]; /* where the layer's panels of 32 columns begin, which are also steps of a sum over all N */
    int64_t first_rank[MAX_LAYERS], rank_step[MAX_LAYERS], rank_steps[MAX_LAYERS]; /* columns of s and V; steps that hold them */
    int64_t k_steps, n_steps, m_steps; /* over K, over all the layers' N, over M */
    int64_t ranks, all_rank_steps;
    int narrow, need_A, need_B; /* narrow: s and V have 16 columns or fewer */
    float *scale;               /* of each rank */
    uint16_t *down_s, *down_V;  /* the right factors of s, panels of [steps of K], and of V, panels of [steps of all N] */
    uint16_t *ranks_of_rows;    /* s forward, V backward, as left factors: [block][rank step] */
    uint16_t *turned_s, *turned_V; /* s and V transposed, as left factors of sums over M: [rank step][block] */
    /* y or dX, all the layers' panels side by side, as many of them at a time as `right` holds */
    int backward;
    int64_t panels, base_steps, panel_steps; /* of a panel: the base's steps, and with them the low rank's */
    int64_t first, last;
    uint16_t *right;
    int64_t next; /* unit of the running task's work */
    int failed;
} many_rows_job;

static void run_units(many_rows_job *j, task function) {
    j->next = 0;
    run_parallel(function, j, j->args->threads);
}

/* Where each layer's ranks go: side by side in one step if that holds them all, else each layer begins a new step. */
static void place_ranks(many_rows_job *j) {
    const many_rows_args *a = j->args;
    int64_t total = 0, rank = 0;
    for (int64_t i = 0; i < a->layers; i++) total += a->layer[i].r;
    const int together = total <= BLOCK;
    for (int64_t i = 0; i < a->layers; i++) {
        if (!together) rank = steps_of(rank) * BLOCK;
        j->first_rank[i] = rank;
        j->rank_step[i] = rank / BLOCK;
        j->rank_steps[i] = together ? steps_of(total) : steps_of(a->layer[i].r);
        rank += a->layer[i].r;
    }
    j->ranks = rank;
    j->all_rank_steps = steps_of(rank);
    j->narrow = rank <= 16;
}

/* The next `bytes` of the workspace, in whole lines. */
static void *take(char **at, int64_t bytes) {
    char *taken = *at;
    *at += ceil_div(bytes, 64) * 64;
    return taken;
}

/* Returns the bytes that the workspace needs. */
static int64_t set_up(many_rows_job *j, const many_rows_args *a, int backward) {
    *j = (many_rows_job){.args = a, .backward = backward};
    place_ranks(j);
    for (int64_t i = 0; i < a->layers; i++) {
        const many_rows_layer *l = &a->layer[i];
        j->base[i] = base_of(l);
        j->first_panel[i] = j->n_steps;
        j->n_steps += steps_of(l->N);
        j->need_A |= l->dA != NULL, j->need_B |= l->dB != NULL;
    }
    j->first_panel[a->layers] = j->n_steps;
    j->k_steps = steps_of(a->K), j->m_steps = steps_of(a->M);

    int64_t rank_steps = backward ? a->low_rank ? 0 : j->all_rank_steps : 0; /* of a panel */
    for (int64_t i = 0; i < a->layers && !backward; i++) rank_steps = rank_steps < j->rank_steps[i] ? j->rank_steps[i] : rank_steps;
    j->base_steps = !has_base(a->layer) ? 0 : backward ? j->n_steps : j->k_steps;
    j->panels = backward ? a->dx ? j->k_steps : 0 : j->n_steps;
    j->panel_steps = j->base_steps + rank_steps;

    const int64_t step = STEP * sizeof(uint16_t), panel = j->panel_steps * step, E = j->all_rank_steps;
    /* passes of as many panels each */
    const int64_t most = panel && panel < RIGHT_BYTES ? RIGHT_BYTES / panel : 1, passes = ceil_div(j->panels, most);
    char *at = a->workspace;
    j->right = take(&at, (passes ? ceil_div(j->panels, passes) : 0) * panel);
    j->last = passes ? ceil_div(j->panels, passes) : 0;
    j->scale = take(&at, E * BLOCK * sizeof(float));
    j->down_s = take(&at, E * j->k_steps * step);
    j->ranks_of_rows = take(&at, E * j->m_steps * step);
    j->down_V = take(&at, backward ? E * j->n_steps * step : 0);
    j->turned_s = take(&at, backward ? E * j->m_steps * step : 0);
    j->turned_V = take(&at, backward ? E * j->m_steps * step : 0);
    return at - (char *)a->workspace;
}

static void fill_scale(const many_rows_job *j) {
    memset(j->scale, 0, j->all_rank_steps * BLOCK * sizeof(float));
    for (int64_t i = 0; i < j->args->layers; i++)
        for (int64_t r = 0; r < j->args->layer[i].r; r++) j->scale[j->first_rank[i] + r] = (float)j->args->layer[i].scaling;
}

static int64_t layer_of_panel(const many_rows_job *j, int64_t panel) {
    int64_t i = 0;
    while (i + 1 < j->args->layers && panel >= j->first_panel[i + 1]) i++;
    return i;
}

/* Columns [k, k + count) of the layers' A, each row at its place among the ranks of `panel`: out (32, PIECE). */
static factor rows_of_A(const many_rows_job *j, int64_t panel, int64_t k, int64_t count, uint16_t *out) {
    const many_rows_args *a = j->args;
    memset(out, 0, BLOCK * PIECE * sizeof *out);
    for (int64_t i = 0; i < a->layers; i++) {
        const many_rows_layer *l = &a->layer[i];
        for (int64_t r = 0; r < l->r; r++) {
            const int64_t at = j->first_rank[i] + r - panel * BLOCK, from = r * a->K + k;
            if (at < 0 || at >= BLOCK) continue;
            if (l->factors == FLOAT32) isa_avx512.narrow((const float *)l->A + from, BFLOAT16, count, out + at * PIECE);
            else memcpy(out + at * PIECE, (const uint16_t *)l->A + from, count * sizeof *out);
        }
    }
    return (factor){.values = out, .stride = PIECE, .rows = BLOCK, .columns = count};
}

/* 32 rows n of a layer's B (N, r), their ranks at their places among those of `panel`: out (32, 32). */
static factor rows_of_B(const many_rows_job *j, int64_t i, int64_t n, int64_t panel, uint16_t *out) {
    const many_rows_layer *l = &j->args->layer[i];
    const int64_t place = j->first_rank[i] - panel * BLOCK, at = place > 0 ? place : 0, r = at - place;
    const int64_t count = at_most(l->r - r, BLOCK - at), rows = count > 0 ? at_most(l->N - n, BLOCK) : 0;
    memset(out, 0, BLOCK * BLOCK * sizeof *out);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t from = (n + row) * l->r + r;
        uint16_t *to = out + row * BLOCK + at;
        if (l->factors == FLOAT32) isa_avx512.narrow((const float *)l->B + from, BFLOAT16, count, to);
        else memcpy(to, (const uint16_t *)l->B + from, count * sizeof *out);
    }
    return (factor){.values = out, .stride = BLOCK, .rows = BLOCK, .columns = BLOCK};
}

/* The right factor of s = x A^T: ranks become columns. */
static void pack_down_s(const many_rows_job *j, int64_t panel, uint16_t *room) {
    uint16_t *out = j->down_s + panel * j->k_steps * STEP;
    for (int64_t k = 0; k < j->args->K; k += PIECE, out += PIECE / 32 * STEP) {
        const factor A = rows_of_A(j, panel, k, at_most(j->args->K - k, PIECE), room);
        pack_transposed(&A, 0, out);
    }
}

/* 32 columns of the right factor of y: rows n of W, and behind them of B. */
static void pack_panel_of_y(const many_rows_job *j, int64_t p, uint16_t *room) {
    const int64_t i = layer_of_panel(j, p), n = (p - j->first_panel[i]) * BLOCK, K = j->args->K;
    uint16_t *out = j->right + (p - j->first) * j->panel_steps * STEP;
    for (int64_t k = 0; k < K && j->base_steps; k += PIECE) {
        const factor base = rows_of_base(&j->args->layer[i], &j->base[i], n, BLOCK, K, k, at_most(K - k, PIECE), room);
        pack_transposed(&base, 0, out + k / 32 * STEP);
    }
    for (int64_t e = 0; e < j->rank_steps[i]; e++) {
        const factor B = rows_of_B(j, i, n, j->rank_step[i] + e, room);
        pack_transposed(&B, 0, out + (j->base_steps + e) * STEP);
    }
}

/* Step `s` of the right factor of dX, in all the panels of this pass: 32 rows of a W, or of the layers' A. */
static void pack_step_of_dx(const many_rows_job *j, int64_t s, uint16_t *room) {
    const int64_t first = j->first * BLOCK, last = at_most(j->last * BLOCK, j->args->K), stride = j->panel_steps * STEP;
    const int64_t i = layer_of_panel(j, s);
    for (int64_t k = first; k < last; k += PIECE) {
        const int64_t count = at_most(last - k, PIECE);
        const factor f = s >= j->base_steps ? rows_of_A(j, s - j->base_steps, k, count, room)
                                            : rows_of_base(&j->args->layer[i], &j->base[i], (s - j->first_panel[i]) * BLOCK, BLOCK,
                                                           j->args->K, k, count, room);
        pack_step(&f, 0, 0, count, j->right + (k - first) / 32 * stride + s * STEP, stride);
    }
}

/* Units: in y's first pass the right factor of s, then panels of y, or steps of dX. */
static void pack_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    many_rows_job *j = context;
    uint16_t room[BLOCK * PIECE] __attribute__((aligned(64)));
    const int64_t down = j->first == 0 && !j->backward ? j->all_rank_steps : 0;
    const int64_t units = down + (j->backward ? j->panel_steps : j->last - j->first);
    for (int64_t unit; (unit = take_unit(&j->next)) < units;)
        if (unit < down) pack_down_s(j, unit, room);
        else if (j->backward) pack_step_of_dx(j, unit, room);
        else pack_panel_of_y(j, j->first + unit - down, room);
}

/* The right factors of V = dY B, a step a unit, and, where dB is needed, of s. */
static void pack_down_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    many_rows_job *j = context;
    uint16_t room[BLOCK * PIECE] __attribute__((aligned(64)));
    const int64_t down = j->need_B ? j->all_rank_steps : 0;
    for (int64_t unit; (unit = take_unit(&j->next)) < down + j->n_steps;) {
        if (unit < down) {
            pack_down_s(j, unit, room);
            continue;
        }
        const int64_t p = unit - down, i = layer_of_panel(j, p), n = (p - j->first_panel[i]) * BLOCK;
        for (int64_t e = 0; e < j->all_rank_steps; e++) {
            const factor B = rows_of_B(j, i, n, e, room);
            pack_step(&B, 0, 0, BLOCK, j->down_V + (e * j->n_steps + p) * STEP, 0);
        }
    }
}

#endif
