// The products of stage 1 where a group is the whole head: one scale a row, so that the codes themselves are the operands.
//
// K: m16n8k32 on integers. A query row is a 16-bit fixed-point number 256 * high + low a channel, relative to the row's largest
// magnitude; both halves are products of their own, exact in 32 bits, and a K code is never converted. The scale of K and the
// row's power of two multiply the sum.
// V: m16n8k16 in f16. A code byte with its top bit flipped is the f16 subnormal (code + 128) * 2^-24, so one LOP3 makes a pair of
// operands; the surplus of 128 goes out again by one more mma a tile, with -128 for every code, so that sums stay as small as
// their terms. The transposing loads bring two tokens of two channels in a register. The scale of V joins the weight, as its
// logarithm: see OnlineState.
#pragma once
#include <cfloat>

#include "../common/mutant.cuh"
#include "../params/decode.h"
#include "../quant/dequant.cuh"
#include "../quant/normalize.cuh"
#include "query_rows.cuh"
#include "traits.cuh"

namespace kv8 {

template <class T>
struct WholeArithmetic {
    static_assert(T::kWhole && T::kHeadDim % 32 == 0 && !T::kQueryInShared);
    static constexpr int kRowTiles = T::kRowTiles;
    static constexpr int kSteps = T::kHeadDim / 32;
    static constexpr float kOutExponent = 24.0f;        // out is 2^-24 of the sum
    static constexpr uint32_t kSurplus = 0x80808080u;   // -128 * 2^-24, twice (f16 0x8080)
    static constexpr float kLargestQuery = 32639.0f;    // 256 * 127 + 127

    // Channels 16 i + 4 * column + {0, 1, 2, 3} of query row `row` of a row tile, as they lie in memory. Read before the ring is
    // filled: later they would wait behind its copies.
    struct RawQuery {
        uint4 parts[kRowTiles][T::kHeadDim / 16];  // half of it unless q is f32
    };

    float out[T::kVTiles][kRowTiles][4];
    uint2 high[kSteps][kRowTiles];
    uint2 low[kSteps][kRowTiles];
    float factor[kRowTiles][2];  // softmax_scale * log2(e) and the row's power of two
    uint32_t lane, row, column;  // row = lane / 4, column = lane % 4
    uint32_t scale_type;
    bool careful;                // no scale is out of range here
    float scales;  // of K of token `lane`, or the logarithm (base 2) of the scale of V of token `lane` - 16

    __device__ __forceinline__ WholeArithmetic(const DecodeParams& p, uint32_t lane_idx, uint8_t*, uint8_t*)
        : lane(lane_idx), row(lane_idx / 4), column(lane_idx % 4), scale_type(p.cache.scale_type), careful(true) {}

    // Where this lane's first channel of its query rows lies; nullptr: there is no such row. Needs nothing but the shapes.
    struct QuerySource {
        const uint8_t* rows[kRowTiles];
    };

    __device__ __forceinline__ QuerySource find_query(const DecodeParams& p, const QueryRows& rows, uint32_t request_idx) const {
        QuerySource source;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            const uint32_t query_row = rows.first() + 8 * tile + row;
            const uint64_t element = rows.element(p, request_idx, min(query_row, rows.total() - 1)) + 4 * column;
            const uint8_t* q = reinterpret_cast<const uint8_t*>(p.q) + element * float_bytes(p.q_type);
            source.rows[tile] = query_row < rows.total() ? q : nullptr;
            ptx::keep(source.rows[tile]);
        }
        return source;
    }

    // Makes the way to the queries known, and brings what lies there now into the L2: the kernel before may still write it.
    __device__ __forceinline__ void ask_for(const QuerySource& source) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            if (source.rows[tile] != nullptr) ptx::prefetch_line(source.rows[tile]);
        }
    }

    __device__ __forceinline__ void fetch_query(const DecodeParams& p, const QuerySource& source, RawQuery& raw) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int part = 0; part < T::kHeadDim / 16; ++part) {
                uint4& to = raw.parts[tile][part];
                to = make_uint4(0, 0, 0, 0);
                if (source.rows[tile] == nullptr) continue;
                if (p.q_type == kFloatF32) {
                    to = *reinterpret_cast<const uint4*>(source.rows[tile] + part * 64);
                } else {
                    const uint2 half = *reinterpret_cast<const uint2*>(source.rows[tile] + part * 32);
                    to.x = half.x, to.y = half.y;
                }
            }
        }
    }

    // Makes B fragments of the query rows. The power of two puts a row's largest magnitude in [2^14, 2^15), or a bit lower where
    // it would not fit two signed bytes.
    __device__ __forceinline__ void load_query(const DecodeParams& p, const RawQuery& raw, uint32_t) {
        constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a sum with it holds the rounded number in its low bits
        const float scale = p.softmax_scale * 1.4426950408889634f;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            float x[T::kHeadDim / 16][4];
            float largest = 0.0f;
            with_type(p.q_type, [&](auto type) {
#pragma unroll
                for (int part = 0; part < T::kHeadDim / 16; ++part) {
                    float eight[8];
                    unpack_float8(raw.parts[tile][part], raw.parts[tile][part], decltype(type)::value, eight);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        x[part][i] = eight[i];
                        largest = fmaxf(largest, fabsf(eight[i]));
                    }
                }
            });
            largest = segment_max(largest, 4);
            int exp = largest > 0.0f && largest <= FLT_MAX ? clamp_int(floor_log2(largest) - 14, -126, 126) : 0;
            if (largest * power_of_two(-exp) > kLargestQuery) ++exp;
            const float shrink = power_of_two(-exp);
            float poison = 0.0f;  // integers hold no infinity and no NaN: these go into the factor
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32_t words[2][2];
#pragma unroll
                for (int word = 0; word < 2; ++word) {
                    uint32_t ints[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float one = x[2 * step + word][i];
                        poison = fmaf(one, 0.0f, poison);
                        ints[i] = __float_as_uint(fmaf(one, shrink, kRounder));
                    }
                    words[0][word] = pack_bytes(ints[0], ints[1], ints[2], ints[3]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) ints[i] = (ints[i] + 128) >> 8;
                    words[1][word] = pack_bytes(ints[0], ints[1], ints[2], ints[3]);
                }
                low[step][tile] = make_uint2(words[0][0], words[0][1]);
                high[step][tile] = make_uint2(words[1][0], words[1][1]);
            }
            poison += __shfl_xor_sync(kFullWarp, poison, 1);
            poison += __shfl_xor_sync(kFullWarp, poison, 2);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t owner = (2 * column + j) * 4;
                factor[tile][j] = scale * power_of_two(__shfl_sync(kFullWarp, exp, owner)) + __shfl_sync(kFullWarp, poison, owner);
            }
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < T::kVTiles; ++i) {
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[i][tile][e] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void begin_item(bool) {}
    __device__ __forceinline__ bool was_careless() const { return false; }

    // Scores of the tile's tokens (rows `row` and `row` + 8), base 2, before caps and masks.
    template <class Shape>
    __device__ __forceinline__ void score(const Shape& shape, const uint8_t* stage, uint32_t misaligned,
                                          float (&scores)[kRowTiles][4]) {
        load_scales(shape, stage, misaligned);
        int32_t sums[2][kRowTiles][4];
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[0][tile][e] = sums[1][tile][e] = 0;
        }
        const uint32_t first = fragments<Shape>(shape, stage, 0);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t codes[4];
            ptx::load_matrices(codes, next_pieces<Shape>(first, step));
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
                ptx::mma_16x8x32(sums[0][tile], codes[0], codes[1], codes[2], codes[3], high[step][tile].x, high[step][tile].y);
                ptx::mma_16x8x32(sums[1][tile], codes[0], codes[1], codes[2], codes[3], low[step][tile].x, low[step][tile].y);
            }
        }
        const float token_scale[2] = {__shfl_sync(kFullWarp, scales, row), __shfl_sync(kFullWarp, scales, row + 8)};
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float sum = static_cast<float>(sums[0][tile][e] * 256 + sums[1][tile][e]);
                scores[tile][e] = sum * factor[tile][e % 2] * token_scale[e / 2];
            }
        }
    }

    // The logarithms of the scales of V of tokens `row` and `row` + 8.
    template <class Shape>
    __device__ __forceinline__ bool prepare_values(const Shape&, const uint8_t*, uint32_t, float (&shifts)[2]) {
        shifts[0] = __shfl_sync(kFullWarp, scales, row + 16);
        shifts[1] = __shfl_sync(kFullWarp, scales, row + 24);
        return true;
    }

    // out += weights * V of the tile; the weights hold V's scales.
    template <class Shape>
    __device__ __forceinline__ void accumulate(const Shape& shape, const uint8_t* stage, const float (&weights)[kRowTiles][4]) {
        uint2 p[kRowTiles];
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            p[tile].x = ptx::transpose_8x8(ptx::pack_f16x2(weights[tile][0], weights[tile][1]));
            p[tile].y = ptx::transpose_8x8(ptx::pack_f16x2(weights[tile][2], weights[tile][3]));
        }
        const uint32_t first = fragments<Shape>(shape, stage + shape.values_at, mutant(18) ? 1u : 0u);
#pragma unroll
        for (int word = 0; word < T::kVWords; ++word) {
            uint32_t codes[4];
            ptx::load_transposed(codes, next_pieces<Shape>(first, word));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t a0 = operands(codes[2 * half]);
                const uint32_t a1 = operands(codes[2 * half] >> 8);
                const uint32_t a2 = operands(codes[2 * half + 1]);
                const uint32_t a3 = operands(codes[2 * half + 1] >> 8);
#pragma unroll
                for (int tile = 0; tile < kRowTiles; ++tile) {
                    float(&to)[4] = out[2 * word + half][tile];
                    ptx::mma_16x8x16(to, kSurplus, kSurplus, kSurplus, kSurplus, p[tile].x, p[tile].y);
                    ptx::mma_16x8x16(to, a0, a1, a2, a3, p[tile].x, p[tile].y);
                }
            }
        }
    }

    // Writes what the lane holds of query row 2 * column + j of `tile` to a row of out.
    __device__ __forceinline__ void store(float* to, int tile, int j) const {
#pragma unroll
        for (int i = 0; i < T::kVTiles; ++i) {
            *reinterpret_cast<float2*>(to + 16 * i + 2 * row) = make_float2(out[i][tile][j], out[i][tile][2 + j]);
        }
    }

  private:
    // Bytes 0 and 2 of a word of codes, each plus 128.
    static __device__ __forceinline__ uint32_t operands(uint32_t codes) { return ptx::mask_flip<0x00ff00ffu, 0x00800080u>(codes); }

    // The address that this lane brings to the loads of matrices (8 tokens of 16 channels): both halves of the tokens, of pieces 0
    // and 1 of the rows.
    template <class Shape>
    __device__ __forceinline__ uint32_t fragments(const Shape& shape, const uint8_t* codes, uint32_t flip) const {
        const uint32_t token = lane % kTileTokens ^ flip;
        return ptx::shared_address(codes) + token * shape.pitch + (lane / 16 ^ token & Shape::swizzle) * 16;
    }

    // The same of pieces 2 * step and 2 * step + 1. Rows that are swizzled are whole lines, each swizzled for itself.
    template <class Shape>
    static __device__ __forceinline__ uint32_t next_pieces(uint32_t first, int step) {
        return Shape::swizzle != 0 ? (first ^ 32 * (step % 4)) + 128 * (step / 4) : first + 32 * step;
    }

    // One scale a lane: K of the tile's tokens, then V.
    template <class Shape>
    __device__ __forceinline__ void load_scales(const Shape& shape, const uint8_t* stage, uint32_t misaligned) {
        const uint32_t plane = lane >= 16 || mutant(16) ? shape.values_at : 0;
        const uint32_t at = plane + shape.scales_at + lane % kTileTokens * shape.scale_pitch + (misaligned >> lane & 1) * 2;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(stage + (at & ~3u)) >> (at & 2) * 8;
        scales = scale_type == kScaleF32 ? __uint_as_float(word) : scale_bits_to_f32(word & 0xffffu, scale_type);
        if (lane >= 16) scales = ptx::lg2_approx(scales);
    }
};

}  // namespace kv8
