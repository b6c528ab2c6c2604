/* Drafts, verified: each request walks from the root, reads the row of the target (and of the draft) where it stands, tries the children
 * by a few numbers each, and steps to the accepted one or draws.
 *
 * Bytes: the rows that are reached, once from memory; what is looked at again (groups that reach a threshold, what is left of a refused
 * row) comes from the cache. A request is one thread's, from its first row to its draw, so its tokens do not depend on the others. */
#include <math.h>

#include "sampled_row.h"
#include "scalar.h"
#include "spec_verify.h"

typedef struct {
    const spec_args *a;
    int64_t next; /* the request to be taken next: some walk further than others */
    int failed, refused; /* out of memory; something is wrong with what was given */
} spec_job;

/* One request: its setting, its noise, and memory for two rows and for the words refused where it stands. */
typedef struct {
    const spec_args *a;
    const int64_t *nodes, *parents;
    int64_t b, num, top_k;
    double temperature, top_p;
    race_noise noise;
    float *p_memory, *q_memory;
    int64_t *refused;
} request;

static double uniform(const request *r, int64_t node) {
    if (r->a->uniforms) return r->a->uniforms[r->b * r->a->N + node];
    const uint64_t offset = r->noise.offset;
    const philox_words w = philox((uint32_t)(node / 4), ACCEPT_STREAM, (uint32_t)offset, (uint32_t)(offset >> 32), r->noise.seed);
    const uint32_t words[4] = {w.c0, w.c1, w.c2, w.c3};
    return (words[node % 4] >> 8) * 0x1p-24;
}

static double probability(const sampled_row *row, int64_t x) {
    if (x < 0 || x >= row->V || row->top == -INFINITY) return 0;
    const float given = load_float(row->z, row->dtype, x), z = given < 3.0e38f ? given : 3.0e38f;
    if (!(given > -3.0e38f) || !(z >= row->threshold)) return 0;
    return exp(((double)z - row->top) / row->temperature) / row->total;
}

/* The next node below `node` after `after`, or -1. */
static int64_t next_child(const request *r, int64_t node, int64_t after) {
    if (!r->parents) return after < node + 1 && node + 1 < r->num ? node + 1 : -1;
    for (int64_t i = after + 1; i < r->num; i++)
        if (r->parents[i] == node) return i;
    return -1;
}

static const char *row_at(const char *logits, int dtype, int64_t stride, int64_t row_stride, int64_t b, int64_t row) {
    return logits + (b * stride + row * row_stride) * (dtype == FLOAT32 ? 4 : 2);
}

static int among(const int64_t *words, int64_t count, int64_t x) {
    for (int64_t i = 0; i < count; i++)
        if (words[i] == x) return 1;
    return 0;
}

/* The accepted child, or -1 and the token drawn (-1: there is none). After refusals of drawn children what is left of p is
 * max(p - factor q, 0) / left, and of q, without replacement, q / rest but for the words refused: SpecInfer, arXiv:2305.09781,
 * algorithm 2, with p and q as they were. */
static int64_t try_children(const request *r, int64_t node, int has_children, int64_t *drawn) {
    const spec_args *a = r->a;
    sampled_row p = {.z = row_at(a->target, a->target_dtype, a->target_stride, a->target_row, r->b, node + 1),
                     .dtype = a->target_dtype, .V = a->V, .temperature = r->temperature}, q = {0};
    double factor = 0, left = 1, rest = 1;
    int64_t refused = 0;
    int stale = 0; /* left and rest are of before the last refusal: a pass over the row, seldom wanted */
    a->engine->filter_row(&p, r->top_k, r->top_p, r->p_memory);
    *drawn = -1;
    if (has_children && a->draft) {
        q = (sampled_row){.z = row_at(a->draft, a->draft_dtype, a->draft_stride, a->draft_row, r->b, node + 1),
                          .dtype = a->draft_dtype, .V = a->draft_V, .temperature = r->temperature};
        a->engine->filter_row(&q, r->top_k, r->top_p, r->q_memory);
    }
    for (int64_t i = -1; has_children && (i = next_child(r, node, i)) >= 0;) {
        const int64_t x = r->nodes[i];
        const int again = among(r->refused, refused, x);
        double px = probability(&p, x), qx = x >= 0 && x < a->V;
        if (a->draft) {
            qx = again && !a->with_replacement ? 0 : probability(&q, x);
            px = px > factor * qx ? px - factor * qx : 0;
            if (stale && qx > 0) {
                left = a->engine->leftover_mass(&(leftover){&p, &q, factor, NULL, 0});
                if (!a->with_replacement) rest = a->engine->leftover_mass(&(leftover){&q, NULL, 0, r->refused, refused}) / q.total;
                stale = 0;
            }
        } else if (again) px = 0;
        if (qx == 0) continue; /* it cannot have been drawn: passed over */
        if (left > 0 && uniform(r, i) < (px / left) / (qx / rest)) return i; /* Leviathan et al., arXiv:2211.17192, algorithm 1 */
        r->refused[refused++] = x;
        if (a->draft) factor += left / rest, stale = 1;
        else left -= px;
    }
    if (p.top == -INFINITY) return -1;
    const leftover whole = {&p, NULL, 0, NULL, 0};
    const leftover what_is_left = {&p, factor > 0 ? &q : NULL, factor, r->refused, a->draft ? 0 : refused};
    *drawn = a->engine->race(&what_is_left, &r->noise);
    if (*drawn < 0) *drawn = a->engine->race(&whole, &r->noise); /* nothing is left of p: p itself */
    return -1;
}

/* Returns the token that ends the request, -1 where nothing could be drawn. */
static int64_t walk(const request *r, int64_t *tokens, int64_t *path, int64_t *num_accepted) {
    const spec_args *a = r->a;
    int64_t node = -1, drawn = -1, count = 0;
    for (;; count++) {
        const int64_t first = count < a->depth ? next_child(r, node, -1) : -1;
        int64_t child = -1;
        if (r->temperature == 0) {
            drawn = a->engine->first_largest(row_at(a->target, a->target_dtype, a->target_stride, a->target_row, r->b, node + 1),
                                             a->target_dtype, a->V);
            if (drawn >= 0)
                for (child = first; child >= 0 && r->nodes[child] != drawn;) child = next_child(r, node, child);
        } else child = try_children(r, node, first >= 0, &drawn);
        if (child < 0) break;
        tokens[count] = r->nodes[child];
        if (path) path[count] = child;
        node = child;
    }
    tokens[count] = drawn;
    *num_accepted = count;
    for (int64_t i = count + 1; i <= a->depth; i++) tokens[i] = -1;
    for (int64_t i = count; path && i < a->depth; i++) path[i] = -1;
    return drawn;
}

static int in_order(const int64_t *parents, int64_t num) {
    for (int64_t i = 0; i < num; i++)
        if (parents[i] < -1 || parents[i] >= i) return 0;
    return 1;
}

static void spec_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    spec_job *j = context;
    const spec_args *a = j->a;
    const int64_t room = filter_room(a->V);
    int64_t *memory = scratch(0, (a->N + 1) * sizeof(int64_t) + 2 * room * sizeof(float));
    if (!memory) {
        j->failed = 1;
        return;
    }
    float *rows = (float *)(memory + a->N + 1);
    for (int64_t b; (b = take_unit(&j->next)) < a->B;) {
        const double *own = a->settings ? a->settings + 3 * b : NULL;
        request r = {a, a->nodes + b * a->N, a->parents ? a->parents + b * a->parents_stride : NULL, b, a->num[b],
                     own ? (int64_t)own[1] : a->top_k, own ? own[0] : a->temperature, own ? own[2] : a->top_p,
                     {a->gumbel ? a->gumbel + b * a->V : NULL, 0, a->offsets ? (uint64_t)a->offsets[b] : 0}, rows, rows + room, memory};
        r.noise.seed = a->seeds ? (uint64_t)a->seeds[b] : (uint64_t)a->seed + (uint64_t)b * 0x9E3779B97F4A7C15u;
        int64_t *path = a->path ? a->path + b * a->depth : NULL;
        const int fits = r.num >= 0 && r.num <= a->N && (!r.parents || in_order(r.parents, r.num));
        if (!fits || walk(&r, a->tokens + b * (a->depth + 1), path, a->num_accepted + b) < 0) j->refused = 1;
    }
}

int spec_verify_requests(const spec_args *a) {
    spec_job j = {a, 0, 0, 0};
    run_parallel(spec_task, &j, a->threads < a->B ? a->threads : a->B);
    return j.failed ? -1 : j.refused;
}

typedef struct {
    const filter_args *a;
    int failed;
} filter_job;

static void filter_task(void *context, int64_t thread, int64_t threads) {
    filter_job *j = context;
    const filter_args *a = j->a;
    float *memory = scratch(0, filter_room(a->V) * sizeof(float));
    if (!memory) {
        j->failed = 1;
        return;
    }
    for (int64_t i = thread; i < a->N; i += threads) {
        const double *own = a->settings ? a->settings + 3 * i : NULL;
        sampled_row row = {.z = row_at(a->logits, a->dtype, a->stride, 0, i, 0), .dtype = a->dtype, .V = a->V,
                           .temperature = own ? own[0] : a->temperature};
        a->engine->filter_row(&row, own ? (int64_t)own[1] : a->top_k, own ? own[2] : a->top_p, memory);
        a->threshold[i] = row.threshold;
        a->log_total[i] = row.top == -INFINITY ? -INFINITY : (float)(row.top / row.temperature + log(row.total));
    }
}

int filter_rows(const filter_args *a) {
    filter_job j = {a, 0};
    run_parallel(filter_task, &j, a->threads < a->N ? a->threads : a->N);
    return -j.failed;
}

/* mask (B, N + 1, N + 1) zeros before, depth (B, N + 1): a node sees itself and its ancestors. Returns 1 where a parent is no node before
 * its child. */
int tree_attention(const int64_t *parents, int64_t B, int64_t N, uint8_t *mask, int64_t *depth) {
    for (int64_t b = 0; b < B; b++, parents += N, mask += (N + 1) * (N + 1), depth += N + 1) {
        if (!in_order(parents, N)) return 1;
        mask[0] = 1, depth[0] = 0;
        for (int64_t i = 1; i <= N; i++) {
            const int64_t above = parents[i - 1] + 1;
            for (int64_t k = 0; k <= above; k++) mask[i * (N + 1) + k] = mask[above * (N + 1) + k];
            mask[i * (N + 1) + i] = 1;
            depth[i] = depth[above] + 1;
        }
    }
    return 0;
}
