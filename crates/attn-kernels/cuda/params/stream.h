// Parameters of the plain streaming kernels that measure a device's bandwidth. Twin: crates/attn-kernels/src/abi/stream.rs.
#pragma once
#include <cstdint>

namespace kv8 {

struct StreamParams {
    uint64_t src;        // num_vectors * 16 bytes, aligned to 16
    uint64_t dst;        // copy: the same size; read: u32 [1], never written
    uint64_t num_vectors;  // of 16 bytes
};
static_assert(sizeof(StreamParams) == 24);

}  // namespace kv8
