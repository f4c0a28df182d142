// What of the cache may be read while the kernel before this one still runs.
#pragma once
#include "../params/decode.h"
#include "traits.cuh"

namespace kv8 {

// Tokens of a request, from its first, that were complete before the kernel before this one began.
__device__ __forceinline__ uint32_t complete_tokens(const DecodeParams& p, uint32_t kv_len) {
    return p.ready == kReadyHistory && kv_len > p.q_len ? kv_len - p.q_len : 0;
}

// How many of the tiles that a warp's ring takes first end at or before `history`.
template <class T>
__device__ __forceinline__ uint32_t tiles_before(uint32_t first_token, uint32_t tile_stride, uint32_t num_tiles, uint32_t history) {
    uint32_t count = 0;
#pragma unroll
    for (uint32_t i = 0; i < T::kNumStages; ++i) {
        count += i < num_tiles && first_token + i * tile_stride + kTileTokens <= history ? 1 : 0;
    }
    return count;
}

}  // namespace kv8
