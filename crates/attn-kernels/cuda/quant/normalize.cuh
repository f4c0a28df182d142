// Scales whose products with codes may leave the range of f16, brought into range: per token, the largest scale is moved to
// [128, 256) by a power of two, which the f32 side of the computation takes back. Codes reach 127, products 32512.
#pragma once
#include "../common/warp.cuh"
#include "scale.cuh"

namespace kv8 {

constexpr int kLargestScaleLog2 = 7;    // floor(log2) of the largest normalized scale of a token
constexpr int kSmallestExponent = -126;  // scales below 2^-119 keep an absolute error of 2^-151 instead
constexpr uint32_t kWideF16Test = 0x24002400u;  // added to a pair of f16 scales, sets a top bit where the scale is >= 256

__device__ __forceinline__ bool holds_wide_scale(uint32_t pair) { return ((pair + kWideF16Test) & 0x80008000u) != 0; }

__device__ __forceinline__ int scale_exponent(float largest, uint32_t type) {
    if (type == kScaleF16) return largest >= 256.0f ? floor_log2(largest) - kLargestScaleLog2 : 0;
    return largest > 0.0f ? max(floor_log2(largest) - kLargestScaleLog2, kSmallestExponent) : kSmallestExponent;
}

__device__ __forceinline__ float raw_scale(const uint8_t* row, uint32_t group, uint32_t type) {
    if (type == kScaleF32) return reinterpret_cast<const float*>(row)[group];
    return scale_bits_to_f32(reinterpret_cast<const uint16_t*>(row)[group], type);
}

// Normalizes the scale rows of a tile of 16 tokens. Two lanes a row. `raw` rows lie `raw_pitch` apart, those whose bit is set
// in `misaligned` start two bytes later. Writes f16 rows to `normal` and one exponent a row. Ends with a warp barrier.
// GROUPS > 0: the row holds exactly that many groups, packed; 0: `groups` of them.
template <int GROUPS>
__device__ __forceinline__ void normalize_scales(const uint8_t* raw, int raw_pitch, uint32_t misaligned, uint32_t groups,
                                                 uint32_t type, uint8_t* normal, int normal_pitch, int* exponents,
                                                 uint32_t lane) {
    const uint32_t row = lane & 15;
    const uint32_t half = lane >> 4;
    const uint8_t* src = raw + row * raw_pitch + (misaligned >> row & 1) * 2;
    uint8_t* dst = normal + row * normal_pitch;
    float largest = 0.0f;
    if constexpr (GROUPS > 0) {
        constexpr int kPairs = GROUPS / 4;  // of this lane
        float values[kPairs][2];
        const uint32_t first = half * kPairs;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (type == kScaleF32) {
                const float2 pair = reinterpret_cast<const float2*>(src)[first + i];
                values[i][0] = pair.x;
                values[i][1] = pair.y;
            } else {
                const uint32_t pair = reinterpret_cast<const uint32_t*>(src)[first + i];
                if (type == kScaleF16) {
                    unpack_f16(pair, values[i][0], values[i][1]);
                } else {
                    unpack_bf16(pair, values[i][0], values[i][1]);
                }
            }
            largest = fmaxf(largest, fmaxf(values[i][0], values[i][1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 16));
        const int exponent = scale_exponent(largest, type);
        const float factor = power_of_two(-exponent);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            reinterpret_cast<uint32_t*>(dst)[first + i] = ptx::pack_f16x2(values[i][0] * factor, values[i][1] * factor);
        }
        if (half == 0) exponents[row] = exponent;
    } else {
        for (uint32_t i = half; i < groups; i += 2) largest = fmaxf(largest, raw_scale(src, i, type));
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 16));
        const int exponent = scale_exponent(largest, type);
        const float factor = power_of_two(-exponent);
        for (uint32_t i = half; i < groups; i += 2) {
            reinterpret_cast<__half*>(dst)[i] = __float2half_rn(raw_scale(src, i, type) * factor);
        }
        if (half == 0) exponents[row] = exponent;
    }
    __syncwarp();
}

}  // namespace kv8
