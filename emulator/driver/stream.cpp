// Streams and events.
#include "queue.hpp"
#include "state.hpp"

namespace kv8::emulated {
namespace {

constexpr unsigned kEventFlags = CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;

CUresult wait_for(Context& context, const Target& target) {
    if (!target.exists) return CUDA_ERROR_INVALID_HANDLE;
    if (target.stream == nullptr || target.stream->capture == nullptr) return finish(context, target);
    // A capture runs nothing, so it has no end to wait for.
    return invalidate(*target.stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

// What is before a recorded event has run when it is recorded.
CUresult wait_for(const Event* event) {
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    return event->is_captured ? CUDA_ERROR_CAPTURED_EVENT : CUDA_SUCCESS;
}

}  // namespace
}  // namespace kv8::emulated

using namespace kv8::emulated;

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    return in_context([&](Context& context) {
        if (stream == nullptr || (flags & ~unsigned{CU_STREAM_NON_BLOCKING}) != 0) return CUDA_ERROR_INVALID_VALUE;
        *stream = context.streams.add(flags, nullptr, Line{});
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    return in_context([&](Context& context) {
        if (context.streams.find(stream) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        // What it has to do is still done.
        const CUresult code = finish(context, find_stream(context, stream));
        context.streams.remove(stream);
        return code;
    });
}

CUresult cuStreamSynchronize(CUstream stream) {
    return in_context([&](Context& context) { return wait_for(context, find_stream(context, stream)); });
}

CUresult cuStreamQuery(CUstream stream) { return cuStreamSynchronize(stream); }

CUresult cuStreamGetFlags(CUstream stream, unsigned* flags) {
    return in_context([&](Context& context) {
        const Target target = find_stream(context, stream);
        if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
        if (!target.exists) return CUDA_ERROR_INVALID_HANDLE;
        *flags = target.stream != nullptr ? target.stream->flags : unsigned{CU_STREAM_DEFAULT};
        return CUDA_SUCCESS;
    });
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
    return in_context([&](Context& context) {
        const bool is_timed = (flags & CU_EVENT_DISABLE_TIMING) == 0;
        const bool is_shared = (flags & CU_EVENT_INTERPROCESS) != 0;
        if (event == nullptr || (flags & ~kEventFlags) != 0 || (is_shared && is_timed)) return CUDA_ERROR_INVALID_VALUE;
        *event = context.events.add(flags, false, false, std::chrono::steady_clock::time_point{});
        return CUDA_SUCCESS;
    });
}

CUresult cuEventDestroy_v2(CUevent event) {
    return in_context([&](Context& context) { return context.events.remove(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; });
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
    return in_context([&](Context& context) {
        Event* event = context.events.find(handle);
        if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        const Target target = find_stream(context, stream);
        if (const CUresult code = check_queue(context, target); code != CUDA_SUCCESS) return code;
        if (const CUresult code = finish(context, target); code != CUDA_SUCCESS) return code;
        event->was_recorded = true;
        // In a capture it marks a place for other streams to wait for, and is no part of the graph.
        event->is_captured = target.stream != nullptr && target.stream->capture != nullptr;
        event->at = std::chrono::steady_clock::now();
        return CUDA_SUCCESS;
    });
}

CUresult cuEventSynchronize(CUevent event) {
    return in_context([&](Context& context) { return wait_for(context.events.find(event)); });
}

CUresult cuEventQuery(CUevent event) { return cuEventSynchronize(event); }

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    return in_context([&](Context& context) {
        if (milliseconds == nullptr) return CUDA_ERROR_INVALID_VALUE;
        const Event* events[] = {context.events.find(start), context.events.find(end)};
        for (const Event* event : events) {
            if (const CUresult code = wait_for(event); code != CUDA_SUCCESS) return code;
            if (!event->was_recorded || (event->flags & CU_EVENT_DISABLE_TIMING) != 0) return CUDA_ERROR_INVALID_HANDLE;
        }
        *milliseconds = std::chrono::duration<float, std::milli>(events[1]->at - events[0]->at).count();
        return CUDA_SUCCESS;
    });
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}
