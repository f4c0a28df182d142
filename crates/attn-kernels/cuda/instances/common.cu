// The kernels that have one variant: append, dequantize, stage 2, streams.
#include "../append/append.cuh"
#include "../append/dequantize.cuh"
#include "../decode/stage2.cuh"
#include "../decode/stream.cuh"

extern "C" __global__ void __launch_bounds__(kv8::kAppendThreads, 3) kv8_append(const __grid_constant__ kv8::AppendParams p) {
    kv8::append(p);
}

extern "C" __global__ void __launch_bounds__(kv8::kAppendThreads) kv8_dequantize(const __grid_constant__ kv8::DequantizeParams p) {
    kv8::dequantize(p);
}

extern "C" __global__ void __launch_bounds__(kv8::kMaxMergeThreads) kv8_stage2(const __grid_constant__ kv8::DecodeParams p) {
    kv8::merge_partials(p);
}

extern "C" __global__ void __launch_bounds__(kv8::kStreamThreads) kv8_stream_read(const __grid_constant__ kv8::StreamParams p) {
    kv8::stream_read(p);
}

extern "C" __global__ void __launch_bounds__(kv8::kStreamThreads) kv8_stream_copy(const __grid_constant__ kv8::StreamParams p) {
    kv8::stream_copy(p);
}
