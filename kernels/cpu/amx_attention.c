/* Causal attention over bfloat16 with AMX, forward and backward (arXiv:2205.14135, algorithms 1 and 4, in the caches of a core).
 *
 *     p = softmax(scale q k^T)    y = p v
 *     dv = p^T dy    ds = p (dy v^T - delta)    delta = sum of dy y    dq = scale ds k    dk = scale ds^T q
 *
 * A unit of work is a query head; backward it is all those that share keys and values, but for the last few. Blocks of 32 by 32 above
 * the diagonal are never made. Of the others there are, in the second-level cache, forward those of one block of queries, backward of
 * a few. Sums are float32; p and ds are rounded to bfloat16 as factors of the next product. The heads that share keys and values each
 * sum their dK and dV, which are then added up in the heads' order, whoever made them: no result depends on the number of threads.
 *
 * Flops: 2 products forward and 5 backward, each of B heads T^2 D (1 + 32 / T). For B = 4, 9 heads of 64 on 3, T = 256 that is 0.34 and
 * 0.85 Gflop: 0.17 and 0.42 ms on two cores at 1 Tflop/s each. Measured there: 0.8 to 1.1 and 1.6 to 2.5 ms, as busy as the machine was.
 * By samples: of the forward pass a third is 1.3 million exponentials, a quarter packing, turning and writing; of the backward pass a
 * fifth and a third. The rest are products, two steps long over 64 channels: each waits for its first tiles and its last sums longer
 * than it multiplies. Fetching those tiles, or the places that are written, still earlier did not help. */
#include "attention.h"

#if defined(__x86_64__) && defined(__linux__)
#include "target.h"

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prfchw")
#include "amx_attention.h"

/* Blocks of p and of ds that wait for dV and dK: half a MiB. */
enum { WAITING = 128, FEWEST_QUERIES = 4 };

static void product(const uint16_t *left, int64_t steps, const uint16_t *right, float *sums) {
    clear_sums();
    multiply(packed_steps(left, steps), right);
    put_sums(sums);
}

/* The weights of a block of queries as a right factor, from the diagonal back to the first key: the next scores are made while the
 * weights of those before are. */
static void make_weights(const uint16_t *keys, int64_t steps, const uint16_t *query, int64_t block, float scale_of_all, uint16_t *weights,
                         query_rows *of) {
    const __m512 scale = _mm512_set1_ps(scale_of_all);
    float scores[2][SUMS] __attribute__((aligned(64)));
    softmax_state state;
    int starts = 0;
    do {
        product(keys + block * steps * STEP, steps, query, scores[block % 2]);
        hide_later_keys(scores[block % 2]);
        if (!starts++) first_shift(&state, scores[block % 2], scale);
        start_softmax(&state);
        for (int64_t i = block; i >= 0; i--) {
            if (i > 0) product(keys + (i - 1) * steps * STEP, steps, query, scores[(i - 1) % 2]);
            weigh(&state, scores[i % 2], scale, weights + i * STEP);
        }
    } while (must_restart(&state, scale));
    end_softmax(&state, of);
}

static void forward_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    attention_job *j = context;
    const attention_args *a = j->args;
    const int64_t blocks = j->blocks, steps = j->steps, all = blocks * steps * STEP, group = a->heads / a->kv_heads;
    uint16_t *keys = scratch(1, (2 * all + (steps + blocks) * STEP) * sizeof(uint16_t));
    if (!keys) {
        j->failed = 1;
        return;
    }
    uint16_t *values = keys + all, *query = values + all, *weights = query + steps * STEP;
    float sums[SUMS] __attribute__((aligned(64)));
    query_rows of;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | SUBNORMALS_ARE_ZERO);
    configure_tiles(16, 16);
    for (int64_t unit, packed = -1; (unit = take_unit(&j->next)) < a->B * a->heads;) {
        const int64_t b = unit / a->heads, head = unit % a->heads;
        if (unit / group != packed) {
            const factor k = rows_of(a, &a->k, b, head / group), v = rows_of(a, &a->v, b, head / group);
            pack_rows(j, &k, keys);
            pack_channels(j, &v, values);
            packed = unit / group;
        }
        const factor q = rows_of(a, &a->q, b, head);
        for (int64_t block = 0; block < blocks; block++) {
            pack_transposed(&q, block * BLOCK, query);
            expect_result(j, &a->y, b, head, block);
            make_weights(keys, steps, query, block, (float)a->scale, weights, &of);
            for (int64_t s = 0; s < steps; s++) {
                const place to = place_of(a, &a->y, b, head, block, s);
                product(values + s * blocks * STEP, block + 1, weights, sums);
                put_turned(sums, &to, of.inverse);
            }
            keep_rows(a, unit, block, &of);
        }
    }
    _tile_release();
    _mm_setcsr(before);
}

/* A head's factors, in a thread's scratch. */
typedef struct {
    uint16_t *keys, *values; /* left, [block][step] */
    uint16_t *key_channels;  /* left, [step][block] */
    uint16_t *queries, *dys; /* right, [step][block] */
    uint16_t *query, *dy;    /* right, a block of queries, [step] */
    uint16_t *p, *ds;        /* left, [block of keys][block of queries], of which there are `room` */
    uint16_t *ds_right;      /* right, a block of queries, [block of keys] */
    int64_t room;
    float *sums[2];          /* dK and dV of a group and of one of its heads, [2][block][step] of SUMS */
} backward_room;

/* Where everything lies in `at`; returns the bytes. */
static int64_t take_room(backward_room *f, const attention_job *j, void *at) {
    const int64_t all = j->blocks * j->steps * STEP, queries = WAITING / j->blocks;
    f->room = at_most(queries < FEWEST_QUERIES ? FEWEST_QUERIES : queries, j->blocks);
    const int64_t waiting = f->room * j->blocks * STEP;
    f->sums[0] = at, f->sums[1] = f->sums[0] + 2 * all;
    f->keys = (uint16_t *)(f->sums[1] + 2 * all), f->values = f->keys + all, f->key_channels = f->values + all;
    f->queries = f->key_channels + all, f->dys = f->queries + all;
    f->p = f->dys + all, f->ds = f->p + waiting, f->ds_right = f->ds + waiting, f->query = f->ds_right + j->blocks * STEP;
    f->dy = f->query + j->steps * STEP;
    return (char *)(f->dy + j->steps * STEP) - (char *)at;
}

static void pack_shared(const attention_job *j, const backward_room *f, int64_t shared) {
    const attention_args *a = j->args;
    const factor k = rows_of(a, &a->k, shared / a->kv_heads, shared % a->kv_heads);
    const factor v = rows_of(a, &a->v, shared / a->kv_heads, shared % a->kv_heads);
    pack_rows(j, &k, f->keys);
    pack_rows(j, &v, f->values);
    pack_channels(j, &k, f->key_channels);
}

/* dQ of a block of queries; p and ds of it to `column`. */
static void query_block(const attention_job *j, const backward_room *f, int64_t unit, int64_t block, int64_t column) {
    const attention_args *a = j->args;
    const int64_t b = unit / a->heads, head = unit % a->heads, steps = j->steps;
    const factor q = rows_of(a, &a->q, b, head), dy = rows_of(a, &a->dy, b, head), y = rows_of(a, &a->y, b, head);
    const __m512 scale = _mm512_set1_ps((float)a->scale);
    float scores[2][SUMS] __attribute__((aligned(64))), dps[2][SUMS] __attribute__((aligned(64))), scales[BLOCK];
    query_rows of;
    kept_rows(a, unit, block, &of);
    find_delta(&dy, &y, block * BLOCK, of.delta);
    expect_rows(&y, (block + 1) * BLOCK);
    expect_result(j, &a->dq, b, head, block);
    pack_transposed(&q, block * BLOCK, f->query);
    pack_transposed(&dy, block * BLOCK, f->dy);
    for (int64_t i = block + 1; i >= 0; i--) {
        if (i > 0) {
            product(f->keys + (i - 1) * steps * STEP, steps, f->query, scores[(i - 1) % 2]);
            product(f->values + (i - 1) * steps * STEP, steps, f->dy, dps[(i - 1) % 2]);
        }
        if (i > block) {
            hide_later_keys(scores[block % 2]);
            continue;
        }
        const int64_t to = (i * f->room + column) * STEP;
        softmax_backward(scores[i % 2], dps[i % 2], scale, &of, f->p + to, f->ds + to, f->ds_right + i * STEP);
    }
    for (int i = 0; i < BLOCK; i++) scales[i] = (float)a->scale;
    for (int64_t s = 0; s < steps; s++) {
        const place to = place_of(a, &a->dq, b, head, block, s);
        product(f->key_channels + s * j->blocks * STEP, block + 1, f->ds_right, scores[0]);
        put_turned(scores[0], &to, scales);
    }
}

/* What the queries of blocks [first, last) add to a head's dK or dV: `left` is ds or p, `right` their queries or dys. */
static void add_queries(const attention_job *j, const backward_room *f, const uint16_t *left, const uint16_t *right, int64_t first,
                        int64_t last, float *sums) {
    for (int64_t i = 0; i < last; i++) {
        const int64_t from = i < first ? first : i;
        const left_steps of_block = packed_steps(left + (i * f->room + from - first) * STEP, last - from);
        for (int64_t s = 0; s < j->steps; s++, sums += SUMS) {
            if (i < first) fetch_sums(sums);
            else clear_sums();
            multiply(of_block, right + (s * j->blocks + from) * STEP);
            put_sums(sums);
        }
    }
}

/* dQ of a head, and its dK and dV to sums. */
static void backward_head(const attention_job *j, const backward_room *f, int64_t unit, float *sums) {
    const attention_args *a = j->args;
    const int64_t b = unit / a->heads, head = unit % a->heads;
    const factor q = rows_of(a, &a->q, b, head), dy = rows_of(a, &a->dy, b, head);
    pack_positions(j, &q, f->queries);
    pack_positions(j, &dy, f->dys);
    const factor y = rows_of(a, &a->y, b, head);
    expect_rows(&y, 0);
    for (int64_t first = 0, last; first < j->blocks; first = last) {
        last = at_most(first + f->room, j->blocks);
        for (int64_t block = first; block < last; block++) query_block(j, f, unit, block, block - first);
        add_queries(j, f, f->ds, f->queries, first, last, sums);
        add_queries(j, f, f->p, f->dys, first, last, sums + j->blocks * j->steps * SUMS);
    }
}

static void add_sums(float *to, const float *sums, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += sums[i];
}

/* A group's dK and dV. */
static void put_shared(const attention_job *j, int64_t shared, float *sums) {
    const attention_args *a = j->args;
    for (int of_v = 0; of_v < 2; of_v++)
        for (int64_t at = 0; at < j->blocks * j->steps; at++, sums += SUMS) {
            const place to = place_of(a, of_v ? &a->dv : &a->dk, shared / a->kv_heads, shared % a->kv_heads, at / j->steps, at % j->steps);
            for (int i = 0; i < SUMS && !of_v; i++) sums[i] *= (float)a->scale;
            put_block(sums, &to, NULL);
        }
}

static void backward_task(void *context, int64_t thread, int64_t threads) {
    (void)thread, (void)threads;
    attention_job *j = context;
    const attention_args *a = j->args;
    const int64_t all = 2 * j->blocks * j->steps * SUMS, group = a->heads / a->kv_heads;
    backward_room f;
    void *room = scratch(1, take_room(&f, j, NULL));
    if (!room) {
        j->failed = 1;
        return;
    }
    take_room(&f, j, room);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | SUBNORMALS_ARE_ZERO);
    configure_tiles(16, 16);
    for (int64_t unit, packed = -1; (unit = take_unit(&j->next)) < j->units;) {
        const int64_t part = unit - j->whole, shared = part < 0 ? unit : j->whole + part / group;
        if (shared != packed) pack_shared(j, &f, shared);
        packed = shared;
        if (part < 0) {
            for (int64_t h = 0; h < group; h++) {
                backward_head(j, &f, shared * group + h, f.sums[h > 0]);
                if (h > 0) add_sums(f.sums[0], f.sums[1], all);
            }
            put_shared(j, shared, f.sums[0]);
            continue;
        }
        backward_head(j, &f, j->whole * group + part, j->sums + part * all);
        if (__atomic_add_fetch(&j->done[part / group], 1, __ATOMIC_ACQ_REL) < group) continue;
        float *sums = j->sums + part / group * group * all; /* all heads are done: they are added up here in their order, too */
        for (int64_t h = 1; h < group; h++) add_sums(sums, sums + h * all, all);
        put_shared(j, shared, sums);
    }
    _tile_release();
    _mm_setcsr(before);
}

int64_t attention_bytes(const attention_args *a) {
    attention_job j;
    return set_up(&j, a);
}

int attention_forward(const attention_args *a) {
    attention_job j;
    set_up(&j, a);
    run_parallel(forward_task, &j, a->threads);
    return -j.failed;
}

int attention_backward(const attention_args *a) {
    attention_job j;
    set_up(&j, a);
    memset(j.done, 0, (char *)j.sums - (char *)j.done);
    run_parallel(backward_task, &j, a->threads);
    return -j.failed;
}
END_TARGET
#else
int64_t attention_bytes(const attention_args *a) { return (void)a, 0; }
int attention_forward(const attention_args *a) { return (void)a, -1; }
int attention_backward(const attention_args *a) { return (void)a, -1; }
#endif
