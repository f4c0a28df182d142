// Reports bad data to the host: the first report fills the record, every report counts.
#pragma once
#include "../params/paged_cache.h"

namespace kv8 {

__device__ __noinline__ void report_error(uint64_t record_address, uint32_t kind, uint32_t request_idx, uint32_t head_idx,
                                          uint32_t channel, int64_t value, uint32_t plane) {
    ErrorRecord* record = reinterpret_cast<ErrorRecord*>(record_address);
    if (record == nullptr) return;
    atomicAdd(&record->count, 1u);
    if (atomicCAS(&record->kind, kErrorNone, kind) == kErrorNone) {
        record->request_idx = request_idx;
        record->head_idx = head_idx;
        record->channel = channel;
        record->value = value;
        record->plane = plane;
    }
}

}  // namespace kv8
