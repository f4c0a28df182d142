// Device memory and pinned host memory: given out, counted, taken back.
#include <unistd.h>

#include <cstdlib>

#include "queue.hpp"
#include "state.hpp"

namespace kv8::emulated {
namespace {

constexpr size_t kGranule = 512;  // what the driver's allocator rounds up to
constexpr size_t kPinnedAlign = 4096;
constexpr unsigned kHostAllocFlags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;

size_t round_up(size_t bytes, size_t granule) { return (bytes + granule - 1) / granule * granule; }

// Half of the machine's, since pages that are locked are nobody else's.
size_t pinnable_bytes() {
    static const size_t kBytes = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 2;
    return kBytes;
}

CUresult allocate_pinned(Context& context, void** pointer, size_t bytes) {
    if (const CUresult code = deny_in_captures(context); code != CUDA_SUCCESS) return code;
    const size_t most = pinnable_bytes() - context.pinned_bytes_used;
    if (bytes > most || round_up(bytes, kPinnedAlign) > most) return CUDA_ERROR_OUT_OF_MEMORY;
    void* block = std::aligned_alloc(kPinnedAlign, round_up(bytes, kPinnedAlign));
    if (block == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    context.pinned_memory.emplace(reinterpret_cast<uintptr_t>(block), bytes);
    context.pinned_bytes_used += round_up(bytes, kPinnedAlign);
    *pointer = block;
    return CUDA_SUCCESS;
}

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    return in_context([&](Context& context) {
        if (free_bytes == nullptr || total == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *total = settings().memory_bytes;
        *free_bytes = settings().memory_bytes - context.device_bytes_used;
        return CUDA_SUCCESS;
    });
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    return in_context([&](Context& context) {
        if (address == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult code = deny_in_captures(context); code != CUDA_SUCCESS) return code;
        const size_t most = settings().memory_bytes - context.device_bytes_used;
        if (bytes > most || round_up(bytes, kGranule) > most) return CUDA_ERROR_OUT_OF_MEMORY;
        const uint64_t block = allocate(bytes);
        if (block == 0) return CUDA_ERROR_OUT_OF_MEMORY;
        context.device_memory.emplace(block, bytes);
        context.device_bytes_used += round_up(bytes, kGranule);
        *address = block;
        return CUDA_SUCCESS;
    });
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    return in_context([&](Context& context) {
        const auto found = context.device_memory.find(address);
        if (found == context.device_memory.end()) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult code = deny_in_captures(context); code != CUDA_SUCCESS) return code;
        if (const CUresult code = finish_all(context); code != CUDA_SUCCESS) return code;
        context.device_bytes_used -= round_up(found->second, kGranule);
        context.device_memory.erase(found);
        return release(address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    });
}

CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    return in_context([&](Context& context) {
        if (pointer == nullptr || bytes == 0 || (flags & ~kHostAllocFlags) != 0) return CUDA_ERROR_INVALID_VALUE;
        return allocate_pinned(context, pointer, bytes);
    });
}

CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }

CUresult cuMemFreeHost(void* pointer) {
    return in_context([&](Context& context) {
        const auto found = context.pinned_memory.find(reinterpret_cast<uintptr_t>(pointer));
        if (found == context.pinned_memory.end()) return CUDA_ERROR_INVALID_VALUE;
        if (const CUresult code = deny_in_captures(context); code != CUDA_SUCCESS) return code;
        if (const CUresult code = finish_all(context); code != CUDA_SUCCESS) return code;
        context.pinned_bytes_used -= round_up(found->second, kPinnedAlign);
        context.pinned_memory.erase(found);
        std::free(pointer);
        return CUDA_SUCCESS;
    });
}
