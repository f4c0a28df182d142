// Launches: checked as the driver checks them, with the argument copied at the call.
#include <cstring>

#include "queue.hpp"
#include "state.hpp"

namespace kv8::emulated {
namespace {

// A kernel's argument may ask for this alignment at most.
struct alignas(64) ParamBlock {
    unsigned char bytes[64];
};

CUresult read_attributes(const CUlaunchConfig& config, const Function& function, uint32_t& cluster, bool& overlaps) {
    cluster = 1;
    overlaps = false;
    if (config.numAttrs != 0 && config.attrs == nullptr) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const CUlaunchAttribute& attribute = config.attrs[i];
        switch (attribute.id) {
            case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: {
                const auto& dim = attribute.value.clusterDim;
                if (dim.x == 0 || dim.y == 0 || dim.z == 0) return CUDA_ERROR_INVALID_VALUE;
                if (dim.x != 1 || dim.y != 1) return CUDA_ERROR_NOT_SUPPORTED;
                const uint32_t most = function.non_portable_cluster ? kLargestCluster : kPortableCluster;
                const bool has_clusters = settings().architecture->sm >= kClusterSm;
                if (dim.z > (has_clusters ? most : 1)) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
                cluster = dim.z;
                break;
            }
            case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
                overlaps = attribute.value.programmaticStreamSerializationAllowed != 0 && settings().architecture->sm >= kOverlapSm;
                break;
            case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
                if (attribute.value.cooperative != 0) return CUDA_ERROR_NOT_SUPPORTED;
                break;
            // These say when and where blocks run, which is all the same here.
            case CU_LAUNCH_ATTRIBUTE_IGNORE:
            case CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW:
            case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
            case CU_LAUNCH_ATTRIBUTE_PRIORITY: break;
            default: return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return CUDA_SUCCESS;
}

CUresult check_shape(const CUlaunchConfig& config, const Function& function, uint32_t cluster) {
    const auto is_within = [](uint32_t value, uint32_t most) { return value >= 1 && value <= most; };
    if (!is_within(config.gridDimX, kMaxGridX) || !is_within(config.gridDimY, kMaxGridYz) || !is_within(config.gridDimZ, kMaxGridYz)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (config.gridDimZ % cluster != 0) return CUDA_ERROR_INVALID_VALUE;
    if (!is_within(config.blockDimX, kMaxThreads) || !is_within(config.blockDimY, kMaxThreads) ||
        !is_within(config.blockDimZ, kMaxThreadsZ)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const uint64_t threads = uint64_t{config.blockDimX} * config.blockDimY * config.blockDimZ;
    if (threads > kMaxThreads || threads > function.kernel->max_threads) return CUDA_ERROR_INVALID_VALUE;
    return config.sharedMemBytes > function.max_dynamic_shared ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult launch(Context& context, CUfunction handle, const CUlaunchConfig& config, void** params, void** extra) {
    const Function* function = context.functions.find(handle);
    if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    // The other way to pass arguments, packed in one buffer; no caller here does.
    if (extra != nullptr) return params != nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_NOT_SUPPORTED;
    const Kernel* kernel = function->kernel;
    if (kernel->param_bytes != 0 && (params == nullptr || params[0] == nullptr)) return CUDA_ERROR_INVALID_VALUE;
    uint32_t cluster = 1;
    bool overlaps = false;
    if (const CUresult code = read_attributes(config, *function, cluster, overlaps); code != CUDA_SUCCESS) return code;
    if (const CUresult code = check_shape(config, *function, cluster); code != CUDA_SUCCESS) return code;
    const GridShape shape{{config.gridDimX, config.gridDimY, config.gridDimZ},
                          {config.blockDimX, config.blockDimY, config.blockDimZ},
                          cluster,
                          config.sharedMemBytes};
    std::vector<ParamBlock> copied((kernel->param_bytes + sizeof(ParamBlock) - 1) / sizeof(ParamBlock));
    if (!copied.empty()) std::memcpy(copied.data(), params[0], kernel->param_bytes);
    auto run = [kernel, shape, copied = std::move(copied)](const Context&, const Before& before) -> std::string {
        const std::string wrong = run_grid(*kernel, shape, copied.data(), before);
        return wrong.empty() ? wrong : std::string(kernel->symbol) + ": " + wrong;
    };
    return enqueue(context, config.hStream, {std::move(run), true, overlaps});
}

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared_bytes, CUstream stream, void** params, void** extra) {
    return in_context([&](Context& context) {
        const CUlaunchConfig config{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, stream, nullptr, 0};
        return launch(context, function, config, params, extra);
    });
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
    return in_context([&](Context& context) {
        return config == nullptr ? CUDA_ERROR_INVALID_VALUE : launch(context, function, *config, params, extra);
    });
}
