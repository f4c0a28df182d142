// Append: quantizes new K and V and scatters codes and scales to their slots.
//
// Grid: any; blocks of 256 threads stride over the (token, kv head) pairs, 256 / append_lanes(head_dim) at a time. A pair is held by
// append_lanes(head_dim) neighbouring lanes, each with the same 16 channels of K and of V (lanes past the row idle), while the
// lane's next pair is on its way. What is out of the ordinary in a warp it does afterwards, carefully.
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
constexpr uint32_t kEight = 8;  // channels that may have a scale of their own
constexpr uint32_t kLaneChannels = 2 * kEight;

// Lanes that hold a row: head_dim / 16 rounded up to a power of two.
__device__ __forceinline__ uint32_t append_lanes(uint32_t head_dim) { return head_dim <= 64 ? 4u : (head_dim <= 128 ? 8u : 16u); }

// A (token, kv head) by its number.
struct PairPlace {
    uint32_t token, head;

    __device__ __forceinline__ PairPlace(const AppendParams& p, uint64_t pair) {
        const uint32_t num_heads = p.cache.num_kv_heads;
        // A division of 64 bits costs as much as the rest of the addresses, one of 32 a third of it.
        if ((num_heads & (num_heads - 1)) == 0) {
            token = static_cast<uint32_t>(pair >> (31 - __clz(num_heads)));
        } else {
            token = pair >> 32 == 0 ? static_cast<uint32_t>(pair) / num_heads : static_cast<uint32_t>(pair / num_heads);
        }
        head = static_cast<uint32_t>(pair) - token * num_heads;
    }

    __device__ __forceinline__ int64_t slot(const AppendParams& p) const {
        const int64_t slot = reinterpret_cast<const int64_t*>(p.slot_mapping)[token];
        return mutant(25) && slot == -1 ? 0 : slot;
    }
};

__device__ __forceinline__ int64_t num_slots(const PagedCache& cache) { return static_cast<int64_t>(cache.num_pages) * cache.page_len; }

// The largest of `top` over the lanes that hold a group of more than 8 channels. All lanes of the warp take part.
__device__ __forceinline__ uint32_t group_top(uint32_t top, uint32_t group_len, uint32_t head_dim, uint32_t lanes) {
    // A group of no power of two is the whole head: the maximum over all lanes of the row, idle ones holding 0.
    const uint32_t group_lanes = group_len >= head_dim ? lanes : group_len / kLaneChannels;
    for (uint32_t step = 1; step < group_lanes; step *= 2) top = max(top, __shfl_xor_sync(kFullWarp, top, step));
    return top;
}

// Everything that may be, by the rule itself: one pair a row of lanes, any alignment; reports what cannot be written. All lanes of the
// warp take part, each with the number of its own pair.
__device__ __forceinline__ void append_carefully(const AppendParams& p, uint64_t pair) {
    constexpr uint32_t kInfinity = 0x7f800000u;
    const PagedCache& cache = p.cache;
    const uint32_t lanes = append_lanes(cache.head_dim);
    const uint32_t lane_in_row = threadIdx.x & (lanes - 1);
    const bool exists = pair < static_cast<uint64_t>(p.num_tokens) * cache.num_kv_heads;
    const PairPlace place(p, exists ? pair : 0);
    const int64_t slot = exists ? place.slot(p) : -1;
    const bool in_range = slot >= 0 && slot < num_slots(cache);
    if (slot != -1 && !in_range && lane_in_row == 0) report_error(p.error, kErrorSlotOutOfRange, place.token, place.head, 0, slot, 0);
#pragma unroll 1
    for (uint32_t plane_idx = 0; plane_idx < 2; ++plane_idx) {
        const bool is_v = plane_idx != 0;
        const uint32_t group_len = is_v ? cache.v_group_len : cache.k_group_len;
        const void* rows = reinterpret_cast<const void*>(is_v ? p.v : p.k);
        const uint64_t row = place.token * (is_v ? p.v_token_stride : p.k_token_stride) + place.head * cache.head_dim;
        float x[2][kEight] = {};
        uint32_t tops[2] = {};
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t channel = lane_in_row * kLaneChannels + half * kEight;
            if (!in_range || channel >= cache.head_dim) continue;
#pragma unroll
            for (uint32_t i = 0; i < kEight; ++i) {
                x[half][i] = load_float(rows, row + channel + i, p.input_type);
                tops[half] = max(tops[half], __float_as_uint(x[half][i]) & 0x7fffffffu);
            }
        }
        const bool non_finite = max(tops[0], tops[1]) >= kInfinity;
        if (group_len != kEight) tops[0] = tops[1] = group_top(max(tops[0], tops[1]), group_len, cache.head_dim, lanes);
        uint32_t bits[2];
        float scales[2];
        bool overflow = false;
        uint32_t fault = 0;  // the first channel at fault
#pragma unroll
        for (int half = 1; half >= 0; --half) {
            const uint32_t channel = lane_in_row * kLaneChannels + half * kEight;
            const bool finite = tops[half] < kInfinity;
            bits[half] = finite ? round_up_scale(__uint_as_float(tops[half]), cache.scale_type) : 0u;
            scales[half] = scale_bits_to_f32(bits[half], cache.scale_type);
            if (finite && !(scales[half] <= FLT_MAX)) overflow = true, fault = channel / group_len * group_len;
        }
        const uint32_t row_first = (threadIdx.x % 32) / lanes * lanes;
        const uint32_t bad_lanes = __ballot_sync(kFullWarp, in_range && (non_finite || overflow));
        const uint32_t bad = bad_lanes & ((1u << lanes) - 1) << row_first;
        if (bad != 0 && !mutant(22)) {
            if (threadIdx.x % 32 == __ffs(bad) - 1) {
#pragma unroll
                for (int i = kLaneChannels - 1; i >= 0; --i) {
                    if (!(fabsf(x[i / kEight][i % kEight]) <= FLT_MAX)) fault = lane_in_row * kLaneChannels + i;
                }
                report_error(p.error, non_finite ? kErrorNonFinite : kErrorScaleOverflow, place.token, place.head, fault, 0, plane_idx);
            }
            continue;
        }
        const uint32_t page = static_cast<uint32_t>(slot >> page_shift(cache));
        const uint32_t in_page = static_cast<uint32_t>(slot) & (cache.page_len - 1);
        const Plane& codes = is_v ? cache.v_codes : cache.k_codes;
        const Plane& scale_plane = is_v ? cache.v_scales : cache.k_scales;
        const uint32_t shift = group_shift(cache.head_dim, group_len);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t channel = lane_in_row * kLaneChannels + half * kEight;
            if (!in_range || channel >= cache.head_dim) continue;
            *reinterpret_cast<uint2*>(codes.base + plane_offset(codes, page, in_page, place.head) + channel) =
                divide_codes(x[half], scales[half]);
            if ((channel & ((1u << shift) - 1)) != 0) continue;
            const uint64_t element = plane_offset(scale_plane, page, in_page, place.head) + (channel >> shift);
            if (cache.scale_type == kScaleF32) {
                reinterpret_cast<uint32_t*>(scale_plane.base)[element] = bits[half];
            } else {
                reinterpret_cast<uint16_t*>(scale_plane.base)[element] = static_cast<uint16_t>(bits[half]);
            }
        }
    }
}

// Does those rounds of the warp's pairs carefully whose number i has bit i % 32 of `again`.
__device__ __noinline__ void append_again(const AppendParams& p, uint32_t again) {
    const uint32_t pairs_per_block = kAppendThreads / append_lanes(p.cache.head_dim);
    const uint64_t num_pairs = static_cast<uint64_t>(p.num_tokens) * p.cache.num_kv_heads;
    uint64_t first = static_cast<uint64_t>(blockIdx.x) * pairs_per_block;
#pragma unroll 1
    for (; first < num_pairs; first += static_cast<uint64_t>(gridDim.x) * pairs_per_block) {
        if (again & 1) append_carefully(p, first + threadIdx.x / append_lanes(p.cache.head_dim));
        again = __funnelshift_r(again, again, 1);
    }
}

// Eight channels of input type IN as they lie in memory, on their way. Nothing waits for them before they are unpacked.
template <uint32_t IN>
struct RawEight {
    static constexpr uint32_t kUnit = IN == kFloatF32 ? 4 : 2;
    uint4 parts[IN == kFloatF32 ? 2 : 1];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (uint4& part : parts) part = make_uint4(0, 0, 0, 0);
    }

    __device__ __forceinline__ void load(uint64_t address) {
        parts[0] = __ldg(reinterpret_cast<const uint4*>(address));
        if constexpr (IN == kFloatF32) parts[1] = __ldg(reinterpret_cast<const uint4*>(address + 16));
    }

    __device__ __forceinline__ void unpack(float (&x)[kEight]) const { unpack_float8(parts[0], parts[IN == kFloatF32 ? 1 : 0], IN, x); }

    // The bits of the largest magnitude as f32. Magnitudes are ordered like their bits, infinity and NaN above all others.
    __device__ __forceinline__ uint32_t top_bits() const {
        if constexpr (IN == kFloatF32) {
            const uint32_t words[8] = {parts[0].x, parts[0].y, parts[0].z, parts[0].w, parts[1].x, parts[1].y, parts[1].z, parts[1].w};
            uint32_t top = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) top = max(top, words[i] & 0x7fffffffu);
            return top;
        } else {
            constexpr uint32_t kMagnitudes = 0x7fff7fffu;
            const uint32_t low = __vmaxu2(parts[0].x & kMagnitudes, parts[0].y & kMagnitudes);
            const uint32_t top = __vmaxu2(__vmaxu2(low, parts[0].z & kMagnitudes), parts[0].w & kMagnitudes);
            if constexpr (IN == kFloatBf16) return max(top << 16, top & 0xffff0000u);
            return __float_as_uint(f16_bits_to_f32(max(top >> 16, top & 0xffffu)));
        }
    }
};

// A lane's channels of K or V of a pair, and what becomes of them.
template <uint32_t IN>
using RawRow = RawEight<IN>[2];

template <uint32_t IN, uint32_t SCALE>
struct QuantizedRow {
    uint32_t bits[2];
    uint2 codes[2];
    bool is_sure;  // finite, and rounded as by division

    // All lanes of the warp take part.
    __device__ __forceinline__ QuantizedRow(const RawRow<IN>& raw, uint32_t group_len, uint32_t head_dim, uint32_t lanes) : is_sure(true) {
        uint32_t tops[2] = {raw[0].top_bits(), raw[1].top_bits()};
        if (group_len != kEight) tops[0] = tops[1] = group_top(max(tops[0], tops[1]), group_len, head_dim, lanes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bits[half] = round_up_scale(__uint_as_float(tops[half]), SCALE);
            float x[kEight];
            raw[half].unpack(x);
            is_sure &= round_codes<IN, SCALE>(x, scale_bits_to_f32(bits[half], SCALE), codes[half]);
        }
    }

    // At the row's first code and its first scale.
    __device__ __forceinline__ void store(uint64_t code_row, uint64_t scale_row, uint32_t channel, uint32_t group_len, uint32_t head_dim) const {
        *reinterpret_cast<uint4*>(code_row + channel) = make_uint4(codes[0].x, codes[0].y, codes[1].x, codes[1].y);
        if (group_len == kEight) {
            if constexpr (SCALE == kScaleF32) {
                reinterpret_cast<uint2*>(scale_row)[channel / kLaneChannels] = make_uint2(bits[0], bits[1]);
            } else {
                reinterpret_cast<uint32_t*>(scale_row)[channel / kLaneChannels] = bits[0] | bits[1] << 16;
            }
            return;
        }
        const uint32_t shift = group_shift(head_dim, group_len);
        if ((channel & ((1u << shift) - 1)) != 0) return;
        if constexpr (SCALE == kScaleF32) {
            reinterpret_cast<uint32_t*>(scale_row)[channel >> shift] = bits[0];
        } else {
            reinterpret_cast<uint16_t*>(scale_row)[channel >> shift] = static_cast<uint16_t>(bits[0]);
        }
    }
};

// Whether 16 bytes can be read and written at a time, two scales too, and every stride has 32 bits (products of 32 bits take a
// quarter of the instructions). Other launches go carefully.
__device__ __forceinline__ bool is_plain(const AppendParams& p, uint32_t unit) {
    const PagedCache& cache = p.cache;
    const auto strides = [](const Plane& plane) { return plane.page_stride | plane.slot_stride | plane.head_stride; };
    const uint64_t codes = strides(cache.k_codes) | strides(cache.v_codes);
    const uint64_t scales = strides(cache.k_scales) | strides(cache.v_scales);
    const uint64_t inputs = p.k_token_stride | p.v_token_stride;
    const uint32_t scale_unit = scale_bytes(cache.scale_type);
    const uint64_t sixteen = p.k | p.v | inputs * unit | codes | cache.k_codes.base | cache.v_codes.base | cache.head_dim;
    const uint64_t pairs = scales * scale_unit | cache.k_scales.base | cache.v_scales.base;
    return ((codes | scales | inputs) >> 32 | (sixteen & 15) | (pairs & (2 * scale_unit - 1))) == 0 && !mutant(20) && !mutant(21);
}

// Element (page, slot, head, 0) of a plane whose strides have 32 bits.
__device__ __forceinline__ uint64_t narrow_offset(const Plane& plane, uint32_t page, uint32_t slot, uint32_t head) {
    return static_cast<uint64_t>(page) * static_cast<uint32_t>(plane.page_stride) +
           static_cast<uint64_t>(slot) * static_cast<uint32_t>(plane.slot_stride) +
           static_cast<uint64_t>(head) * static_cast<uint32_t>(plane.head_stride);
}

// A (token, kv head), its slot and its rows on their way.
template <uint32_t IN>
struct Pair {
    RawRow<IN> k, v;
    int64_t slot;  // -1 too where there is no such pair
    uint32_t head;

    __device__ __forceinline__ void load(const AppendParams& p, uint64_t pair, uint64_t num_pairs, uint32_t channel) {
        slot = -1;
#pragma unroll
        for (int half = 0; half < 2; ++half) k[half].clear(), v[half].clear();
        if (pair >= num_pairs) return;
        const PairPlace place(p, pair);
        head = place.head;
        slot = place.slot(p);
        if (channel >= p.cache.head_dim) return;
        const uint32_t in_token = place.head * p.cache.head_dim + channel;
        const auto at = [&](uint64_t base, uint64_t stride) {
            return base + (static_cast<uint64_t>(place.token) * static_cast<uint32_t>(stride) + in_token) * RawEight<IN>::kUnit;
        };
        const uint64_t k_at = at(p.k, p.k_token_stride);
        const uint64_t v_at = at(p.v, p.v_token_stride);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            k[half].load(k_at + half * kEight * RawEight<IN>::kUnit);
            v[half].load(v_at + half * kEight * RawEight<IN>::kUnit);
        }
    }
};

template <uint32_t IN, uint32_t SCALE>
__device__ __forceinline__ void append_pairs(const AppendParams& p) {
    const PagedCache& cache = p.cache;
    const uint32_t lanes = append_lanes(cache.head_dim);
    const uint32_t lanes_log2 = 31 - __clz(lanes);
    const uint32_t pairs_per_block = kAppendThreads >> lanes_log2;
    const uint32_t channel = (threadIdx.x & (lanes - 1)) * kLaneChannels;
    const uint64_t num_pairs = static_cast<uint64_t>(p.num_tokens) * cache.num_kv_heads;
    const uint32_t shift = page_shift(cache);
    const bool plain = is_plain(p, RawEight<IN>::kUnit);
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * pairs_per_block;
    const auto number = [&](uint64_t first) { return first + (threadIdx.x >> lanes_log2); };
    const uint64_t begin = static_cast<uint64_t>(blockIdx.x) * pairs_per_block;  // of the block
    uint32_t again = ~0u;  // bit i: rounds i, i + 32, ... are to be done carefully
    if (is_plain(p, RawEight<IN>::kUnit)) {
        again = 0;
        // Rows of f32 are as many bytes on their way at once, and as many registers; scales of f32 want registers for a division.
        constexpr bool kAhead = IN != kFloatF32 && SCALE != kScaleF32;
        Pair<IN> pair, next;
        if (kAhead) pair.load(p, number(begin), num_pairs, channel);
        uint32_t round = 1;
#pragma unroll 1
        for (uint64_t first = begin; first < num_pairs; first += step) {
            if (kAhead) {
                next.load(p, number(first + step), num_pairs, channel);
            } else {
                pair.load(p, number(first), num_pairs, channel);
            }
            const QuantizedRow<IN, SCALE> k(pair.k, cache.k_group_len, cache.head_dim, lanes);
            const QuantizedRow<IN, SCALE> v(pair.v, cache.v_group_len, cache.head_dim, lanes);
            const bool in_range = pair.slot >= 0 && pair.slot < num_slots(cache);
            const bool is_sure = pair.slot == -1 || (in_range && k.is_sure && v.is_sure);
            if (!__all_sync(kFullWarp, is_sure)) {
                again |= round;
            } else if (in_range && channel < cache.head_dim) {
                const uint32_t page = static_cast<uint32_t>(pair.slot >> shift);
                const uint32_t in_page = static_cast<uint32_t>(pair.slot) & (cache.page_len - 1);
                const auto at = [&](const Plane& plane, uint32_t unit) { return plane.base + narrow_offset(plane, page, in_page, pair.head) * unit; };
                constexpr uint32_t kScaleUnit = SCALE == kScaleF32 ? 4 : 2;
                k.store(at(cache.k_codes, 1), at(cache.k_scales, kScaleUnit), channel, cache.k_group_len, cache.head_dim);
                v.store(at(cache.v_codes, 1), at(cache.v_scales, kScaleUnit), channel, cache.v_group_len, cache.head_dim);
            }
            round = __funnelshift_l(round, round, 1);
            if (kAhead) pair = next;
        }
    }
    if (again != 0) append_again(p, again);
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
    // In this order: what a kernel after this one may read before it waits was complete before this one began to write.
    ptx::wait_for_previous();
    ptx::launch_dependents();
    if (p.input_type == kFloatBf16) {
        append_typed<kFloatBf16>(p);
    } else if (p.input_type == kFloatF16) {
        append_typed<kFloatF16>(p);
    } else {
        append_typed<kFloatF32>(p);
    }
}

}  // namespace kv8
