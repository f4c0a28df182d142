// The quantization rule, bit for bit the same as the CPU's: the stored scale is the smallest value of its type that is at
// least amax / 127, and codes are rounded to nearest even against the stored scale. IEEE division, no flush to zero.
#pragma once
#include "../common/dtype.cuh"
#include "../common/mutant.cuh"

namespace kv8 {

__device__ __forceinline__ uint32_t scale_bytes(uint32_t type) { return type == kScaleF32 ? 4u : 2u; }

__device__ __forceinline__ float scale_bits_to_f32(uint32_t bits, uint32_t type) {
    if (type == kScaleF32) return __uint_as_float(bits);
    return type == kScaleF16 ? f16_bits_to_f32(bits) : bf16_bits_to_f32(bits);
}

// Bits of the scale for a group whose largest magnitude is amax (finite). May encode infinity: then the scale overflowed.
__device__ __forceinline__ uint32_t round_up_scale(float amax, uint32_t type) {
    if (amax == 0.0f) return 0u;
    const float quotient = __fdiv_rn(amax, 127.0f);
    uint32_t bits;
    bool below;
    if (type == kScaleF32) {
        bits = __float_as_uint(quotient);
        below = __fmaf_rn(quotient, 127.0f, -amax) < 0.0f;
    } else {
        bits = type == kScaleF16 ? __half_as_ushort(__float2half_rn(quotient))
                                 : __bfloat16_as_ushort(__float2bfloat16_rn(quotient));
        below = __fmul_rn(scale_bits_to_f32(bits, type), 127.0f) < amax;
    }
    return below && !mutant(20) ? bits + 1u : bits;
}

__device__ __forceinline__ int round_code(float x, float scale) {
    const float quotient = __fdiv_rn(x, scale);
    const int code = mutant(21) ? static_cast<int>(quotient) : __float2int_rn(quotient);
    return max(-127, min(127, code));
}

}  // namespace kv8
