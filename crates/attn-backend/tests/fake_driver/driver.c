/* A CUDA driver of host memory, for tests: allocations are malloc, copies are memcpy, kernels do nothing.
 *
 * Environment: FAKE_VERSION, FAKE_COUNT, FAKE_SM, FAKE_BYTES (device memory) describe the machine.
 * FAKE_FAIL_CALL=k makes the k-th call answer FAKE_FAIL_CODE; FAKE_FAIL_NAME=symbol makes every call of that symbol do so.
 * Codes from 700 on are sticky: every later call answers the same, as a real driver does once a context is lost.
 * On exit it says how many calls there were and what is still alive. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long calls, live_bytes, buffers, pinned, streams, events, graphs, modules, contexts, peak_buffers;
static int lost;
static __thread void* current;

static long setting(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text != NULL ? atol(text) : otherwise;
}

/* Counts a call; answers what it must answer instead of doing its work, or 0. */
static int enter(const char* name) {
    pthread_mutex_lock(&lock);
    ++calls;
    int code = lost;
    const char* which = getenv("FAKE_FAIL_NAME");
    if (code == 0 && (calls == setting("FAKE_FAIL_CALL", 0) || (which != NULL && strcmp(which, name) == 0))) {
        code = (int)setting("FAKE_FAIL_CODE", 2);
        if (getenv("FAKE_TELL") != NULL) fprintf(stderr, "fake driver: %s answers %d\n", name, code);
        if (code >= 700 && code < 800) lost = code;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static void add(long* counter, long n) {
    pthread_mutex_lock(&lock);
    *counter += n;
    if (buffers > peak_buffers) peak_buffers = buffers;
    pthread_mutex_unlock(&lock);
}

__attribute__((destructor)) static void report(void) {
    if (getenv("FAKE_TELL") == NULL) return;
    fprintf(stderr,
            "fake driver: %ld calls; alive: %ld buffers, %ld bytes, %ld pinned, %ld streams, %ld events, %ld graphs, "
            "%ld modules, %ld contexts; most buffers %ld\n",
            calls, buffers, live_bytes, pinned, streams, events, graphs, modules, contexts, peak_buffers);
}

#define ENTER                       \
    int code = enter(__func__);     \
    if (code != 0) return code;
/* What frees does so whatever it answers. */
#define FREES(counter)              \
    int code = enter(__func__);     \
    add(&counter, -1);

int cuInit(unsigned flags) { ENTER (void)flags; return 0; }
int cuDriverGetVersion(int* version) { ENTER *version = (int)setting("FAKE_VERSION", 13000); return 0; }
int cuDeviceGetCount(int* count) { ENTER *count = (int)setting("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int* device, int ordinal) { ENTER *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int len, int device) { ENTER (void)device; snprintf(name, (size_t)len, "Fake"); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { ENTER (void)device; *bytes = (size_t)setting("FAKE_BYTES", 1 << 30); return 0; }
int cuDeviceGetAttribute(int* value, unsigned attribute, int device) {
    ENTER
    (void)device;
    int sm = (int)setting("FAKE_SM", 90);
    switch (attribute) {
        case 75: *value = sm / 10; break;
        case 76: *value = sm % 10; break;
        case 16: *value = 4; break;
        case 97: *value = 232448; break;
        case 81: *value = 233472; break;
        case 38: *value = 50 << 20; break;
        default: *value = 0;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { ENTER (void)device; *context = (void*)0x1000; add(&contexts, 1); return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { FREES(contexts) (void)device; return code; }
int cuDevicePrimaryCtxRelease(int device) { FREES(contexts) (void)device; return code; }
int cuCtxGetCurrent(void** context) { ENTER *context = current; return 0; }
int cuCtxSetCurrent(void* context) { ENTER current = context; return 0; }
int cuCtxSynchronize(void) { ENTER return 0; }
int cuGetErrorName(int code, const char** text) {
    *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
    return 0;
}
int cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

/* Device memory knows its size, so that the sum is known too. */
int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    ENTER
    *total = (size_t)setting("FAKE_BYTES", 1 << 30);
    *free_bytes = *total - (size_t)live_bytes;
    return 0;
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    ENTER
    if (live_bytes + (long)bytes > setting("FAKE_BYTES", 1 << 30)) return 2;
    size_t* block = aligned_alloc(256, (bytes + 256 + 255) / 256 * 256);
    if (block == NULL) return 2;
    block[0] = bytes;
    add(&buffers, 1);
    add(&live_bytes, (long)bytes);
    *address = (uint64_t)(uintptr_t)block + 256;
    return 0;
}
int cuMemFree_v2(uint64_t address) {
    FREES(buffers)
    size_t* block = (size_t*)(uintptr_t)(address - 256);
    add(&live_bytes, -(long)block[0]);
    free(block);
    return code;
}
int cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    ENTER
    (void)flags;
    *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (*pointer == NULL) return 2;
    add(&pinned, 1);
    return 0;
}
int cuMemFreeHost(void* pointer) { FREES(pinned) free(pointer); return code; }
#define COPY(name, to_type, from_type)                                                          \
    int name(to_type to, from_type from, size_t bytes) {                                        \
        ENTER memcpy((void*)(uintptr_t)to, (const void*)(uintptr_t)from, bytes);                \
        return 0;                                                                               \
    }
#define COPY_ASYNC(name, to_type, from_type)                                                    \
    int name(to_type to, from_type from, size_t bytes, void* stream) {                          \
        ENTER (void)stream;                                                                     \
        memcpy((void*)(uintptr_t)to, (const void*)(uintptr_t)from, bytes);                      \
        return 0;                                                                               \
    }
COPY(cuMemcpyHtoD_v2, uint64_t, const void*)
COPY(cuMemcpyDtoH_v2, void*, uint64_t)
COPY_ASYNC(cuMemcpyHtoDAsync_v2, uint64_t, const void*)
COPY_ASYNC(cuMemcpyDtoHAsync_v2, void*, uint64_t)
COPY_ASYNC(cuMemcpyDtoDAsync_v2, uint64_t, uint64_t)
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void* stream) {
    ENTER
    (void)stream;
    memset((void*)(uintptr_t)address, value, count);
    return 0;
}

#define MAKES(name, counter, ...)                                                               \
    int name(void** handle, ##__VA_ARGS__) {                                                    \
        ENTER *handle = malloc(1);                                                              \
        add(&counter, 1);                                                                       \
        return 0;                                                                               \
    }
#define UNMAKES(name, counter)                                                                  \
    int name(void* handle) {                                                                    \
        FREES(counter) free(handle);                                                            \
        return code;                                                                            \
    }
MAKES(cuStreamCreate, streams, unsigned flags)
UNMAKES(cuStreamDestroy_v2, streams)
int cuStreamSynchronize(void* stream) { ENTER (void)stream; return 0; }
MAKES(cuEventCreate, events, unsigned flags)
UNMAKES(cuEventDestroy_v2, events)
int cuEventRecord(void* event, void* stream) { ENTER (void)event; (void)stream; return 0; }
int cuEventSynchronize(void* event) { ENTER (void)event; return 0; }
int cuEventElapsedTime(float* ms, void* a, void* b) { ENTER (void)a; (void)b; *ms = 1.0f; return 0; }
int cuStreamBeginCapture_v2(void* stream, unsigned mode) { ENTER (void)stream; (void)mode; return 0; }
int cuStreamEndCapture(void* stream, void** graph) {
    /* A failed capture still ends; it gives no graph. */
    int code = enter(__func__);
    (void)stream;
    *graph = NULL;
    if (code != 0) return code;
    *graph = malloc(1);
    add(&graphs, 1);
    return 0;
}
MAKES(cuGraphInstantiateWithFlags, graphs, void* graph, unsigned long long flags)
UNMAKES(cuGraphDestroy, graphs)
UNMAKES(cuGraphExecDestroy, graphs)
int cuGraphLaunch(void* exec, void* stream) { ENTER (void)exec; (void)stream; return 0; }
MAKES(cuModuleLoadDataEx, modules, const void* image, unsigned n, unsigned* options, void** values)
UNMAKES(cuModuleUnload, modules)
int cuModuleGetFunction(void** function, void* module, const char* name) { ENTER (void)module; (void)name; *function = (void*)0x2000; return 0; }
int cuFuncGetAttribute(int* value, unsigned attribute, void* function) {
    ENTER
    (void)function;
    *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : attribute == 6 ? 90 : 0;
    return 0;
}
int cuFuncSetAttribute(void* function, unsigned attribute, int value) { ENTER (void)function; (void)attribute; (void)value; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t bytes) {
    ENTER
    (void)function;
    (void)threads;
    (void)bytes;
    *blocks = 2;
    return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned bytes,
                   void* stream, void** params, void** extra) {
    ENTER
    (void)f; (void)gx; (void)gy; (void)gz; (void)bx; (void)by; (void)bz; (void)bytes; (void)stream; (void)params; (void)extra;
    return 0;
}
int cuLaunchKernelEx(const void* config, void* f, void** params, void** extra) {
    ENTER
    (void)config; (void)f; (void)params; (void)extra;
    return 0;
}
