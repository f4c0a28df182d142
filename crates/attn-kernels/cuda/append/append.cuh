// Append: quantizes new K and V and scatters codes and scales to their slots.
//
// Grid: any; blocks of 256 threads stride over the (token, kv head) pairs, 256 / row_lanes(head_dim) at a time. A row of head_dim
// channels is held by row_lanes(head_dim) neighbouring lanes, 8 channels each (lanes past the row idle); each does K, then V, of
// its pair, while its next pair is on the way.
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

// Eight channels of input type IN as they lie in memory, on their way. Nothing waits for them before they are unpacked.
template <uint32_t IN>
struct RawChannels {
    static constexpr uint32_t kUnit = IN == kFloatF32 ? 4 : 2;
    uint4 parts[2];  // the second half is for f32

    __device__ __forceinline__ void clear() { parts[0] = parts[1] = make_uint4(0, 0, 0, 0); }

    __device__ __forceinline__ void load_vectors(uint64_t address) {
        parts[0] = ptx::load_streaming(reinterpret_cast<const void*>(address));
        if (IN == kFloatF32) parts[1] = ptx::load_streaming(reinterpret_cast<const void*>(address + 16));
    }

    __device__ __forceinline__ void load(uint64_t address, bool all_aligned) {
        clear();
        if (all_aligned) {
            load_vectors(address);
            return;
        }
        if ((address & 15) == 0) {
            load_vectors(address);
            return;
        }
        uint32_t words[8] = {};
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            if (kUnit == 4) {
                words[i] = reinterpret_cast<const uint32_t*>(address)[i];
            } else {
                words[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(address)[i]) << (i % 2 * 16);
            }
        }
        parts[0] = make_uint4(words[0], words[1], words[2], words[3]);
        parts[1] = make_uint4(words[4], words[5], words[6], words[7]);
    }

    __device__ __forceinline__ void unpack(float (&x)[8]) const { unpack_float8(parts[0], parts[1], IN, x); }

    // The bits of the largest magnitude as f32. Magnitudes are ordered like their bits, infinity and NaN above all others.
    __device__ __forceinline__ uint32_t top_bits() const {
        const uint32_t words[8] = {parts[0].x, parts[0].y, parts[0].z, parts[0].w, parts[1].x, parts[1].y, parts[1].z, parts[1].w};
        uint32_t top = 0;
        if constexpr (IN == kFloatF32) {
#pragma unroll
            for (int i = 0; i < 8; ++i) top = max(top, words[i] & 0x7fffffffu);
            return top;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) top = __vmaxu2(top, words[i] & 0x7fff7fffu);
            const uint32_t half = max(top >> 16, top & 0xffffu);
            return IN == kFloatBf16 ? half << 16 : __float_as_uint(f16_bits_to_f32(half));
        }
    }
};

// Where a (token, head) is written: bytes for codes, elements for scales.
struct RowPlaces {
    uint64_t k_codes, v_codes, k_scales, v_scales;

    __device__ __forceinline__ RowPlaces(const PagedCache& cache, uint32_t page, uint32_t slot, uint32_t head) {
        const auto wide = [](const Plane& plane) { return plane.page_stride | plane.slot_stride | plane.head_stride; };
        const bool narrow = (wide(cache.k_codes) | wide(cache.v_codes) | wide(cache.k_scales) | wide(cache.v_scales)) >> 32 == 0;
        if (narrow) {  // products of 32 bits take a quarter of the instructions
            const auto at = [&](const Plane& plane) {
                return static_cast<uint64_t>(page) * static_cast<uint32_t>(plane.page_stride) +
                       static_cast<uint64_t>(slot) * static_cast<uint32_t>(plane.slot_stride) +
                       static_cast<uint64_t>(head) * static_cast<uint32_t>(plane.head_stride);
            };
            k_codes = at(cache.k_codes), v_codes = at(cache.v_codes), k_scales = at(cache.k_scales), v_scales = at(cache.v_scales);
        } else {
            k_codes = plane_offset(cache.k_codes, page, slot, head), v_codes = plane_offset(cache.v_codes, page, slot, head);
            k_scales = plane_offset(cache.k_scales, page, slot, head), v_scales = plane_offset(cache.v_scales, page, slot, head);
        }
    }
};

// Quantizes and stores one row of one plane. All lanes of the warp take part; `writable` is the same in all lanes of a row.
template <uint32_t IN, uint32_t SCALE>
__device__ __forceinline__ void append_row(const AppendParams& p, const RawChannels<IN>& raw, bool writable, uint32_t plane_idx,
                                           uint64_t code_at, uint64_t scale_at, uint32_t token, uint32_t head,
                                           uint32_t lane_in_row, uint32_t lanes) {
    const bool is_v = plane_idx != 0;
    const uint32_t group_len = is_v ? p.cache.v_group_len : p.cache.k_group_len;
    const uint32_t channel = lane_in_row * kLaneChannels;
    const bool inside = channel < p.cache.head_dim;

    uint32_t top = raw.top_bits();
    const bool non_finite = top >= 0x7f800000u;
    // A group of no power of two is the whole head: the maximum over all lanes of the row, idle ones holding 0.
    const uint32_t group_lanes = group_len >= p.cache.head_dim ? lanes : group_len / kLaneChannels;
    for (uint32_t step = 1; step < group_lanes; step *= 2) top = max(top, __shfl_xor_sync(kFullWarp, top, step));
    const float amax = __uint_as_float(top);
    const bool finite = top < 0x7f800000u;
    const uint32_t bits = finite ? round_up_scale(amax, SCALE) : 0u;
    const float scale = scale_bits_to_f32(bits, SCALE);
    const bool overflow = finite && !(scale <= FLT_MAX);

    const uint32_t bad_lanes = __ballot_sync(kFullWarp, writable && inside && (non_finite || overflow));
    if (bad_lanes != 0) {
        const uint32_t row_first = (threadIdx.x % 32) / lanes * lanes;
        const uint32_t row_mask = lanes == 32 ? kFullWarp : ((1u << lanes) - 1) << row_first;
        const uint32_t bad = bad_lanes & row_mask;
        if (bad != 0 && !mutant(22)) {
            if (threadIdx.x % 32 == __ffs(bad) - 1) {
                const uint32_t kind = non_finite ? kErrorNonFinite : kErrorScaleOverflow;
                uint32_t at = channel / group_len * group_len;
                float x[8];
                raw.unpack(x);
#pragma unroll
                for (int i = 7; i >= 0; --i) {
                    if (!(fabsf(x[i]) <= FLT_MAX)) at = channel + i;
                }
                report_error(p.error, kind, token, head, at, 0, plane_idx);
            }
            writable = false;
        }
    }
    if (!writable || !inside) return;

    float x[8];
    raw.unpack(x);
    const uint2 words = amax != 0.0f ? round_codes(x, scale) : make_uint2(0, 0);
    const Plane& codes = is_v ? p.cache.v_codes : p.cache.k_codes;
    const Plane& scales = is_v ? p.cache.v_scales : p.cache.k_scales;
    *reinterpret_cast<uint2*>(codes.base + code_at + channel) = words;
    const uint32_t shift = group_shift(p.cache.head_dim, group_len);
    if ((channel & ((1u << shift) - 1)) == 0) {
        const uint64_t element = scale_at + (channel >> shift);
        if (SCALE == kScaleF32) {
            reinterpret_cast<uint32_t*>(scales.base)[element] = bits;
        } else {
            reinterpret_cast<uint16_t*>(scales.base)[element] = static_cast<uint16_t>(bits);
        }
    }
}

// A (token, kv head), its slot and its rows on their way.
template <uint32_t IN>
struct Pair {
    RawChannels<IN> k, v;
    int64_t slot;
    uint32_t token, head;
    bool exists;

    __device__ __forceinline__ void load(const AppendParams& p, uint64_t pair, uint64_t num_pairs, uint32_t channel,
                                         bool all_aligned) {
        const uint32_t num_heads = p.cache.num_kv_heads;
        exists = pair < num_pairs;
        // A division of 64 bits costs as much as the rest of the addresses, one of 32 a third of it.
        if ((num_heads & (num_heads - 1)) == 0) {
            token = static_cast<uint32_t>(pair >> (31 - __clz(num_heads)));
        } else {
            token = num_pairs >> 32 == 0 ? static_cast<uint32_t>(pair) / num_heads : static_cast<uint32_t>(pair / num_heads);
        }
        head = static_cast<uint32_t>(pair) - token * num_heads;
        slot = exists ? reinterpret_cast<const int64_t*>(p.slot_mapping)[token] : -1;
        if (exists && channel < p.cache.head_dim) {
            const uint32_t in_token = head * p.cache.head_dim + channel;
            k.load(p.k + (token * p.k_token_stride + in_token) * RawChannels<IN>::kUnit, all_aligned);
            v.load(p.v + (token * p.v_token_stride + in_token) * RawChannels<IN>::kUnit, all_aligned);
        } else {
            k.clear();
            v.clear();
        }
    }
};

template <uint32_t IN, uint32_t SCALE>
__device__ __forceinline__ void append_pairs(const AppendParams& p) {
    const uint32_t lanes = row_lanes(p.cache.head_dim);
    const uint32_t lanes_log2 = 31 - __clz(lanes);
    const uint32_t pairs_per_block = kAppendThreads >> lanes_log2;
    const uint32_t lane_in_row = threadIdx.x & (lanes - 1);
    const uint32_t channel = lane_in_row * kLaneChannels;
    const uint64_t num_pairs = static_cast<uint64_t>(p.num_tokens) * p.cache.num_kv_heads;
    const int64_t num_slots = static_cast<int64_t>(p.cache.num_pages) * p.cache.page_len;
    const uint32_t shift = page_shift(p.cache);

    // The same for the whole launch: no lane then looks at how a single row lies.
    const bool all_aligned = ((p.k | p.v | (p.k_token_stride | p.v_token_stride) * RawChannels<IN>::kUnit) & 15) == 0;

    uint64_t first = static_cast<uint64_t>(blockIdx.x) * pairs_per_block;  // of the block
    const auto load = [&](Pair<IN>& pair) { pair.load(p, first + (threadIdx.x >> lanes_log2), num_pairs, channel, all_aligned); };
    constexpr bool kAhead = IN != kFloatF32;  // rows of f32 are as many bytes on their way at once, and as many registers
    Pair<IN> pair, next;
    if (kAhead) load(pair);
#pragma unroll 1
    while (first < num_pairs) {
        if (!kAhead) load(pair);
        first += static_cast<uint64_t>(gridDim.x) * pairs_per_block;
        if (kAhead) load(next);
        if (mutant(25) && pair.exists && pair.slot == -1) pair.slot = 0;
        const bool in_range = pair.slot >= 0 && pair.slot < num_slots;
        if (pair.exists && pair.slot != -1 && !in_range && lane_in_row == 0) {
            report_error(p.error, kErrorSlotOutOfRange, pair.token, pair.head, 0, pair.slot, 0);
        }
        const bool writable = pair.exists && in_range;
        const uint32_t page = writable ? static_cast<uint32_t>(pair.slot >> shift) : 0;
        const uint32_t in_page = writable ? static_cast<uint32_t>(pair.slot) & ((1u << shift) - 1) : 0;
        const RowPlaces places(p.cache, page, in_page, pair.head);
        append_row<IN, SCALE>(p, pair.k, writable, 0, places.k_codes, places.k_scales, pair.token, pair.head, lane_in_row, lanes);
        append_row<IN, SCALE>(p, pair.v, writable, 1, places.v_codes, places.v_scales, pair.token, pair.head, lane_in_row, lanes);
        if (kAhead) pair = next;
    }
}

template <uint32_t IN>
__device__ __forceinline__ void append_typed(const AppendParams& p) {
    if (p.cache.scale_type == kScaleF16) {
        append_pairs<IN, kScaleF16>(p);
    } else if (p.cache.scale_type == kScaleBf16) {
        append_pairs<IN, kScaleBf16>(p);
    } else {
        append_pairs<IN, kScaleF32>(p);
    }
}

__device__ __forceinline__ void append(const AppendParams& p) {
    ptx::launch_dependents();
    ptx::wait_for_previous();
    if (p.input_type == kFloatBf16) {
        append_typed<kFloatBf16>(p);
    } else if (p.input_type == kFloatF16) {
        append_typed<kFloatF16>(p);
    } else {
        append_typed<kFloatF32>(p);
    }
}

}  // namespace kv8
