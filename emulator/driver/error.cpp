// Names and texts of the driver's results, as NVIDIA's driver gives them.
#include "api.hpp"

namespace kv8::emulated {
namespace {

struct Error {
    CUresult code;
    const char* name;
    const char* text;
};

#define KV8_ERROR(code, text) {code, #code, text}
constexpr Error kErrors[] = {
    KV8_ERROR(CUDA_SUCCESS, "no error"),
    KV8_ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    KV8_ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    KV8_ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    KV8_ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    KV8_ERROR(CUDA_ERROR_PROFILER_DISABLED, "profiler disabled while using external profiling tool"),
    KV8_ERROR(CUDA_ERROR_PROFILER_NOT_INITIALIZED, "profiler not initialized: call cudaProfilerInitialize()"),
    KV8_ERROR(CUDA_ERROR_PROFILER_ALREADY_STARTED, "profiler already started"),
    KV8_ERROR(CUDA_ERROR_PROFILER_ALREADY_STOPPED, "profiler already stopped"),
    KV8_ERROR(CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library"),
    KV8_ERROR(CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER, "call requires newer driver"),
    KV8_ERROR(CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable"),
    KV8_ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    KV8_ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    KV8_ERROR(CUDA_ERROR_DEVICE_NOT_LICENSED, "device doesn't have valid Grid license"),
    KV8_ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    KV8_ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    KV8_ERROR(CUDA_ERROR_CONTEXT_ALREADY_CURRENT, "context already current"),
    KV8_ERROR(CUDA_ERROR_MAP_FAILED, "mapping of buffer object failed"),
    KV8_ERROR(CUDA_ERROR_UNMAP_FAILED, "unmapping of buffer object failed"),
    KV8_ERROR(CUDA_ERROR_ARRAY_IS_MAPPED, "array is mapped"),
    KV8_ERROR(CUDA_ERROR_ALREADY_MAPPED, "resource already mapped"),
    KV8_ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    KV8_ERROR(CUDA_ERROR_ALREADY_ACQUIRED, "resource already acquired"),
    KV8_ERROR(CUDA_ERROR_NOT_MAPPED, "resource not mapped"),
    KV8_ERROR(CUDA_ERROR_NOT_MAPPED_AS_ARRAY, "resource not mapped as array"),
    KV8_ERROR(CUDA_ERROR_NOT_MAPPED_AS_POINTER, "resource not mapped as pointer"),
    KV8_ERROR(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
    KV8_ERROR(CUDA_ERROR_UNSUPPORTED_LIMIT, "limit is not supported on this architecture"),
    KV8_ERROR(CUDA_ERROR_CONTEXT_ALREADY_IN_USE, "exclusive-thread device already in use by a different thread"),
    KV8_ERROR(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"),
    KV8_ERROR(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    KV8_ERROR(CUDA_ERROR_INVALID_GRAPHICS_CONTEXT, "invalid OpenGL or DirectX context"),
    KV8_ERROR(CUDA_ERROR_NVLINK_UNCORRECTABLE, "uncorrectable NVLink error detected during the execution"),
    KV8_ERROR(CUDA_ERROR_JIT_COMPILER_NOT_FOUND, "PTX JIT compiler library not found"),
    KV8_ERROR(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain."),
    KV8_ERROR(CUDA_ERROR_JIT_COMPILATION_DISABLED, "PTX JIT compilation was disabled"),
    KV8_ERROR(CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY, "the provided execution affinity is not supported"),
    KV8_ERROR(CUDA_ERROR_UNSUPPORTED_DEVSIDE_SYNC, "the provided PTX contains unsupported call to cudaDeviceSynchronize"),
    KV8_ERROR(CUDA_ERROR_CONTAINED, "Invalid access of peer GPU memory over nvlink or a hardware error"),
    KV8_ERROR(CUDA_ERROR_INVALID_SOURCE, "device kernel image is invalid"),
    KV8_ERROR(CUDA_ERROR_FILE_NOT_FOUND, "file not found"),
    KV8_ERROR(CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND, "shared object symbol not found"),
    KV8_ERROR(CUDA_ERROR_SHARED_OBJECT_INIT_FAILED, "shared object initialization failed"),
    KV8_ERROR(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS"),
    KV8_ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    KV8_ERROR(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    KV8_ERROR(CUDA_ERROR_LOSSY_QUERY, "attempted introspection would be semantically lossy"),
    KV8_ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    KV8_ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    KV8_ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    KV8_ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    KV8_ERROR(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    KV8_ERROR(CUDA_ERROR_LAUNCH_INCOMPATIBLE_TEXTURING, "launch uses incompatible texturing mode"),
    KV8_ERROR(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled"),
    KV8_ERROR(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled"),
    KV8_ERROR(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE, "cannot set while device is active in this process"),
    KV8_ERROR(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    KV8_ERROR(CUDA_ERROR_ASSERT, "device-side assert triggered"),
    KV8_ERROR(CUDA_ERROR_TOO_MANY_PEERS, "peer mapping resources exhausted"),
    KV8_ERROR(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    KV8_ERROR(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    KV8_ERROR(CUDA_ERROR_HARDWARE_STACK_ERROR, "hardware stack error"),
    KV8_ERROR(CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    KV8_ERROR(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    KV8_ERROR(CUDA_ERROR_INVALID_ADDRESS_SPACE, "operation not supported on global/shared address space"),
    KV8_ERROR(CUDA_ERROR_INVALID_PC, "invalid program counter"),
    KV8_ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    KV8_ERROR(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "too many blocks in cooperative launch"),
    KV8_ERROR(CUDA_ERROR_TENSOR_MEMORY_LEAK, "tensor memory not completely freed"),
    KV8_ERROR(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    KV8_ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    KV8_ERROR(CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized"),
    KV8_ERROR(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "system has unsupported display driver / cuda driver combination"),
    KV8_ERROR(CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, "forward compatibility was attempted on non supported HW"),
    KV8_ERROR(CUDA_ERROR_MPS_CONNECTION_FAILED, "MPS client failed to connect to the MPS control daemon or the MPS server"),
    KV8_ERROR(CUDA_ERROR_MPS_RPC_FAILURE, "the remote procedural call between the MPS server and the MPS client failed"),
    KV8_ERROR(CUDA_ERROR_MPS_SERVER_NOT_READY, "MPS server is not ready to accept new MPS client requests"),
    KV8_ERROR(CUDA_ERROR_MPS_MAX_CLIENTS_REACHED, "the hardware resources required to create MPS client have been exhausted"),
    KV8_ERROR(CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED, "the hardware resources required to support device connections have been exhausted"),
    KV8_ERROR(CUDA_ERROR_MPS_CLIENT_TERMINATED, "the MPS client has been terminated by the server"),
    KV8_ERROR(CUDA_ERROR_CDP_NOT_SUPPORTED,
              "is using CUDA Dynamic Parallelism, but the current configuration, like MPS, does not support it"),
    KV8_ERROR(CUDA_ERROR_CDP_VERSION_MISMATCH, "unsupported interaction between different versions of CUDA Dynamic Parallelism"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing blocking stream"),
    KV8_ERROR(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    KV8_ERROR(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture sequence from another thread"),
    KV8_ERROR(CUDA_ERROR_TIMEOUT, "wait operation timed out"),
    KV8_ERROR(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE,
              "the graph update was not performed because it included changes which violated constraints"),
    KV8_ERROR(CUDA_ERROR_EXTERNAL_DEVICE, "an async error has occured in external entity outside of CUDA"),
    KV8_ERROR(CUDA_ERROR_INVALID_CLUSTER_SIZE, "a kernel launch error has occurred due to cluster misconfiguration"),
    KV8_ERROR(CUDA_ERROR_FUNCTION_NOT_LOADED, "the function handle is not loaded when calling an API that requires a loaded function"),
    KV8_ERROR(CUDA_ERROR_INVALID_RESOURCE_TYPE, "one or more resources passed in are not valid resource types for the operation"),
    KV8_ERROR(CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, "one or more resources are insufficient or non-applicable for the operation"),
    KV8_ERROR(CUDA_ERROR_KEY_ROTATION, "key rotation failure"),
    KV8_ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};
#undef KV8_ERROR

CUresult answer(CUresult code, const char** to, const char* Error::*which) {
    if (to == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *to = nullptr;
    for (const Error& error : kErrors) {
        if (error.code == code) *to = error.*which;
    }
    return *to == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

}  // namespace
}  // namespace kv8::emulated

// Both serve before cuInit too: callers print why it failed.

CUresult cuGetErrorName(CUresult code, const char** name) { return kv8::emulated::answer(code, name, &kv8::emulated::Error::name); }

CUresult cuGetErrorString(CUresult code, const char** text) { return kv8::emulated::answer(code, text, &kv8::emulated::Error::text); }
