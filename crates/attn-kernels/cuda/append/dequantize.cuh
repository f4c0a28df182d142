// Dequantize: gathers tokens of one request into dense k and v, code * scale rounded to the output type.
//
// Grid: x covers (token, kv head) pairs, 256 / dequantize_lanes(head_dim) a block of 256 threads. A token on a page out of range becomes zeros and is reported.
#pragma once
#include "../quant/dequant.cuh"
#include "append.cuh"

namespace kv8 {

// Lanes that hold a row, 8 channels each: head_dim / 8 rounded up to a power of two.
__device__ __forceinline__ uint32_t dequantize_lanes(uint32_t head_dim) {
    const uint32_t lanes = head_dim / kEight;
    return lanes <= 8 ? 8u : (lanes <= 16 ? 16u : 32u);
}

__device__ __forceinline__ void dequantize_row(const PagedCache& cache, const Plane& codes, const Plane& scales,
                                               uint32_t group_len, uint64_t dst, uint64_t element, uint32_t out_type,
                                               uint32_t page, uint32_t slot, uint32_t head, uint32_t channel, bool readable) {
    float x[8] = {};
    if (readable) {
        const uint8_t* row = reinterpret_cast<const uint8_t*>(codes.base) + plane_offset(codes, page, slot, head);
        const uint2 words = *reinterpret_cast<const uint2*>(row + channel);
        const uint64_t scale_at = plane_offset(scales, page, slot, head) + (channel >> group_shift(cache.head_dim, group_len));
        const float scale = load_float(reinterpret_cast<const void*>(scales.base), scale_at, cache.scale_type);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = code_at(i < 4 ? words.x : words.y, i % 4) * scale;
    }
    const float low[4] = {x[0], x[1], x[2], x[3]};
    const float high[4] = {x[4], x[5], x[6], x[7]};
    store_float4(reinterpret_cast<void*>(dst), element, out_type, low);
    store_float4(reinterpret_cast<void*>(dst), element + 4, out_type, high);
}

__device__ __forceinline__ void dequantize(const DequantizeParams& p) {
    const uint32_t lanes = dequantize_lanes(p.cache.head_dim);
    const uint64_t pair = static_cast<uint64_t>(blockIdx.x) * (kAppendThreads / lanes) + threadIdx.x / lanes;
    const uint32_t channel = threadIdx.x % lanes * kEight;
    const uint32_t num_tokens = p.token_end - p.token_start;
    if (pair >= static_cast<uint64_t>(num_tokens) * p.cache.num_kv_heads || channel >= p.cache.head_dim) return;
    const uint32_t token = static_cast<uint32_t>(pair / p.cache.num_kv_heads);
    const uint32_t head = static_cast<uint32_t>(pair % p.cache.num_kv_heads);
    const uint32_t position = p.token_start + token;
    const uint32_t shift = page_shift(p.cache);
    const int32_t page = page_row(p.cache, p.request_idx)[position >> shift];
    const uint32_t slot = position & ((1u << shift) - 1);
    const bool readable = static_cast<uint32_t>(page) < p.cache.num_pages;
    if (!readable && channel == 0) report_error(p.error, kErrorPageOutOfRange, p.request_idx, head, position, page, 0);
    const uint64_t element = pair * p.cache.head_dim + channel;
    dequantize_row(p.cache, p.cache.k_codes, p.cache.k_scales, p.cache.k_group_len, p.k, element, p.out_type, page, slot, head,
                   channel, readable);
    dequantize_row(p.cache, p.cache.v_codes, p.cache.v_scales, p.cache.v_group_len, p.v, element, p.out_type, page, slot, head,
                   channel, readable);
}

}  // namespace kv8
