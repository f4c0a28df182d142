// Copies and fills. A range of device memory has to lie inside one live allocation, when the call is made and when a graph replays it.
#include <algorithm>
#include <cstring>

#include "queue.hpp"
#include "state.hpp"

namespace kv8::emulated {
namespace {

void* pointer_of(uint64_t address) { return reinterpret_cast<void*>(address); }
uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

enum class Kind { HostToDevice, DeviceToHost, DeviceToDevice };

bool fits(const Context& context, Kind kind, uint64_t to, uint64_t from, size_t bytes) {
    return (kind == Kind::DeviceToHost || context.holds(to, bytes)) && (kind == Kind::HostToDevice || context.holds(from, bytes));
}

CUresult copy(Context& context, Kind kind, uint64_t to, uint64_t from, size_t bytes, CUstream stream) {
    if (bytes == 0) return CUDA_SUCCESS;
    if (to == 0 || from == 0 || !fits(context, kind, to, from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    const auto run = [=](const Context& now, const Before&) -> std::string {
        if (!fits(now, kind, to, from, bytes)) return "a copy of a graph: its device memory has been freed";
        std::memmove(pointer_of(to), pointer_of(from), bytes);
        return {};
    };
    return enqueue(context, stream, {run, false, false});
}

CUresult copy_async(Kind kind, uint64_t to, uint64_t from, size_t bytes, CUstream stream) {
    return in_context([&](Context& context) { return copy(context, kind, to, from, bytes, stream); });
}

// These wait for what they have queued, which a capture forbids.
CUresult copy_now(Kind kind, uint64_t to, uint64_t from, size_t bytes) {
    return in_context([&](Context& context) {
        const CUresult code = deny_in_captures(context);
        return code != CUDA_SUCCESS ? code : copy(context, kind, to, from, bytes, nullptr);
    });
}

template <class Value>
CUresult fill(Context& context, uint64_t address, Value value, size_t count, CUstream stream) {
    if (count == 0) return CUDA_SUCCESS;
    const size_t bytes = count * sizeof value;
    if (bytes / sizeof value != count || address % sizeof value != 0) return CUDA_ERROR_INVALID_VALUE;
    if (!context.holds(address, bytes)) return CUDA_ERROR_INVALID_VALUE;
    const auto run = [=](const Context& now, const Before&) -> std::string {
        if (!now.holds(address, bytes)) return "a fill of a graph: its device memory has been freed";
        std::fill_n(static_cast<Value*>(pointer_of(address)), count, value);
        return {};
    };
    return enqueue(context, stream, {run, false, false});
}

template <class Value>
CUresult fill_async(uint64_t address, Value value, size_t count, CUstream stream) {
    return in_context([&](Context& context) { return fill(context, address, value, count, stream); });
}

template <class Value>
CUresult fill_now(uint64_t address, Value value, size_t count) {
    return in_context([&](Context& context) {
        const CUresult code = deny_in_captures(context);
        return code != CUDA_SUCCESS ? code : fill(context, address, value, count, nullptr);
    });
}

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return copy_now(Kind::HostToDevice, to, address_of(from), bytes);
}

CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return copy_now(Kind::DeviceToHost, address_of(to), from, bytes);
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy_now(Kind::DeviceToDevice, to, from, bytes); }

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return copy_async(Kind::HostToDevice, to, address_of(from), bytes, stream);
}

CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy_async(Kind::DeviceToHost, address_of(to), from, bytes, stream);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy_async(Kind::DeviceToDevice, to, from, bytes, stream);
}

CUresult cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t count) { return fill_now(address, value, count); }
CUresult cuMemsetD16_v2(CUdeviceptr address, unsigned short value, size_t count) { return fill_now(address, value, count); }
CUresult cuMemsetD32_v2(CUdeviceptr address, unsigned value, size_t count) { return fill_now(address, value, count); }

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
    return fill_async(address, value, count, stream);
}

CUresult cuMemsetD16Async(CUdeviceptr address, unsigned short value, size_t count, CUstream stream) {
    return fill_async(address, value, count, stream);
}

CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
    return fill_async(address, value, count, stream);
}
