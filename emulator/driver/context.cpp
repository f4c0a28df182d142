// The primary context: made by its first retain, destroyed by its last release, current or not for each thread by itself.
#include <cstdlib>
#include <iterator>

#include "queue.hpp"
#include "state.hpp"

namespace kv8::emulated {

State& State::get() {
    // Never destroyed: threads may call while the process ends.
    static State* const kState = new State;
    return *kState;
}

ContextStack& ContextStack::of_thread() {
    thread_local ContextStack stack{};
    return stack;
}

bool ContextStack::push(CUcontext context) {
    if (depth_ == kMostContexts) return false;
    entries_[depth_++] = context;
    return true;
}

CUcontext ContextStack::pop() { return depth_ == 0 ? nullptr : entries_[--depth_]; }

Context::~Context() {
    finish_all(*this);
    for (const auto& [address, bytes] : device_memory) release(address);
    for (const auto& [address, bytes] : pinned_memory) std::free(reinterpret_cast<void*>(address));
}

bool Context::holds(uint64_t address, size_t bytes) const {
    const auto inside = [&](const auto& memory) {
        const auto after = memory.upper_bound(address);
        if (after == memory.begin()) return false;
        const auto& [start, length] = *std::prev(after);
        const uint64_t offset = address - start;
        return offset <= length && bytes <= length - offset;
    };
    return inside(device_memory) || inside(pinned_memory);
}

namespace {

constexpr unsigned kContextFlags = 0x7ff;  // CU_CTX_FLAGS_MASK and the coredump bits, none of which changes anything here

CUresult check_context(const State& state, CUcontext context) {
    return context == state.primary_handle ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return when_initialized([&](State& state) {
        if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        if (state.primary == nullptr) state.primary = std::make_unique<Context>();
        ++state.num_retains;
        *context = state.primary_handle;
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return when_initialized([&](State& state) {
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        if (state.num_retains == 0) return CUDA_ERROR_INVALID_CONTEXT;
        if (--state.num_retains == 0) state.primary.reset();
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
    return when_initialized([&](State& state) {
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        // Who has retained it goes on with an empty one.
        state.primary = state.num_retains == 0 ? nullptr : std::make_unique<Context>();
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    return when_initialized([&](State& state) {
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        if ((flags & ~kContextFlags) != 0) return CUDA_ERROR_INVALID_VALUE;
        state.context_flags = flags;
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return when_initialized([&](State& state) {
        if (flags == nullptr || active == nullptr) return CUDA_ERROR_INVALID_VALUE;
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        *flags = state.context_flags;
        *active = state.primary != nullptr ? 1 : 0;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    return when_initialized([&](State&) {
        if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *context = ContextStack::of_thread().current();
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxSetCurrent(CUcontext context) {
    return when_initialized([&](State& state) {
        if (context != nullptr && check_context(state, context) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_CONTEXT;
        ContextStack& stack = ContextStack::of_thread();
        stack.pop();
        return context == nullptr || stack.push(context) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    });
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    return when_initialized([&](State& state) {
        if (const CUresult code = check_context(state, context); code != CUDA_SUCCESS) return code;
        return ContextStack::of_thread().push(context) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    });
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    return when_initialized([&](State&) {
        const CUcontext popped = ContextStack::of_thread().pop();
        if (popped == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
        if (context != nullptr) *context = popped;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetDevice(CUdevice* device) {
    return in_context([&](Context&) {
        if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *device = 0;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetFlags(unsigned* flags) {
    return in_context([&](Context&) {
        if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *flags = State::get().context_flags;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetApiVersion(CUcontext context, unsigned* version) {
    return when_initialized([&](State& state) {
        if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
        const CUcontext which = context != nullptr ? context : ContextStack::of_thread().current();
        if (check_context(state, which) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_CONTEXT;
        *version = 3020;  // of every context since CUDA 3.2
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxSynchronize() {
    return in_context([](Context& context) {
        const CUresult code = deny_in_captures(context);
        return code != CUDA_SUCCESS ? code : finish_all(context);
    });
}
