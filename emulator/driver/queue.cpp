// Gives work to streams: it runs at once, or is recorded by the capture under way.
#include "queue.hpp"

#include <cstdio>

namespace kv8::emulated {

Target find_stream(const Context& context, CUstream handle) {
    if (handle == nullptr || handle == CU_STREAM_LEGACY) return {true, true, nullptr};
    if (handle == CU_STREAM_PER_THREAD) return {true, false, nullptr};
    Stream* stream = context.streams.find(handle);
    return {stream != nullptr, false, stream};
}

CUresult invalidate(Capture& capture, CUresult code) {
    capture.is_invalid = true;
    capture.operations.clear();
    return code;
}

CUresult check_queue(Context& context, const Target& target) {
    if (!target.exists) return CUDA_ERROR_INVALID_HANDLE;
    if (target.stream != nullptr && target.stream->capture != nullptr) {
        return target.stream->capture->is_invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    }
    CUresult code = CUDA_SUCCESS;
    if (target.is_legacy) {
        // The legacy stream would have to wait for what a capture does not run.
        context.streams.for_each([&](Stream& stream) {
            if (stream.capture == nullptr || (stream.flags & CU_STREAM_NON_BLOCKING) != 0) return;
            code = invalidate(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        });
    }
    return code;
}

std::string Line::take(const Context& context, const Operation& operation) {
    if (kept_.has_value() && operation.overlaps) {
        const Operation before = std::move(*kept_);
        kept_.reset();
        return operation.run(context, [&] { return before.run(context, {}); });
    }
    if (std::string wrong = finish(context); !wrong.empty()) return wrong;
    if (operation.is_kernel && toss()) {
        kept_ = operation;
        return {};
    }
    return operation.run(context, {});
}

std::string Line::finish(const Context& context) {
    if (!kept_.has_value()) return {};
    const Operation operation = std::move(*kept_);
    kept_.reset();
    return operation.run(context, {});
}

void judge(Context& context, const std::string& wrong) {
    if (wrong.empty()) return;
    std::fprintf(stderr, "kv8 emulated GPU: %s\n", wrong.c_str());
    context.lost = CUDA_ERROR_LAUNCH_FAILED;
}

CUresult enqueue(Context& context, CUstream handle, Operation operation) {
    const Target target = find_stream(context, handle);
    if (const CUresult code = check_queue(context, target); code != CUDA_SUCCESS) return code;
    if (target.stream != nullptr && target.stream->capture != nullptr) {
        target.stream->capture->operations.push_back(std::move(operation));
        return CUDA_SUCCESS;
    }
    // Kernels of one stream alone overlap.
    if (context.line_stream != handle) judge(context, context.line.finish(context));
    context.line_stream = handle;
    if (context.lost == CUDA_SUCCESS) judge(context, context.line.take(context, operation));
    // The call has only queued the work: its failure is told to the calls after it.
    return CUDA_SUCCESS;
}

CUresult deny_in_captures(Context& context) {
    CUresult code = CUDA_SUCCESS;
    const auto thread = std::this_thread::get_id();
    context.streams.for_each([&](Stream& stream) {
        if (stream.capture == nullptr) return;
        Capture& capture = *stream.capture;
        const bool is_own = capture.thread == thread && capture.mode != CU_STREAM_CAPTURE_MODE_RELAXED;
        if (!is_own && capture.mode != CU_STREAM_CAPTURE_MODE_GLOBAL) return;
        code = invalidate(capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    });
    return code;
}

}  // namespace kv8::emulated
