// Occupancy, as the programming guide and NVIDIA's occupancy calculator reckon it.
#include "occupancy.hpp"

#include <algorithm>

namespace kv8::emulated {
namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMostRegisters = 248;     // a thread; 255 is the limit, given out in eights
constexpr uint32_t kFewestRegisters = 24;
constexpr uint32_t kRegisterUnit = 256;      // a warp's registers are given out in these
constexpr uint32_t kWarpUnit = 4;            // warps find room in fours, one on each quarter of a multiprocessor
constexpr uint32_t kSharedUnit = 128;        // bytes

uint32_t round_up(uint32_t value, uint32_t unit) { return (value + unit - 1) / unit * unit; }

uint32_t warps_of(uint32_t threads) { return (threads + kLanes - 1) / kLanes; }

uint32_t blocks_by_registers(uint32_t registers, uint32_t num_warps) {
    const uint32_t room = kRegisters / round_up(registers * kLanes, kRegisterUnit);
    return room / kWarpUnit * kWarpUnit / num_warps;
}

}  // namespace

uint32_t registers_of(const Kernel& kernel) {
    uint32_t registers = kMostRegisters;
    while (registers > kFewestRegisters && blocks_by_registers(registers, warps_of(kernel.max_threads)) < kernel.min_ctas) registers -= 8;
    return registers;
}

uint32_t blocks_per_processor(const Function& function, uint32_t block_threads, size_t dynamic_shared_bytes) {
    const Architecture& architecture = *settings().architecture;
    if (block_threads > function.kernel->max_threads || dynamic_shared_bytes > function.max_dynamic_shared) return 0;
    const uint32_t num_warps = warps_of(block_threads);
    const uint32_t shared = round_up(static_cast<uint32_t>(dynamic_shared_bytes) + kReservedShared, kSharedUnit);
    return std::min({architecture.blocks_per_processor, architecture.threads_per_processor / (num_warps * kLanes),
                     blocks_by_registers(registers_of(*function.kernel), num_warps), architecture.shared_per_processor / shared});
}

}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int block_threads, size_t dynamic_shared_bytes) {
    return in_context([&](Context& context) {
        if (blocks == nullptr || block_threads <= 0) return CUDA_ERROR_INVALID_VALUE;
        const Function* function = context.functions.find(handle);
        if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        *blocks = static_cast<int>(blocks_per_processor(*function, static_cast<uint32_t>(block_threads), dynamic_shared_bytes));
        return CUDA_SUCCESS;
    });
}

CUresult cuOccupancyMaxPotentialClusterSize(int* blocks, CUfunction handle, const CUlaunchConfig* config) {
    return in_context([&](Context& context) {
        if (blocks == nullptr || config == nullptr) return CUDA_ERROR_INVALID_VALUE;
        const Function* function = context.functions.find(handle);
        if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        if (settings().architecture->sm < kClusterSm) return CUDA_ERROR_NOT_SUPPORTED;
        const uint64_t threads = uint64_t{config->blockDimX} * config->blockDimY * config->blockDimZ;
        if (threads == 0 || threads > kMaxThreads) return CUDA_ERROR_INVALID_VALUE;
        if (blocks_per_processor(*function, static_cast<uint32_t>(threads), config->sharedMemBytes) == 0) return CUDA_ERROR_INVALID_VALUE;
        *blocks = static_cast<int>(function->non_portable_cluster ? kLargestCluster : kPortableCluster);
        return CUDA_SUCCESS;
    });
}
