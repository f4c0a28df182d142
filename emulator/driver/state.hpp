// All that the driver knows, behind one lock; and the two ways in for a call: with the driver initialised, with a context current.
//
// Work runs at the call that queues it, in the calling thread and with the lock held: a stream's order is the order of calls. Only a kernel
// may be kept back (Line), and runs at the next call at the latest. What a real device would report later is reported later here too: a
// kernel that fails leaves its error in the context, for the calls that follow.
#pragma once
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../runtime/grid.hpp"
#include "api.hpp"
#include "handles.hpp"
#include "settings.hpp"

namespace kv8::emulated {

struct Context;

// One piece of device work with copies of its arguments, runnable any number of times.
struct Operation {
    // Answers as run_grid. A kernel alone takes a Before.
    std::function<std::string(const Context&, const Before&)> run;
    bool is_kernel = false;
    bool overlaps = false;  // a kernel that may begin before the kernel before it has ended
};
using Operations = std::vector<Operation>;

// Runs work in its order. A kernel may be kept back until the next one begins that may overlap with it: what that reads before it
// waits is then what lay there before the first.
class Line {
public:
    std::string take(const Context& context, const Operation& operation);
    // Runs what is kept back.
    std::string finish(const Context& context);

private:
    std::optional<Operation> kept_;
};

struct Capture {
    CUstreamCaptureMode mode;
    std::thread::id thread;  // that began it
    bool is_invalid;
    Operations operations;
};

struct Stream {
    unsigned flags;
    std::unique_ptr<Capture> capture;  // nullptr: none is under way
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
    ~Context();  // gives all memory back

    CUresult lost = CUDA_SUCCESS;  // what every call answers once a kernel has failed
    Handles<CUstream, Stream> streams;
    Handles<CUevent, Event> events;
    Handles<CUgraph, Graph> graphs;
    Handles<CUgraphExec, Graph> execs;
    Handles<CUmodule, Module> modules;
    Handles<CUfunction, Function> functions;
    Line line;
    CUstream line_stream = nullptr;  // of the work that is kept back
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

// Tells of work that has gone wrong, if it has: its text goes to the standard error, and the context is lost.
void judge(Context& context, const std::string& wrong);

// Whether work that is kept back has to run before a call.
enum class Kept { kRuns, kStays };

// `work(Context&)` with the state locked, in the current context, unless that is lost.
template <Kept KEPT = Kept::kRuns, class Work>
CUresult in_context(Work work) {
    return when_initialized([&](State& state) -> CUresult {
        if (ContextStack::of_thread().current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
        if (state.primary == nullptr) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
        if (state.primary->lost != CUDA_SUCCESS) return state.primary->lost;
        if (KEPT == Kept::kRuns) judge(*state.primary, state.primary->line.finish(*state.primary));
        if (state.primary->lost != CUDA_SUCCESS) return state.primary->lost;
        return work(*state.primary);
    });
}

inline bool is_device(CUdevice device) { return device == 0; }

}  // namespace kv8::emulated
