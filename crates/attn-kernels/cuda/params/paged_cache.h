// The paged INT8 cache as every kernel sees it. Twin: crates/attn-kernels/src/abi/paged_cache.rs.
#pragma once
#include <cstdint>

namespace kv8 {

enum ScaleType : uint32_t { kScaleF16 = 0, kScaleBf16 = 1, kScaleF32 = 2 };
enum FloatType : uint32_t { kFloatF16 = 0, kFloatBf16 = 1, kFloatF32 = 2 };

// One strided plane. Strides count elements of the plane: one byte for codes, the scale type for scales.
// Element (page, slot, head, c) = base + page * page_stride + slot * slot_stride + head * head_stride + c.
struct Plane {
    uint64_t base;         // device address of element (0, 0, 0, 0)
    uint64_t page_stride;
    uint64_t slot_stride;
    uint64_t head_stride;
};
static_assert(sizeof(Plane) == 32);

struct PagedCache {
    Plane k_codes;         // i8    [num_pages, page_len, num_kv_heads, head_dim] through its strides
    Plane v_codes;         // i8    the same shape
    Plane k_scales;        // scale [num_pages, page_len, num_kv_heads, head_dim / k_group_len]
    Plane v_scales;        // scale [num_pages, page_len, num_kv_heads, head_dim / v_group_len]
    uint64_t page_table;   // i32   page indices; request r's row starts at page_row_starts[r], else r * page_row_stride
    uint64_t page_row_starts;  // u64 [batch], may be 0: then page_row_stride holds
    uint64_t page_row_stride;  // elements
    uint32_t num_pages;
    uint32_t page_len;
    uint32_t num_kv_heads;
    uint32_t head_dim;
    uint32_t k_group_len;
    uint32_t v_group_len;
    uint32_t scale_type;   // ScaleType
    uint32_t record_bytes; // > 0: a page (of 16 slots or more) holds, for K and for V of a head, one record after the other:
                           // codes, scales from byte head_dim on, padding to this many bytes (a multiple of 16). 0: not so
};
static_assert(sizeof(PagedCache) == 4 * 32 + 3 * 8 + 8 * 4);

// Written by kernels on bad data, read by the host at its next synchronisation. First error wins (compare-and-swap on `kind`).
struct ErrorRecord {
    uint32_t kind;         // ErrorKind; 0 = none
    uint32_t request_idx;  // or token of an append
    uint32_t head_idx;     // kv head, where it applies
    uint32_t channel;      // channel, where it applies
    int64_t value;         // the offending index, where it applies
    uint32_t plane;        // 0 = K, 1 = V
    uint32_t count;        // how many were seen in all (atomic)
};
static_assert(sizeof(ErrorRecord) == 32);
enum ErrorKind : uint32_t {
    kErrorNone = 0,
    kErrorPageOutOfRange = 1,   // request_idx, channel = position of the token, value = page index
    kErrorSlotOutOfRange = 2,   // append: request_idx = token, value = slot
    kErrorNonFinite = 3,        // append: token, head, channel, plane
    kErrorScaleOverflow = 4,    // append: token, head, channel = first of the group, plane
};

}  // namespace kv8
