// What device is emulated: facts of an architecture, and what the environment sets.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kv8::emulated {

// Of NVIDIA's data sheets and the programming guide's table of compute capabilities.
struct Architecture {
    unsigned sm;  // compute capability, major * 10 + minor
    uint32_t shared_per_processor;
    uint32_t shared_optin;
    uint32_t threads_per_processor;
    uint32_t blocks_per_processor;
    int l2_bytes;
    int clock_khz;
    int memory_clock_khz;
    int memory_bus_bits;
};

constexpr uint32_t kMaxThreads = 1024;              // a block
constexpr uint32_t kMaxThreadsZ = 64;
constexpr uint32_t kMaxGridX = 0x7fff'ffff;
constexpr uint32_t kMaxGridYz = 65'535;
constexpr uint32_t kRegisters = 65'536;             // a multiprocessor, and a block at most
constexpr uint32_t kReservedShared = 1024;          // of each block, by the driver
constexpr uint32_t kSharedWithoutOptin = 48 << 10;
constexpr uint32_t kPortableCluster = 8;            // blocks; on every device that has clusters
constexpr uint32_t kLargestCluster = 16;
constexpr unsigned kClusterSm = 90;                 // the first with clusters
constexpr unsigned kOverlapSm = 90;                 // the first with launches that overlap
constexpr int kDriverVersion = 13'000;

struct Settings {
    const Architecture* architecture;  // nullptr: the environment asks for what there is not
    int num_processors;
    size_t memory_bytes;
};

// Read once.
const Settings& settings();

}  // namespace kv8::emulated
