// Parameters of the append and dequantize kernels. Twin: crates/attn-kernels/src/abi/append.rs.
#pragma once
#include "paged_cache.h"

namespace kv8 {

struct AppendParams {
    PagedCache cache;           // page_table is not read
    uint64_t k;                 // [num_tokens, num_kv_heads, head_dim] of input_type
    uint64_t v;                 // the same shape
    uint64_t slot_mapping;      // i64 [num_tokens], -1 = skip
    uint64_t error;             // ErrorRecord
    uint64_t k_token_stride;    // elements between tokens of k
    uint64_t v_token_stride;
    uint32_t num_tokens;
    uint32_t input_type;        // FloatType
};
static_assert(sizeof(AppendParams) == sizeof(PagedCache) + 6 * 8 + 2 * 4);

// Gathers tokens token_start .. token_end of one request into dense k and v.
struct DequantizeParams {
    PagedCache cache;
    uint64_t k;                 // [token_end - token_start, num_kv_heads, head_dim] of out_type
    uint64_t v;
    uint64_t error;             // ErrorRecord
    uint32_t request_idx;
    uint32_t token_start;       // inclusive
    uint32_t token_end;         // exclusive
    uint32_t out_type;          // FloatType
};
static_assert(sizeof(DequantizeParams) == sizeof(PagedCache) + 3 * 8 + 4 * 4);

}  // namespace kv8
