// Warp-wide helpers.
#pragma once
#include <cstdint>

namespace kv8 {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr int kWarpLanes = 32;

// Maximum over the aligned run of `width` lanes (a power of two) that holds this lane.
__device__ __forceinline__ float segment_max(float x, uint32_t width) {
    for (uint32_t step = 1; step < width; step *= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    return x;
}

// Maximum and sum over the eight lanes that share lane % 4: the rows of an mma accumulator.
__device__ __forceinline__ float column_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 4));
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 8));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 16));
}

__device__ __forceinline__ float column_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 4);
    x += __shfl_xor_sync(kFullWarp, x, 8);
    return x + __shfl_xor_sync(kFullWarp, x, 16);
}

__device__ __forceinline__ uint64_t shuffle_u64(uint64_t x, uint32_t src_lane) {
    const uint32_t low = __shfl_sync(kFullWarp, static_cast<uint32_t>(x), src_lane);
    const uint32_t high = __shfl_sync(kFullWarp, static_cast<uint32_t>(x >> 32), src_lane);
    return static_cast<uint64_t>(high) << 32 | low;
}

// 2^exponent for -126 <= exponent <= 127, exact.
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

__device__ __forceinline__ int clamp_int(int x, int low, int high) { return min(max(x, low), high); }

// floor(log2(x)) for x > 0, subnormals included.
__device__ __forceinline__ int floor_log2(float x) {
    const int biased = __float_as_int(x) >> 23 & 0xff;
    return biased != 0 ? biased - 127 : 31 - __clz(__float_as_int(x) & 0x7fffff) - 149;
}

}  // namespace kv8
