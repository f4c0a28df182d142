// The plan as the kernels read it. Twin: attn_plan::WorkItem (repr(C)).
#pragma once
#include <cstdint>

namespace kv8 {

constexpr uint32_t kNoPartial = 0xffffffffu;

struct WorkItem {
    uint32_t request_idx;
    uint32_t token_start;  // inclusive
    uint32_t token_end;    // exclusive
    uint32_t partial_idx;  // kNoPartial: the item covers the request and writes out directly
};
static_assert(sizeof(WorkItem) == 16);

}  // namespace kv8
