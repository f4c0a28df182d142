// Append: quantizes new K and V and scatters codes and scales to their slots.
//
// Grid: x covers (token, kv head) pairs, pairs_per_block(head_dim) a block, 256 threads. A row of head_dim channels is held by
// row_lanes(head_dim) neighbouring lanes, 8 channels each (lanes past the row idle); each does K, then V, of its pair.
// Nothing of a (token, head, plane) is written unless all of it can be.
#pragma once
#include <cfloat>

#include "../cache/paged_cache.cuh"
#include "../common/ptx.cuh"
#include "../common/warp.cuh"
#include "../params/append.h"
#include "../quant/scale.cuh"

namespace kv8 {

constexpr uint32_t kAppendThreads = 256;
constexpr uint32_t kLaneChannels = 8;

// Lanes that hold a row: head_dim / 8 rounded up to a power of two.
__device__ __forceinline__ uint32_t row_lanes(uint32_t head_dim) {
    const uint32_t lanes = head_dim / kLaneChannels;
    return lanes <= 8 ? 8u : (lanes <= 16 ? 16u : 32u);
}

// Eight channels as they lie in memory, on their way. Nothing waits for them before `unpack`.
struct RawChannels {
    uint4 parts[2];  // the second half is for f32

    __device__ __forceinline__ void load(uint64_t base, uint64_t element, uint32_t type) {
        const uint64_t address = base + element * float_bytes(type);
        parts[0] = parts[1] = make_uint4(0, 0, 0, 0);
        if ((address & 15) == 0) {
            parts[0] = ptx::load_streaming(reinterpret_cast<const void*>(address));
            if (type == kFloatF32) parts[1] = ptx::load_streaming(reinterpret_cast<const void*>(address + 16));
            return;
        }
        const uint32_t unit = float_bytes(type);
        uint32_t words[8] = {};
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            if (unit == 4) {
                words[i] = reinterpret_cast<const uint32_t*>(address)[i];
            } else {
                words[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(address)[i]) << (i % 2 * 16);
            }
        }
        parts[0] = make_uint4(words[0], words[1], words[2], words[3]);
        parts[1] = make_uint4(words[4], words[5], words[6], words[7]);
    }

    __device__ __forceinline__ void unpack(uint32_t type, float (&x)[8]) const { unpack_float8(parts[0], parts[1], type, x); }
};

struct RowPlace {
    uint32_t token_idx, head_idx, plane_idx;
    uint32_t page, slot;
    bool writable;  // this row exists and its slot is in range
};

// Quantizes and stores one row of one plane. All lanes of the warp take part.
__device__ __forceinline__ void append_row(const AppendParams& p, const RowPlace& place, const float (&x)[8], uint32_t lane_in_row,
                                           uint32_t lanes) {
    const bool is_v = place.plane_idx != 0;
    const Plane& codes = is_v ? p.cache.v_codes : p.cache.k_codes;
    const Plane& scales = is_v ? p.cache.v_scales : p.cache.k_scales;
    const uint32_t group_len = is_v ? p.cache.v_group_len : p.cache.k_group_len;
    const uint32_t channel = lane_in_row * kLaneChannels;
    const bool inside = channel < p.cache.head_dim;

    // Magnitudes are ordered like their bits, infinity and NaN above all others.
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = max(top, __float_as_uint(x[i]) & 0x7fffffffu);
    const bool non_finite = top >= 0x7f800000u;
    // A group of no power of two is the whole head: the maximum over all lanes of the row, idle ones holding 0.
    const uint32_t group_lanes = group_len >= p.cache.head_dim ? lanes : group_len / kLaneChannels;
    for (uint32_t step = 1; step < group_lanes; step *= 2) top = max(top, __shfl_xor_sync(kFullWarp, top, step));
    const float amax = __uint_as_float(top);
    const bool finite = top < 0x7f800000u;
    const uint32_t bits = finite ? round_up_scale(amax, p.cache.scale_type) : 0u;
    const float scale = scale_bits_to_f32(bits, p.cache.scale_type);
    const bool overflow = finite && !(scale <= FLT_MAX);

    const uint32_t row_first = (threadIdx.x % 32) / lanes * lanes;
    const uint32_t row_mask = lanes == 32 ? kFullWarp : ((1u << lanes) - 1) << row_first;
    const uint32_t bad = __ballot_sync(kFullWarp, place.writable && inside && (non_finite || overflow)) & row_mask;
    if (bad != 0 && !mutant(22)) {
        if (threadIdx.x % 32 == __ffs(bad) - 1) {
            const uint32_t kind = non_finite ? kErrorNonFinite : kErrorScaleOverflow;
            uint32_t at = channel / group_len * group_len;
#pragma unroll
            for (int i = 7; i >= 0; --i) {
                if (!(fabsf(x[i]) <= FLT_MAX)) at = channel + i;
            }
            report_error(p.error, kind, place.token_idx, place.head_idx, at, 0, place.plane_idx);
        }
        return;
    }
    if (!place.writable || !inside) return;

    const uint2 words = amax != 0.0f ? round_codes(x, scale) : make_uint2(0, 0);
    int8_t* code_row = reinterpret_cast<int8_t*>(codes.base) + plane_offset(codes, place.page, place.slot, place.head_idx);
    *reinterpret_cast<uint2*>(code_row + channel) = words;
    const uint32_t shift = group_shift(p.cache.head_dim, group_len);
    if ((channel & ((1u << shift) - 1)) == 0) {
        const uint64_t element = plane_offset(scales, place.page, place.slot, place.head_idx) + (channel >> shift);
        if (p.cache.scale_type == kScaleF32) {
            reinterpret_cast<uint32_t*>(scales.base)[element] = bits;
        } else {
            reinterpret_cast<uint16_t*>(scales.base)[element] = static_cast<uint16_t>(bits);
        }
    }
}

__device__ __forceinline__ void append(const AppendParams& p) {
    ptx::launch_dependents();
    ptx::wait_for_previous();
    const uint32_t lanes = row_lanes(p.cache.head_dim);
    const uint64_t pair = static_cast<uint64_t>(blockIdx.x) * (kAppendThreads / lanes) + threadIdx.x / lanes;
    const uint32_t lane_in_row = threadIdx.x % lanes;
    const uint32_t channel = lane_in_row * kLaneChannels;
    const uint64_t num_pairs = static_cast<uint64_t>(p.num_tokens) * p.cache.num_kv_heads;
    const bool exists = pair < num_pairs;
    // A division of 64 bits costs as much as the rest of the addresses.
    const uint32_t token = !exists ? 0
                           : num_pairs >> 32 == 0 ? static_cast<uint32_t>(pair) / p.cache.num_kv_heads
                                                  : static_cast<uint32_t>(pair / p.cache.num_kv_heads);
    const uint32_t head = exists ? static_cast<uint32_t>(pair - static_cast<uint64_t>(token) * p.cache.num_kv_heads) : 0;

    int64_t slot = exists ? reinterpret_cast<const int64_t*>(p.slot_mapping)[token] : -1;
    RawChannels raw_k{}, raw_v{};
    if (exists && channel < p.cache.head_dim) {
        const uint64_t in_token = static_cast<uint64_t>(head) * p.cache.head_dim + channel;
        raw_k.load(p.k, token * p.k_token_stride + in_token, p.input_type);
        raw_v.load(p.v, token * p.v_token_stride + in_token, p.input_type);
    }
    float k[8], v[8];
    raw_k.unpack(p.input_type, k);
    raw_v.unpack(p.input_type, v);
    if (mutant(25) && slot == -1) slot = 0;
    const int64_t num_slots = static_cast<int64_t>(p.cache.num_pages) * p.cache.page_len;
    const bool in_range = slot >= 0 && slot < num_slots;
    if (exists && slot != -1 && !in_range && lane_in_row == 0) {
        report_error(p.error, kErrorSlotOutOfRange, token, head, 0, slot, 0);
    }
    const uint32_t shift = page_shift(p.cache);
    RowPlace place{token, head, 0, 0, 0, exists && in_range};
    if (place.writable) {
        place.page = static_cast<uint32_t>(slot >> shift);
        place.slot = static_cast<uint32_t>(slot) & ((1u << shift) - 1);
    }
    append_row(p, place, k, lane_in_row, lanes);
    place.plane_idx = 1;
    append_row(p, place, v, lane_in_row, lanes);
}

}  // namespace kv8
