// Where a token lives: token position -> page -> element offsets of a plane. All offsets are 64 bits wide.
#pragma once
#include "../common/error.cuh"
#include "../params/paged_cache.h"

namespace kv8 {

// Page indices of one request, by page number.
__device__ __forceinline__ const int32_t* page_row(const PagedCache& cache, uint32_t request_idx) {
    const int32_t* table = reinterpret_cast<const int32_t*>(cache.page_table);
    const uint64_t* starts = reinterpret_cast<const uint64_t*>(cache.page_row_starts);
    return table + (starts != nullptr ? starts[request_idx] : request_idx * cache.page_row_stride);
}

// page_len is a power of two.
__device__ __forceinline__ uint32_t page_shift(const PagedCache& cache) { return 31 - __clz(cache.page_len); }

// Element offset of (page, slot, head, 0).
__device__ __forceinline__ uint64_t plane_offset(const Plane& plane, uint32_t page, uint32_t slot, uint32_t head) {
    return page * plane.page_stride + slot * plane.slot_stride + head * plane.head_stride;
}

// Groups of a row; a group may span the whole head.
__device__ __forceinline__ uint32_t num_groups(uint32_t head_dim, uint32_t group_len) { return head_dim / group_len; }

// channel >> shift is the group of a channel. A group that is no power of two spans the whole head: group 0.
__device__ __forceinline__ uint32_t group_shift(uint32_t head_dim, uint32_t group_len) {
    return group_len >= head_dim ? 31u : 31u - __clz(group_len);
}

}  // namespace kv8
