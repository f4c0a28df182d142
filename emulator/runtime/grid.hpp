// Runs a kernel's grid on the CPU: every thread of a block (and of a cluster) as a fiber of its own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace kv8::emulated {

struct Kernel {
    const char* symbol;
    void (*call)(const void* params);  // the kernel, for the thread that runs; `params` is its one argument
    size_t param_bytes;
    uint32_t max_threads;  // of __launch_bounds__
    uint32_t min_ctas;     // of __launch_bounds__; at least 1
};

struct GridShape {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t cluster;  // blocks along z; 1: none
    uint32_t shared_bytes;  // dynamic
};

// nullptr: there is no such kernel.
const Kernel* find_kernel(std::string_view symbol);

// Work of the stream that a launch overlaps with; answers as run_grid. An empty function: there is none.
using Before = std::function<std::string()>;

// Runs all blocks. Empty on success, else what went wrong (a barrier that not all reach, an access outside memory, a copy whose operands are
// misaligned), with the place of the block. `before` is run as late as this kernel lets it: when it first waits for it, else at its end.
std::string run_grid(const Kernel& kernel, const GridShape& shape, const void* params, const Before& before = {});

// One of two, by the seed: whether a kernel is kept until the next one may overlap with it.
bool toss();

// The device's memory: filled with a pattern, aligned to 256 bytes, followed by pages that may not be touched. 0: no room.
uint64_t allocate(size_t bytes);
bool release(uint64_t address);

}  // namespace kv8::emulated
