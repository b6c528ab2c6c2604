/* The process around the kernels: tables, threads, scratch memory, huge pages. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "native.h"

codebook codebooks[2];
float dynamic_map[256], dynamic_thresholds[255];

/* Tables of codebook `which` (0 NF4, 1 FP4). Returns -1 if two thresholds share a bucket, which set_codebook cannot serve. */
int set_codebook(int which, const float *values, const float *thresholds, int thresholds_count, const int32_t *rank_codes) {
    codebook *book = &codebooks[which];
    memcpy(book->values, values, sizeof book->values);
    memcpy(book->thresholds, thresholds, thresholds_count * sizeof(float));
    memcpy(book->rank_codes, rank_codes, (thresholds_count + 1) * sizeof(int32_t));
    book->thresholds_count = thresholds_count;
    book->is_signed = which == 0;
    /* the scale is just under 16 (32), so that 1.0 falls into bucket 31; where exactly a bucket ends does not matter */
    book->bucket_scale = book->is_signed ? 15.999f : 31.99f;
    book->bucket_shift = book->is_signed ? 15.999f : 0.0f;
    int next = 0;
    for (int b = 0; b < 32; b++) {
        book->bucket_rank[b] = next;
        book->bucket_threshold[b] = 2.0f; /* above every scaled value: no threshold here */
        int here = 0;
        for (; next < thresholds_count && thresholds[next] * book->bucket_scale + book->bucket_shift < b + 1; next++, here++)
            book->bucket_threshold[b] = thresholds[next];
        if (here > 1) return -1;
    }
    return next == thresholds_count ? 0 : -1;
}

void set_dynamic_map(const float *values, const float *thresholds) {
    memcpy(dynamic_map, values, sizeof dynamic_map);
    memcpy(dynamic_thresholds, thresholds, sizeof dynamic_thresholds);
}

/* Two OpenMP runtimes in one process fight over the cores with spinning threads, so this library is linked with none: the
 * loader hands over the entry points of the one PyTorch uses. Without them everything runs on the calling thread. */
static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*get_thread_num)(void), (*get_num_threads)(void);

void set_openmp(void *parallel, void *thread_num, void *num_threads) {
    gomp_parallel = parallel;
    get_thread_num = thread_num;
    get_num_threads = num_threads;
}

typedef struct {
    task function;
    void *context;
} job;

static void run_job(void *data) {
    job *j = data;
    j->function(j->context, get_thread_num(), get_num_threads()); /* the runtime may give fewer threads than asked for */
}

void run_parallel(task function, void *context, int64_t threads) {
    if (threads <= 1 || !gomp_parallel) {
        function(context, 0, 1);
        return;
    }
    job j = {function, context};
    gomp_parallel(run_job, &j, (unsigned)threads, 0);
}

typedef struct {
    void *memory[SCRATCH_SLOTS];
    size_t bytes[SCRATCH_SLOTS];
} thread_scratch;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static _Thread_local thread_scratch *own_scratch;

static void free_scratch(void *pointer) {
    thread_scratch *s = pointer;
    for (int i = 0; i < SCRATCH_SLOTS; i++) free(s->memory[i]);
    free(s);
}

static void make_key(void) { pthread_key_create(&scratch_key, free_scratch); }

void *scratch(int slot, size_t bytes) {
    if (!own_scratch) {
        pthread_once(&scratch_once, make_key);
        if (!(own_scratch = calloc(1, sizeof(thread_scratch)))) return NULL;
        pthread_setspecific(scratch_key, own_scratch);
    }
    if (own_scratch->bytes[slot] < bytes) {
        free(own_scratch->memory[slot]);
        own_scratch->bytes[slot] = 0;
        bytes = (bytes + 65535) / 65536 * 65536;
        if (posix_memalign(&own_scratch->memory[slot], 4096, bytes)) return own_scratch->memory[slot] = NULL;
        own_scratch->bytes[slot] = bytes;
    }
    return own_scratch->memory[slot];
}

/* Fresh memory costs a page fault every 4 KiB, more than dequantization itself; 2 MiB pages divide that by 512. Only asked
 * for where the buffer is large enough to be its own mapping, which goes back to the system when it is freed. The range is the
 * mapping's own pages, not whole huge pages: malloc's header sits before the buffer, in the first of them. */
void advise_huge_pages(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = (uintptr_t)start & ~(page - 1), last = ((uintptr_t)start + bytes + page - 1) & ~(page - 1);
    if (bytes >= 8 << 20) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}
