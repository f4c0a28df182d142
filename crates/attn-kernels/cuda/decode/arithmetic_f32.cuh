// The products of stage 1 in plain f32: the test twin of arithmetic_mma.cuh. Same tiles, same masks, same merge, no operand
// rounded to f16, so that a dropped or doubled token cannot hide in f16 rounding. Slow, and read for its plainness.
#pragma once
#include "../params/decode.h"
#include "../quant/dequant.cuh"
#include "../quant/normalize.cuh"
#include "query_rows.cuh"
#include "traits.cuh"

namespace kv8 {

template <class T>
struct F32Arithmetic {
    static constexpr int kRowTiles = T::kRowTiles;

    float out[T::kVTiles][kRowTiles][4];
    const DecodeParams& params;
    uint64_t query[kRowTiles][2];  // element of q where this lane's query rows begin
    uint32_t lane, row, column;
    bool careful;
    uint32_t k_shift, v_shift;

    __device__ __forceinline__ F32Arithmetic(const DecodeParams& p, uint32_t lane_idx, uint8_t*, uint8_t*)
        : params(p),
          lane(lane_idx),
          row(lane_idx / 4),
          column(lane_idx % 4),
          careful(false),
          k_shift(group_shift(T::kHeadDim, p.cache.k_group_len)),
          v_shift(group_shift(T::kHeadDim, p.cache.v_group_len)) {}

    struct RawQuery {};
    struct QuerySource {};

    __device__ __forceinline__ void ask_for(const QuerySource&) const {}
    __device__ __forceinline__ void fetch_query(const DecodeParams&, const QuerySource&, RawQuery&) {}

    __device__ __forceinline__ QuerySource find_query(const DecodeParams& p, const QueryRows& rows, uint32_t request_idx) {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t query_row = min(rows.first() + 8 * tile + 2 * column + j, rows.total() - 1);
                query[tile][j] = rows.element(p, request_idx, query_row);
            }
        }
        return {};
    }

    __device__ __forceinline__ void load_query(const DecodeParams&, const RawQuery&, uint32_t) {}

    __device__ __forceinline__ void clear() {
        for (int i = 0; i < T::kVTiles; ++i) {
            for (int tile = 0; tile < kRowTiles; ++tile) {
                for (int e = 0; e < 4; ++e) out[i][tile][e] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void begin_item(bool) {}
    __device__ __forceinline__ bool was_careless() const { return false; }

    template <class Shape>
    __device__ __forceinline__ float value(const Shape& shape, const uint8_t* codes, uint32_t token, uint32_t channel, uint32_t shift,
                                           uint32_t misaligned) const {
        const int8_t code = static_cast<int8_t>(codes[token * shape.pitch + (channel ^ (token & Shape::swizzle) * 16)]);
        const uint8_t* scale_row = codes + shape.scales_at + token * shape.scale_pitch + (misaligned >> token & 1) * 2;
        return code * raw_scale(scale_row, channel >> shift, params.cache.scale_type);
    }

    template <class Shape>
    __device__ __forceinline__ void score(const Shape& shape, const uint8_t* stage, uint32_t misaligned, float (&scores)[kRowTiles][4]) {
        const float scale = params.softmax_scale * 1.4426950408889634f;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[tile][e] = 0.0f;
        }
        for (uint32_t channel = 0; channel < T::kHeadDim; ++channel) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float k = value(shape, stage, row + 8 * (e / 2), channel, k_shift, misaligned);
#pragma unroll
                for (int tile = 0; tile < kRowTiles; ++tile) {
                    const float q = load_float(reinterpret_cast<const void*>(params.q), query[tile][e % 2] + channel, params.q_type);
                    scores[tile][e] = fmaf(q, k, scores[tile][e]);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[tile][e] *= scale;
        }
    }

    template <class Shape>
    __device__ __forceinline__ bool prepare_values(const Shape&, const uint8_t*, uint32_t misaligned, float (&)[2]) {
        value_misaligned = misaligned >> 16;
        return false;
    }

    template <class Shape>
    __device__ __forceinline__ void accumulate(const Shape& shape, const uint8_t* stage, const float (&weights)[kRowTiles][4]) {
        for (uint32_t token = 0; token < kTileTokens; ++token) {
            float weight[kRowTiles][2];
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float low = __shfl_sync(kFullWarp, weights[tile][j], (token & 7) * 4 + column);
                    const float high = __shfl_sync(kFullWarp, weights[tile][2 + j], (token & 7) * 4 + column);
                    weight[tile][j] = token < 8 ? low : high;
                }
            }
#pragma unroll
            for (int word = 0; word < T::kVWords; ++word) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float v = value(shape, stage + shape.values_at, token, T::v_channel(word, row) + i, v_shift, value_misaligned);
#pragma unroll
                    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            float& sum = out[2 * word + i / 2][tile][2 * (i % 2) + j];
                            sum = fmaf(weight[tile][j], v, sum);
                        }
                    }
                }
            }
        }
    }

    static constexpr float kOutExponent = 0.0f;

    // Writes what the lane holds of query row 2 * column + j of `tile` to a row of out.
    __device__ __forceinline__ void store(float* to, int tile, int j) const {
#pragma unroll
        for (int word = 0; word < T::kVWords; ++word) {
            *reinterpret_cast<float4*>(to + T::v_channel(word, row)) = make_float4(
                out[2 * word][tile][j], out[2 * word][tile][2 + j], out[2 * word + 1][tile][j], out[2 * word + 1][tile][2 + j]);
        }
    }

  private:
    uint32_t value_misaligned;
};

}  // namespace kv8
