/* Dropout whose mask is a function of the seed and the element's index: element i is kept iff word i % 4 of Philox4x32-10 at counter
 * i / 4 (Salmon et al., SC 2011) reaches floor(dropout 2^32). The generator is integer arithmetic, so every machine has the same bits.
 *
 * Bytes: x once, the result once. Operations: ten rounds of two 32 x 32 -> 64 bit products for four elements. */
#include "scalar.h"
#include "target.h"

enum { COUNTERS = 16, WORDS = 4 * COUNTERS };

typedef struct {
    const void *x;
    void *out;
    int dtype;
    int64_t n;
    uint32_t threshold, key0, key1;
    float scale;
} dropout_job;

/* Elements [start, start + count), count <= WORDS, start a multiple of WORDS. */
static inline __attribute__((always_inline)) void drop(const dropout_job *j, int64_t start, int64_t count, int dtype) {
    uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS] = {0}, c3[COUNTERS] = {0}, words[WORDS], k0 = j->key0, k1 = j->key1;
    for (int i = 0; i < COUNTERS; i++) {
        const uint64_t counter = (uint64_t)start / 4 + i;
        c0[i] = (uint32_t)counter, c1[i] = (uint32_t)(counter >> 32);
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85)
        for (int i = 0; i < COUNTERS; i++) {
            const uint64_t a = (uint64_t)c0[i] * 0xD2511F53, b = (uint64_t)c2[i] * 0xCD9E8D57;
            c0[i] = (uint32_t)(b >> 32) ^ c1[i] ^ k0, c1[i] = (uint32_t)b;
            c2[i] = (uint32_t)(a >> 32) ^ c3[i] ^ k1, c3[i] = (uint32_t)a;
        }
    for (int i = 0; i < COUNTERS; i++) words[4 * i] = c0[i], words[4 * i + 1] = c1[i], words[4 * i + 2] = c2[i], words[4 * i + 3] = c3[i];
    for (int64_t i = 0; i < count; i++) {
        const float value = load_float(j->x, dtype, start + i) * j->scale;
        store_float(words[i] >= j->threshold ? value : 0, dtype, j->out, start + i);
    }
}

static inline __attribute__((always_inline)) void drop_range(const dropout_job *j, int64_t first, int64_t last, int dtype) {
    int64_t i = first;
    for (; i + WORDS <= last; i += WORDS) drop(j, i, WORDS, dtype);
    if (i < last) drop(j, i, last - i, dtype);
}

/* dtype becomes a constant of each copy of the loop */
#define BY_DTYPE(j, first, last)                                                        \
    if ((j)->dtype == BFLOAT16) drop_range(j, first, last, BFLOAT16);                   \
    else if ((j)->dtype == FLOAT32) drop_range(j, first, last, FLOAT32);                \
    else drop_range(j, first, last, FLOAT16)

static void drop_anywhere(const dropout_job *j, int64_t first, int64_t last) { BY_DTYPE(j, first, last); }

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
static void drop_avx512(const dropout_job *j, int64_t first, int64_t last) { BY_DTYPE(j, first, last); }
END_TARGET
static int has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#else
#define drop_avx512 drop_anywhere
static int has_avx512(void) { return 0; }
#endif

static void dropout_task(void *context, int64_t thread, int64_t threads) {
    const dropout_job *j = context;
    int64_t first = part_start(j->n, WORDS, thread, threads), last = part_start(j->n, WORDS, thread + 1, threads);
    if (has_avx512()) drop_avx512(j, first, last);
    else drop_anywhere(j, first, last);
}

/* out = x with each element 0, or times 1 / (1 - dropout) in float32 and rounded once. */
void lora_dropout(const void *x, int dtype, int64_t n, double dropout, int64_t seed, void *out, int64_t threads) {
    dropout_job j = {x, out, dtype, n, (uint32_t)(dropout * 4294967296.0), (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32),
                     (float)(1.0 / (1.0 - dropout))};
    run_parallel(dropout_task, &j, threads);
}
