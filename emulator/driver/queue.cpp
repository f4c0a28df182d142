// Gives work to streams: it runs at once, or is recorded by the capture under way.
#include "queue.hpp"

#include <cstdio>

namespace kv8::emulated {

namespace {

// Of work that fails the text goes to the standard error, and the context is lost.
void note(Context& context, const std::string& wrong) {
    if (wrong.empty()) return;
    std::fprintf(stderr, "kv8 emulated GPU: %s\n", wrong.c_str());
    context.lost = CUDA_ERROR_LAUNCH_FAILED;
}

void finish(Context& context, Line& line) {
    if (context.lost == CUDA_SUCCESS) note(context, line.finish());
}

// What the work of a stream comes after: of the legacy stream that of all blocking streams, of those that of the legacy stream.
void finish_others(Context& context, const Target& target) {
    if (target.is_legacy) {
        finish(context, context.per_thread_line);
        context.streams.for_each([&](Stream& stream) {
            if ((stream.flags & CU_STREAM_NON_BLOCKING) == 0) finish(context, stream.line);
        });
    } else if (target.stream == nullptr || (target.stream->flags & CU_STREAM_NON_BLOCKING) == 0) {
        finish(context, context.legacy_line);
    }
}

}  // namespace

Target find_stream(Context& context, CUstream handle) {
    if (handle == nullptr || handle == CU_STREAM_LEGACY) return {true, true, nullptr, &context.legacy_line};
    if (handle == CU_STREAM_PER_THREAD) return {true, false, nullptr, &context.per_thread_line};
    Stream* stream = context.streams.find(handle);
    return {stream != nullptr, false, stream, stream == nullptr ? nullptr : &stream->line};
}

CUresult finish(Context& context, const Target& target) {
    finish_others(context, target);
    finish(context, *target.line);
    return context.lost;
}

CUresult finish_all(Context& context) {
    finish(context, context.legacy_line);
    finish(context, context.per_thread_line);
    context.streams.for_each([&](Stream& stream) { finish(context, stream.line); });
    return context.lost;
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

CUresult enqueue(Context& context, CUstream handle, Operation operation) {
    const Target target = find_stream(context, handle);
    if (const CUresult code = check_queue(context, target); code != CUDA_SUCCESS) return code;
    if (target.stream != nullptr && target.stream->capture != nullptr) {
        target.stream->capture->operations.push_back(std::move(operation));
        return CUDA_SUCCESS;
    }
    finish_others(context, target);
    if (context.lost != CUDA_SUCCESS) return context.lost;
    note(context, target.line->add(context, operation));
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
