// Captures of a stream's work, graphs of them, and their replay.
#include "queue.hpp"
#include "state.hpp"

namespace kv8::emulated {
namespace {

constexpr unsigned long long kInstantiateFlags = CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH | CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD |
                                                 CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    return in_context([&](Context& context) {
        if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
        const Target target = find_stream(context, handle);
        if (!target.exists) return CUDA_ERROR_INVALID_HANDLE;
        if (target.stream == nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (target.stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
        target.stream->capture = std::make_unique<Capture>(Capture{mode, std::this_thread::get_id(), false, {}});
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    return in_context([&](Context& context) {
        if (graph == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *graph = nullptr;
        const Target target = find_stream(context, handle);
        if (!target.exists) return CUDA_ERROR_INVALID_HANDLE;
        if (target.stream == nullptr || target.stream->capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
        const bool is_of_others = target.stream->capture->thread != std::this_thread::get_id();
        if (is_of_others && target.stream->capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
        const std::unique_ptr<Capture> capture = std::move(target.stream->capture);
        if (capture->is_invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        *graph = context.graphs.add(std::make_shared<const Operations>(std::move(capture->operations)));
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    return in_context([&](Context& context) {
        if (status == nullptr) return CUDA_ERROR_INVALID_VALUE;
        const Target target = find_stream(context, handle);
        if (!target.exists) return CUDA_ERROR_INVALID_HANDLE;
        *status = CU_STREAM_CAPTURE_STATUS_NONE;
        if (target.stream != nullptr && target.stream->capture != nullptr) {
            *status = target.stream->capture->is_invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph handle, unsigned long long flags) {
    return in_context([&](Context& context) {
        if (exec == nullptr || (flags & ~kInstantiateFlags) != 0) return CUDA_ERROR_INVALID_VALUE;
        const Graph* graph = context.graphs.find(handle);
        if (graph == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        *exec = context.execs.add(graph->operations);
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream) {
    return in_context([&](Context& context) {
        const Graph* exec = context.execs.find(handle);
        if (exec == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        const auto run = [operations = exec->operations](const Context& now, const Before&) -> std::string {
            Line line;
            for (const Operation& operation : *operations) {
                if (std::string wrong = line.add(now, operation); !wrong.empty()) return wrong;
            }
            return line.finish();
        };
        return enqueue(context, stream, {run, false, false});
    });
}

CUresult cuGraphDestroy(CUgraph graph) {
    return in_context([&](Context& context) { return context.graphs.remove(graph) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; });
}

CUresult cuGraphExecDestroy(CUgraphExec exec) {
    return in_context([&](Context& context) { return context.execs.remove(exec) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; });
}
