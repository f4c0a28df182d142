// Clusters are shared out to the machine's processors; each processor runs the threads of one cluster in turns.
#include "grid.hpp"

#include <csetjmp>
#include <csignal>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>

#include "parts.hpp"
#include "thread.hpp"

namespace kv8::emulated {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kPattern = 0xa5;  // of shared memory that nobody has written
constexpr uint64_t kStep = 7919;  // a prime

namespace {

// A processor of the machine, while it runs a cluster.
struct Processor {
    Fiber scheduler = nullptr;
    Parts stacks, shared;
    Cluster cluster;
    const Kernel* kernel = nullptr;
    const void* params = nullptr;
    sigjmp_buf stopped;
    void* fault = nullptr;
    bool runs = false;
};

thread_local Processor* processor = nullptr;

void run_thread() {
    processor->kernel->call(processor->params);
    end_thread();
    Fiber gone;
    kv8_switch_fiber(&gone, processor->scheduler);
    std::abort();  // nobody comes back to a thread that has ended
}

void resume(Thread& thread) {
    current = &thread;
    kv8_switch_fiber(&processor->scheduler, thread.fiber);
}

bool can_run(const Thread& thread) {
    return !thread.has_ended && (thread.word == nullptr || (*thread.word & thread.mask) != thread.value);
}

std::string whose_turn(const Cluster& cluster) {
    std::string text;
    for (const Thread& thread : cluster.threads) {
        if (thread.has_ended || text.size() > 200) continue;
        text += " " + std::to_string(thread.block->index.z) + ":" + std::to_string(thread.index.x) + "," + std::to_string(thread.index.y);
    }
    return text;
}

// Threads of a warp run in the order of their lanes or against it, warps from a drawn one on.
void run_turns(Cluster& cluster) {
    const uint32_t num_threads = static_cast<uint32_t>(cluster.threads.size());
    while (cluster.num_live != 0) {
        bool ran = false;
        const uint32_t first = cluster.chance.below((num_threads + kLanes - 1) / kLanes) * kLanes;
        const bool backward = cluster.chance.below(2) != 0;
        for (uint32_t from = 0; from < num_threads; from += kLanes) {
            const uint32_t warp = (first + from) % ((num_threads + kLanes - 1) / kLanes * kLanes);
            const uint32_t end = std::min(num_threads, warp + kLanes);
            for (uint32_t i = warp; i < end; ++i) {
                Thread& thread = cluster.threads[backward ? end - 1 - (i - warp) : i];
                if (!can_run(thread)) continue;
                ran = true;
                resume(thread);
                if (!cluster.problem.empty()) return;
            }
        }
        if (ran || deliver_some(cluster)) continue;
        if (cluster.previous->is_done() == 0) {
            cluster.problem = cluster.previous->finish();
            if (!cluster.problem.empty()) return;
        } else {
            cluster.problem = "threads wait for what never comes (block z:thread)" + whose_turn(cluster);
            return;
        }
    }
    if (!cluster.copies.empty()) cluster.problem = "a bulk copy was still under way when its block ended";
}

void set_up(Processor& p, const GridShape& shape, Previous& previous, uint64_t cluster_idx, uint64_t seed) {
    Cluster& cluster = p.cluster;
    cluster.previous = &previous;
    const uint32_t num_threads = shape.block[0] * shape.block[1] * shape.block[2];
    const uint32_t num_warps = (num_threads + kLanes - 1) / kLanes;
    cluster.grid = {shape.grid[0], shape.grid[1], shape.grid[2]};
    cluster.block_shape = {shape.block[0], shape.block[1], shape.block[2]};
    cluster.shared_bytes = shape.shared_bytes;
    cluster.num_live = num_threads * shape.cluster;
    cluster.all = Meeting{};
    cluster.copies.clear();
    cluster.problem.clear();
    cluster.chance.state = (seed ^ (cluster_idx + 1) * 0x9e3779b97f4a7c15u) | 1;
    for (int i = 0; i < 4; ++i) cluster.chance.below(2);
    cluster.eager = cluster.chance.below(3) * 2;
    cluster.blocks.resize(shape.cluster);
    cluster.threads.resize(static_cast<size_t>(num_threads) * shape.cluster);
    p.stacks.make(cluster.threads.size(), kStackBytes);
    p.shared.make(shape.cluster, std::max((shape.shared_bytes + 127) & ~127u, 128u));
    const uint64_t grid_xy = static_cast<uint64_t>(shape.grid[0]) * shape.grid[1];
    for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
        Block& block = cluster.blocks[rank];
        const uint64_t xy = cluster_idx % grid_xy;
        block.index = {static_cast<uint32_t>(xy % shape.grid[0]), static_cast<uint32_t>(xy / shape.grid[0]),
                       static_cast<uint32_t>(cluster_idx / grid_xy) * shape.cluster + rank};
        block.rank = rank;
        block.num_live = num_threads;
        block.shared = p.shared.at(rank);
        std::memset(block.shared, kPattern, shape.shared_bytes);
        block.warps.resize(num_warps);
        block.all = Meeting{};
        std::fill(std::begin(block.named), std::end(block.named), Meeting{});
        block.cluster = &cluster;
        for (uint32_t w = 0; w < num_warps; ++w) {
            Warp& warp = block.warps[w];
            const uint32_t lanes = std::min(kLanes, num_threads - w * kLanes);
            warp.present = lanes == kLanes ? ~0u : (1u << lanes) - 1;
            warp.arrived = warp.generation = 0;
            warp.combine = nullptr;
        }
        for (uint32_t i = 0; i < num_threads; ++i) {
            const size_t idx = static_cast<size_t>(rank) * num_threads + i;
            Thread& thread = cluster.threads[idx];
            thread.reset();
            thread.index = {i % shape.block[0], i / shape.block[0] % shape.block[1], i / shape.block[0] / shape.block[1]};
            thread.lane = i % kLanes;
            thread.warp = &block.warps[i / kLanes];
            thread.block = &block;
            thread.fiber = make_fiber(p.stacks.at(idx), kStackBytes, run_thread);
        }
    }
}

// ---- accesses outside of memory ----

struct sigaction g_before[2];

void on_fault(int signal, siginfo_t* info, void* context) {
    if (processor != nullptr && processor->runs) {
        processor->fault = info->si_addr;
        siglongjmp(processor->stopped, 1);
    }
    // Not ours: whoever was there before.
    const struct sigaction& before = g_before[signal == SIGBUS];
    if ((before.sa_flags & SA_SIGINFO) != 0) return before.sa_sigaction(signal, info, context);
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(signal);
    std::signal(signal, SIG_DFL);
}

void watch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &g_before[0]);
        sigaction(SIGBUS, &action, &g_before[1]);
    });
}

// A handler cannot run on a stack that has just ended: each thread that runs kernels brings one.
struct FaultStack {
    uint8_t bytes[32 << 10];
    stack_t before{};
    FaultStack() {
        stack_t own{};
        own.ss_sp = bytes;
        own.ss_size = sizeof(bytes);
        sigaltstack(&own, &before);
    }
    ~FaultStack() { sigaltstack(&before, nullptr); }
};

std::string hex(const void* address) {
    char text[32];
    std::snprintf(text, sizeof text, "%p", address);
    return text;
}

std::string run_cluster(Processor& p) {
    if (sigsetjmp(p.stopped, 0) == 0) {
        p.runs = true;
        run_turns(p.cluster);
        p.runs = false;
    } else {
        p.runs = false;
        const Index3 b = current->block->index, t = current->index;
        p.cluster.problem = "an access outside of memory, at " + hex(p.fault) + " (block " + std::to_string(b.x) + " " + std::to_string(b.y) + " " +
                            std::to_string(b.z) + ", thread " + std::to_string(t.x) + " " + std::to_string(t.y) + ")";
    }
    return p.cluster.problem;
}

uint64_t number_from_env(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

// Of each thread of the system one for every launch that it is in: a launch may have to run the one before it.
Processor& processor_at(size_t depth) {
    static thread_local std::vector<std::unique_ptr<Processor>> own;
    while (own.size() <= depth) own.push_back(std::make_unique<Processor>());
    return *own[depth];
}

// Runs clusters until none is left, or one has failed: then its problem.
std::string run_clusters(const Kernel& kernel, const GridShape& shape, const void* params, Previous& previous, uint64_t seed,
                         uint64_t num_clusters, std::atomic<uint64_t>& next) {
    static thread_local size_t depth = 0;
    Processor* const outer = processor;
    Thread* const outer_thread = current;
    const FaultStack stack;
    Processor& own = processor_at(depth++);
    own.kernel = &kernel;
    own.params = params;
    std::string problem;
    // In no order that a kernel could count on: a step without a common divisor goes through all.
    const uint64_t step = num_clusters % kStep == 0 ? 1 : kStep;
    for (uint64_t idx = next.fetch_add(1); idx < num_clusters && problem.empty(); idx = next.fetch_add(1)) {
        processor = &own;
        set_up(own, shape, previous, (idx * step + seed % num_clusters) % num_clusters, seed);
        problem = run_cluster(own);
    }
    if (!problem.empty()) next = num_clusters;
    --depth;
    processor = outer;
    current = outer_thread;
    return problem;
}

uint64_t next_seed() {
    static std::atomic<uint64_t> drawn{number_from_env("KV8_EMULATED_SEED", 1) << 32};
    return (drawn.fetch_add(1) + 1) * 0xbf58476d1ce4e5b9u;
}

}  // namespace

void leave_fiber() { kv8_switch_fiber(&current->fiber, processor->scheduler); }

bool toss() { return (next_seed() >> 40 & 1) != 0; }

std::string run_grid(const Kernel& kernel, const GridShape& shape, const void* params, const Before& before) {
    watch_faults();
    const uint64_t seed = next_seed();
    const uint64_t num_clusters = static_cast<uint64_t>(shape.grid[0]) * shape.grid[1] * (shape.grid[2] / shape.cluster);
    Previous previous(before);
    std::atomic<uint64_t> next{0};
    std::mutex lock;
    std::string problem;
    const auto work = [&] {
        const std::string found = run_clusters(kernel, shape, params, previous, seed, num_clusters, next);
        const std::lock_guard<std::mutex> guard(lock);
        if (problem.empty()) problem = found;
    };
    const uint64_t num_workers = std::min<uint64_t>(std::max(1u, std::thread::hardware_concurrency()), num_clusters / 2);
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < num_workers; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    if (problem.empty()) problem = previous.finish();
    return problem;
}

}  // namespace kv8::emulated
