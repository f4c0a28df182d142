// What happens to work that is given to a stream, and to calls that a capture forbids.
#pragma once
#include "state.hpp"

namespace kv8::emulated {

// A stream of a call. The default streams have no object: they cannot capture.
struct Target {
    bool exists;
    bool is_legacy;  // waits for, and is waited for by, the streams without CU_STREAM_NON_BLOCKING
    Stream* stream;  // nullptr: a default stream
    Line* line;
};

Target find_stream(Context& context, CUstream handle);

// Whether work may be given to the stream now: CUDA_SUCCESS, or why not.
CUresult check_queue(Context& context, const Target& target);

// Runs what the stream, and the streams that it waits for, have kept back: CUDA_SUCCESS, or the error that the context is lost by.
CUresult finish(Context& context, const Target& target);
CUresult finish_all(Context& context);

// Runs the work, or appends it to the stream's capture. Of work that fails the text goes to the standard error, and the context is lost.
CUresult enqueue(Context& context, CUstream handle, Operation operation);

// For calls that may wait for other work, such as allocations: CUDA_SUCCESS, or, after making them invalid, that a capture forbids them.
CUresult deny_in_captures(Context& context);

// Makes a capture fail at its end; answers `code`.
CUresult invalidate(Capture& capture, CUresult code);

}  // namespace kv8::emulated
