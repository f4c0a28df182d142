// Modules and functions. An image is NVIDIA's machine code, of which nothing here can be run: it is recognised, and the kernels of
// the same names that this library was built with are run in its place.
#include <cstring>

#include "occupancy.hpp"
#include "queue.hpp"
#include "state.hpp"

namespace kv8::emulated {
namespace {

constexpr uint32_t kFatbinMagic = 0xba55'ed50;
constexpr uint16_t kFatbinVersion = 1;
constexpr uint32_t kFatbinWrapperMagic = 0x4662'43b1;  // of the structure that nvcc links around a fatbin
constexpr char kElfMagic[] = {0x7f, 'E', 'L', 'F'};

template <class Value>
Value read(const void* from, size_t offset) {
    Value value;
    std::memcpy(&value, static_cast<const char*>(from) + offset, sizeof value);
    return value;
}

bool is_image(const void* image) {
    const auto magic = read<uint32_t>(image, 0);
    if (magic == kFatbinWrapperMagic) {
        const auto* fatbin = read<const void*>(image, 8);
        return fatbin != nullptr && read<uint32_t>(fatbin, 0) == kFatbinMagic;
    }
    if (magic == kFatbinMagic) return read<uint16_t>(image, 4) == kFatbinVersion;
    return std::memcmp(image, kElfMagic, sizeof kElfMagic) == 0;
}

CUresult attribute_of(const Function& function, CUfunction_attribute which, int& value) {
    const int sm = static_cast<int>(settings().architecture->sm);
    switch (which) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: value = static_cast<int>(function.kernel->max_threads); break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: value = static_cast<int>(registers_of(*function.kernel)); break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: value = sm; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: value = static_cast<int>(function.max_dynamic_shared); break;
        case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: value = function.carveout; break;
        case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: value = function.non_portable_cluster ? 1 : 0; break;
        case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE: value = function.cluster_policy; break;
        // Shared memory is dynamic alone, nothing spills, and clusters are set by launches.
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
        case CU_FUNC_ATTRIBUTE_CLUSTER_SIZE_MUST_BE_SET:
        case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
        case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT:
        case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH: value = 0; break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult set_attribute(Function& function, CUfunction_attribute which, int value) {
    const Architecture& architecture = *settings().architecture;
    const auto is_within = [&](int low, int high) { return value >= low && value <= high; };
    switch (which) {
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            if (!is_within(0, static_cast<int>(architecture.shared_optin))) return CUDA_ERROR_INVALID_VALUE;
            function.max_dynamic_shared = static_cast<uint32_t>(value);
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
            if (!is_within(CU_SHAREDMEM_CARVEOUT_DEFAULT, 100)) return CUDA_ERROR_INVALID_VALUE;
            function.carveout = value;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
            if (architecture.sm < kClusterSm) return CUDA_ERROR_NOT_SUPPORTED;
            if (!is_within(0, 1)) return CUDA_ERROR_INVALID_VALUE;
            function.non_portable_cluster = value != 0;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
            if (architecture.sm < kClusterSm) return CUDA_ERROR_NOT_SUPPORTED;
            if (!is_within(CU_CLUSTER_SCHEDULING_POLICY_DEFAULT, CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING)) {
                return CUDA_ERROR_INVALID_VALUE;
            }
            function.cluster_policy = value;
            return CUDA_SUCCESS;
        // Those of the code cannot be changed.
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return in_context([&](Context& context) {
        if (module == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
        if (!is_image(image)) return CUDA_ERROR_INVALID_IMAGE;
        *module = context.modules.add();
        return CUDA_SUCCESS;
    });
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned num_options, CUjit_option* options, void** values) {
    // The options steer a compilation that does not take place.
    if (num_options != 0 && (options == nullptr || values == nullptr)) return CUDA_ERROR_INVALID_VALUE;
    return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule module) {
    return in_context([&](Context& context) {
        if (!context.modules.remove(module)) return CUDA_ERROR_INVALID_HANDLE;
        const CUresult code = finish_all(context);
        context.functions.remove_all([&](const Function& function) { return function.module == module; });
        return code;
    });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    return in_context([&](Context& context) {
        if (function == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
        Module* module = context.modules.find(handle);
        if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        if (const auto known = module->functions.find(name); known != module->functions.end()) {
            *function = known->second;
            return CUDA_SUCCESS;
        }
        const Kernel* kernel = find_kernel(name);
        if (kernel == nullptr) return CUDA_ERROR_NOT_FOUND;
        *function = context.functions.add(kernel, handle, kSharedWithoutOptin, false, int{CU_SHAREDMEM_CARVEOUT_DEFAULT},
                                          int{CU_CLUSTER_SCHEDULING_POLICY_DEFAULT});
        module->functions.emplace(name, *function);
        return CUDA_SUCCESS;
    });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
    return in_context([&](Context& context) {
        if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
        const Function* function = context.functions.find(handle);
        return function == nullptr ? CUDA_ERROR_INVALID_HANDLE : attribute_of(*function, attribute, *value);
    });
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    return in_context([&](Context& context) {
        Function* function = context.functions.find(handle);
        return function == nullptr ? CUDA_ERROR_INVALID_HANDLE : set_attribute(*function, attribute, value);
    });
}
