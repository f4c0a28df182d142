// Parameters of decode stage 1 and stage 2. Twin: crates/attn-kernels/src/abi/decode.rs.
#pragma once
#include "paged_cache.h"
#include "work_item.h"

namespace kv8 {

// What was complete before the kernel before this one began: it may be read before that kernel has ended.
enum Ready : uint32_t {
    kReadyNothing = 0,
    kReadyTables = 1,   // plan, lengths and page table
    kReadyHistory = 2,  // these, and all cached tokens but the last q_len of each request
};

struct DecodeParams {
    PagedCache cache;
    uint64_t q;                 // [batch, q_len, num_q_heads, head_dim] of q_type
    uint64_t out;               // [batch, q_len, num_q_heads, head_dim] of out_type
    uint64_t lse;               // f32 [batch, q_len, num_q_heads], natural log; may be 0
    uint64_t kv_lens;           // u32 [batch], counts the q_len new tokens
    uint64_t items;             // WorkItem, of all workers
    uint64_t worker_starts;     // u32 [workers + 1]
    uint64_t request_partials;  // u32 [batch + 1]
    uint64_t partial_o;         // f32 [num_partials, num_q_heads, q_len, head_dim]
    uint64_t partial_ml;        // f32 [num_partials, num_q_heads, q_len, 2] = (m in base 2, l)
    uint64_t alibi_slopes;      // f32 [num_q_heads]; may be 0
    uint64_t sinks;             // f32 [num_q_heads]; may be 0
    uint64_t error;             // ErrorRecord
    uint32_t batch;
    uint32_t q_len;
    uint32_t num_q_heads;
    uint32_t gqa_group;         // query heads a kv head
    uint32_t q_type;            // FloatType
    uint32_t out_type;          // FloatType
    uint32_t window;            // 0 = none, else tokens visible including the query's own
    float softmax_scale;
    float soft_cap;             // 0 = none
    uint32_t partial_capacity;  // partials that partial_o and partial_ml hold
    uint32_t ready;             // Ready
    uint32_t num_shares;        // 0: by the plan. Else CTAs of a cluster, which take one request and need no plan
    uint32_t fills_device;      // 1: all that the device holds of stage 1 at once is needed
    uint32_t reserved;          // 0
};
static_assert(sizeof(DecodeParams) == sizeof(PagedCache) + 12 * 8 + 14 * 4);

}  // namespace kv8
