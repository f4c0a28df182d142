// ggml's flash attention on the CPU: one decode step, one request, one new token, with a q8_0 and an f16 cache.
//
//   ggml [--threads N] [--samples N] [--head-major] KV_HEADS GQA HEAD_DIM KV_LEN ...
//
// prints `# ggml` with its version and instruction sets, then a line for each shape and type of cache: `kv_heads gqa head_dim kv_len
// type median_us best_us error`. The cache lies as llama.cpp keeps it, `[token][head][channel]`, or with --head-major
// `[head][token][channel]`. No mask, which would only cost.
// `error` is relative (L2) against the same attention in f64 over the values that the cache holds; a step that is wrong ends the
// program. How to build it: docs/cpu-performance.md. `cargo xtask bench cpu --ggml PROGRAM` runs it.
#include <ggml-cpu.h>
#include <ggml.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct options {
    int threads, samples;
    bool head_major;
};

struct shape {
    int64_t kv_heads, gqa, head_dim, kv_len;
};

static void fail(const char *what) {
    fprintf(stderr, "ggml: %s\n", what);
    exit(1);
}

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) fail("out of memory");
    return memory;
}

// About normal: the sum of twelve uniform numbers.
static float noise(uint64_t *state) {
    float sum = -6.0f;
    for (int i = 0; i < 12; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(*state >> 40) / (float)(1 << 24);
    }
    return sum;
}

static double microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Random rows in a tensor `[head_dim, kv_heads, kv_len]`, or `[head_dim, kv_len, kv_heads]` with --head-major.
static void fill(struct ggml_tensor *cache, uint64_t seed) {
    int64_t rows = cache->ne[1] * cache->ne[2], len = cache->ne[0];
    float *row = allocate((size_t)len * sizeof *row);
    ggml_from_float_t store = ggml_get_type_traits_cpu(cache->type)->from_float;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < len; i++) row[i] = noise(&seed);
        store(row, (char *)cache->data + (size_t)r * cache->nb[1], len);
    }
    free(row);
}

// The row of a token and a head, in a view whose axis 1 is tokens and axis 2 heads.
static void load(const struct ggml_tensor *view, int64_t token, int64_t head, float *row) {
    const char *at = (const char *)view->data + (size_t)token * view->nb[1] + (size_t)head * view->nb[2];
    ggml_get_type_traits(view->type)->to_float(at, row, view->ne[0]);
}

// Relative error of `out` against attention in f64.
static double error_of(const struct ggml_tensor *out, const struct ggml_tensor *q, const struct ggml_tensor *k,
                       const struct ggml_tensor *v, double scale) {
    int64_t head_dim = q->ne[0], q_heads = q->ne[2], kv_heads = k->ne[2], kv_len = k->ne[1];
    float *row = allocate((size_t)head_dim * sizeof *row);
    double *weight = allocate((size_t)kv_len * sizeof *weight), *sum = allocate((size_t)head_dim * sizeof *sum);
    double wrong = 0.0, norm = 0.0;
    for (int64_t head = 0; head < q_heads; head++) {
        const float *query = (const float *)q->data + head * head_dim, *got = (const float *)out->data + head * head_dim;
        int64_t kv_head = head / (q_heads / kv_heads);
        double most = -INFINITY, total = 0.0;
        for (int64_t t = 0; t < kv_len; t++) {
            load(k, t, kv_head, row);
            double dot = 0.0;
            for (int64_t i = 0; i < head_dim; i++) dot += (double)query[i] * row[i];
            weight[t] = dot * scale;
            most = fmax(most, weight[t]);
        }
        memset(sum, 0, (size_t)head_dim * sizeof *sum);
        for (int64_t t = 0; t < kv_len; t++) {
            load(v, t, kv_head, row);
            double p = exp(weight[t] - most);
            total += p;
            for (int64_t i = 0; i < head_dim; i++) sum[i] += p * row[i];
        }
        for (int64_t i = 0; i < head_dim; i++) {
            double want = sum[i] / total;
            wrong += (got[i] - want) * (got[i] - want);
            norm += want * want;
        }
    }
    free(row), free(weight), free(sum);
    return sqrt(wrong / norm);
}

static void measure(const struct options *options, const struct shape *shape, enum ggml_type type, void *pool) {
    const struct shape s = *shape;
    size_t cache_bytes = ggml_row_size(type, s.head_dim) * (size_t)(s.kv_heads * s.kv_len);
    size_t bytes = 2 * cache_bytes + 4 * sizeof(float) * (size_t)(s.kv_heads * s.gqa * s.head_dim) + ((size_t)4 << 20);
    struct ggml_context *context = ggml_init((struct ggml_init_params){.mem_size = bytes});
    if (!context) fail("out of memory");
    struct ggml_tensor *q = ggml_new_tensor_3d(context, GGML_TYPE_F32, s.head_dim, 1, s.kv_heads * s.gqa), *sides[2];
    uint64_t seed = 1;
    for (int64_t i = 0; i < ggml_nelements(q); i++) ((float *)q->data)[i] = noise(&seed);
    for (int side = 0; side < 2; side++) {
        int64_t inner = options->head_major ? s.kv_len : s.kv_heads, outer = options->head_major ? s.kv_heads : s.kv_len;
        struct ggml_tensor *cache = ggml_new_tensor_3d(context, type, s.head_dim, inner, outer);
        fill(cache, (uint64_t)side + 2);
        sides[side] = options->head_major ? cache : ggml_permute(context, cache, 0, 2, 1, 3);
    }
    float scale = 1.0f / sqrtf((float)s.head_dim);
    struct ggml_tensor *out = ggml_flash_attn_ext(context, q, sides[0], sides[1], NULL, scale, 0.0f, 0.0f);
    struct ggml_cgraph *graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, out);
    struct ggml_cplan plan = ggml_graph_plan(graph, options->threads, pool);
    plan.work_data = plan.work_size ? allocate(plan.work_size) : NULL;
    double *times = allocate((size_t)options->samples * sizeof *times);
    for (int i = -10; i < options->samples; i++) {
        double start = microseconds();
        if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) fail("a step failed");
        if (i >= 0) times[i] = microseconds() - start;
    }
    qsort(times, (size_t)options->samples, sizeof *times, by_value);
    double error = error_of(out, q, sides[0], sides[1], scale);
    if (!(error < 0.05)) fail("a step's result is wrong");
    printf("%lld %lld %lld %lld %s %.3f %.3f %.1e\n", (long long)s.kv_heads, (long long)s.gqa, (long long)s.head_dim,
           (long long)s.kv_len, ggml_type_name(type), times[options->samples / 2], times[0], error);
    fflush(stdout);
    free(times), free(plan.work_data);
    ggml_free(context);
}

static int64_t number(const char *word) {
    char *end = NULL;
    long long value = strtoll(word, &end, 10);
    if (!*word || *end || value < 1 || value > 1 << 20) fail("a number from 1 to 2^20 is wanted");
    return value;
}

int main(int argc, char **argv) {
    struct options options = {.threads = 2, .samples = 200};
    int arg = 1;
    for (; arg < argc && argv[arg][0] == '-'; arg++) {
        if (!strcmp(argv[arg], "--head-major")) options.head_major = true;
        else if (!strcmp(argv[arg], "--threads") && arg + 1 < argc) options.threads = (int)number(argv[++arg]);
        else if (!strcmp(argv[arg], "--samples") && arg + 1 < argc) options.samples = (int)number(argv[++arg]);
        else fail("no such option");
    }
    if (arg == argc || (argc - arg) % 4) fail("KV_HEADS GQA HEAD_DIM KV_LEN are wanted, once or several times");
    ggml_cpu_init();
    printf("# ggml %s %s,%s%s%s%s\n", ggml_version(), ggml_commit(), ggml_cpu_has_avx2() ? " AVX2" : "",
           ggml_cpu_has_fma() ? " FMA" : "", ggml_cpu_has_f16c() ? " F16C" : "", ggml_cpu_has_avx512() ? " AVX-512" : "");
    struct ggml_threadpool_params params = ggml_threadpool_params_default(options.threads);
    struct ggml_threadpool *pool = ggml_threadpool_new(&params);
    for (; arg < argc; arg += 4) {
        struct shape shape = {number(argv[arg]), number(argv[arg + 1]), number(argv[arg + 2]), number(argv[arg + 3])};
        measure(&options, &shape, GGML_TYPE_Q8_0, pool);
        measure(&options, &shape, GGML_TYPE_F16, pool);
    }
    ggml_threadpool_free(pool);
}
