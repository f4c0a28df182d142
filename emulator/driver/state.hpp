// All that the driver knows, behind one lock; and the two ways in for a call: with the driver initialised, with a context current.
//
// Work runs at the call that queues it, in the calling thread and with the lock held, but for a kernel that its stream keeps back (line.hpp)
// until the stream's next work, or a call that waits for it. What a real device would report later is reported later here too: a kernel
// that fails leaves its error in the context, for the calls that follow.
#pragma once
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "../runtime/grid.hpp"
#include "api.hpp"
#include "handles.hpp"
#include "line.hpp"
#include "settings.hpp"

namespace kv8::emulated {

using Operations = std::vector<Operation>;

struct Capture {
    CUstreamCaptureMode mode;
    std::thread::id thread;  // that began it
    bool is_invalid;
    Operations operations;
};

struct Stream {
    unsigned flags;
    std::unique_ptr<Capture> capture;  // nullptr: none is under way
    Line line;
};

struct Event {
    unsigned flags;
    bool was_recorded;
    bool is_captured;  // its last record went into a capture and has no time
    std::chrono::steady_clock::time_point at;
};

// Shared with the executable graphs made of it, which outlive it.
struct Graph {
    std::shared_ptr<const Operations> operations;
};

struct Module {
    std::map<std::string, CUfunction, std::less<>> functions;  // asked for so far
};

struct Function {
    const Kernel* kernel;
    CUmodule module;
    uint32_t max_dynamic_shared;
    bool non_portable_cluster;
    int carveout;
    int cluster_policy;
};

struct Context {
    Context() = default;
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;
    ~Context();  // runs what is kept back, gives all memory back

    CUresult lost = CUDA_SUCCESS;  // what every call answers once a kernel has failed
    Line legacy_line, per_thread_line;  // of the default streams
    Handles<CUstream, Stream> streams;
    Handles<CUevent, Event> events;
    Handles<CUgraph, Graph> graphs;
    Handles<CUgraphExec, Graph> execs;
    Handles<CUmodule, Module> modules;
    Handles<CUfunction, Function> functions;
    std::map<uint64_t, size_t> device_memory;  // bytes asked for, by address
    std::map<uintptr_t, size_t> pinned_memory;
    size_t device_bytes_used = 0;
    size_t pinned_bytes_used = 0;

    // Whether the range lies inside one live allocation of device memory, or of pinned memory, which the device sees at the same address.
    bool holds(uint64_t address, size_t bytes) const;
};

struct State {
    std::mutex mutex;
    bool is_initialized = false;
    // There is one context, the primary one of the one device. Its handle stays the same when it is destroyed and made again.
    CUcontext primary_handle = reinterpret_cast<CUcontext>(next_handle());
    std::unique_ptr<Context> primary;
    unsigned num_retains = 0;
    unsigned context_flags = 0;

    static State& get();
};

// The contexts of one thread; the last one is current. Without a destructor, so that destructors of the thread's other values may call.
class ContextStack {
public:
    static ContextStack& of_thread();

    // nullptr: none is.
    CUcontext current() const { return depth_ == 0 ? nullptr : entries_[depth_ - 1]; }
    // false: no room.
    bool push(CUcontext context);
    // nullptr: there was none.
    CUcontext pop();

private:
    static constexpr unsigned kMostContexts = 64;
    CUcontext entries_[kMostContexts];
    unsigned depth_;
};

// `work(State&)` with the state locked, in a driver that is initialised.
template <class Work>
CUresult when_initialized(Work work) {
    State& state = State::get();
    const std::lock_guard lock(state.mutex);
    if (!state.is_initialized) return CUDA_ERROR_NOT_INITIALIZED;
    try {
        return work(state);
    } catch (const std::bad_alloc&) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
}

// `work(Context&)` with the state locked, in the current context, unless that is lost.
template <class Work>
CUresult in_context(Work work) {
    return when_initialized([&](State& state) -> CUresult {
        if (ContextStack::of_thread().current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
        if (state.primary == nullptr) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
        if (state.primary->lost != CUDA_SUCCESS) return state.primary->lost;
        return work(*state.primary);
    });
}

inline bool is_device(CUdevice device) { return device == 0; }

}  // namespace kv8::emulated
