// The query rows of a CTA. Rows of one (request, kv head) are numbered row = query position * gqa_group + head in the group;
// a CTA takes 8 * row tiles of them, blockIdx.y says which.
#pragma once
#include "../common/mutant.cuh"
#include "../params/decode.h"

namespace kv8 {

struct QueryRows {
    const DecodeParams& p;
    uint32_t kv_head_idx;
    uint32_t rows_per_block;

    __device__ __forceinline__ QueryRows(const DecodeParams& params, uint32_t kv_head, uint32_t num_rows)
        : p(params), kv_head_idx(kv_head), rows_per_block(num_rows) {}

    __device__ __forceinline__ uint32_t first() const { return blockIdx.y * rows_per_block; }
    __device__ __forceinline__ uint32_t total() const { return p.gqa_group * p.q_len; }
    __device__ __forceinline__ uint32_t position(uint32_t row) const { return row / p.gqa_group; }
    __device__ __forceinline__ uint32_t head(uint32_t row) const { return kv_head_idx * p.gqa_group + row % p.gqa_group; }

    // Index of (request, query position, head) in arrays shaped [batch, q_len, num_q_heads].
    __device__ __forceinline__ uint64_t index(const DecodeParams& p, uint32_t request_idx, uint32_t row) const {
        return (static_cast<uint64_t>(request_idx) * p.q_len + position(row)) * p.num_q_heads + head(row);
    }

    __device__ __forceinline__ uint64_t element(const DecodeParams& p, uint32_t request_idx, uint32_t row) const {
        return index(p, request_idx, row) * p.cache.head_dim;
    }

    // Index of (partial, head, query position) in arrays shaped [num_partials, num_q_heads, q_len].
    __device__ __forceinline__ uint64_t partial_index(const DecodeParams& p, uint32_t partial_idx, uint32_t row) const {
        return (static_cast<uint64_t>(partial_idx) * p.num_q_heads + head(row)) * p.q_len + position(row);
    }
};

}  // namespace kv8
