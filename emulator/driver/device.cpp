// The one device: whether it is there, what it is called, what it has.
#include <algorithm>
#include <cstring>

#include "state.hpp"

namespace kv8::emulated {
namespace {

constexpr char kName[] = "kv8 emulated GPU";

// Attributes that are not listed are things that the device does not have: 0.
int attribute_of(const Settings& settings, CUdevice_attribute which) {
    const Architecture& architecture = *settings.architecture;
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return kMaxThreads;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return kMaxThreadsZ;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return kMaxGridX;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return kMaxGridYz;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return kSharedWithoutOptin;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 64 << 10;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 0x7fff'ffff;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return kRegisters;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return architecture.clock_khz;
        case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return settings.num_processors;
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 1;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return architecture.memory_clock_khz;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return architecture.memory_bus_bits;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return architecture.l2_bytes;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return static_cast<int>(architecture.threads_per_processor);
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return static_cast<int>(architecture.blocks_per_processor);
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return static_cast<int>(architecture.sm / 10);
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return static_cast<int>(architecture.sm % 10);
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return static_cast<int>(architecture.shared_per_processor);
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return static_cast<int>(architecture.shared_optin);
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return kReservedShared;
        case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return architecture.sm >= kClusterSm ? 1 : 0;
        default: return 0;
    }
}

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuInit(unsigned flags) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (settings().architecture == nullptr) return CUDA_ERROR_NO_DEVICE;
    State& state = State::get();
    const std::lock_guard lock(state.mutex);
    state.is_initialized = true;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *version = kDriverVersion;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    return when_initialized([&](State&) {
        if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *count = 1;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    return when_initialized([&](State&) {
        if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
        if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
        *device = ordinal;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetName(char* name, int len, CUdevice device) {
    return when_initialized([&](State&) {
        if (name == nullptr || len <= 0) return CUDA_ERROR_INVALID_VALUE;
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        const size_t num_chars = std::min(sizeof kName, static_cast<size_t>(len)) - 1;
        std::memcpy(name, kName, num_chars);
        name[num_chars] = '\0';
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    return when_initialized([&](State&) {
        if (bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        *bytes = settings().memory_bytes;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    return when_initialized([&](State&) {
        if (value == nullptr || attribute < 1 || attribute >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
        if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
        *value = attribute_of(settings(), attribute);
        return CUDA_SUCCESS;
    });
}
