// The quantization rule, bit for bit the same as the CPU's: the stored scale is the smallest value of its type that is at
// least amax / 127, and codes are rounded to nearest even against the stored scale. IEEE division, no flush to zero.
#pragma once
#include "../common/dtype.cuh"
#include "../common/mutant.cuh"
#include "../common/ptx.cuh"

namespace kv8 {

__device__ __forceinline__ uint32_t scale_bytes(uint32_t type) { return type == kScaleF32 ? 4u : 2u; }

__device__ __forceinline__ float scale_bits_to_f32(uint32_t bits, uint32_t type) {
    if (type == kScaleF32) return __uint_as_float(bits);
    return type == kScaleF16 ? f16_bits_to_f32(bits) : bf16_bits_to_f32(bits);
}

// Bits of the scale for a group whose largest magnitude is amax (finite). May encode infinity: then the scale overflowed.
__device__ __forceinline__ uint32_t round_up_scale(float amax, uint32_t type) {
    if (amax == 0.0f) return 0u;
    uint32_t bits;
    bool below;
    if (type == kScaleF32) {
        const float quotient = __fdiv_rn(amax, 127.0f);
        bits = __float_as_uint(quotient);
        below = __fmaf_rn(quotient, 127.0f, -amax) < 0.0f;
    } else {
        // An error of an ulp of f32 moves the rounding only at the middle between two neighbours, where the sum below is made.
        const float quotient = __fmul_rn(amax, 1.0f / 127.0f);
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

// The low bytes of four words.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Codes of eight channels that share a scale (not 0), packed. A quotient by an approximate reciprocal is within 2^-15 of the
// rounded one (both are at most 127, the reciprocal and the product err by 2^-22 of it): where no half lies that near, both round
// to the same code, which the sum with 1.5 * 2^23 leaves in its low byte. Elsewhere, and for scales whose reciprocal leaves the
// range, the division is made.
__device__ __forceinline__ uint2 round_codes(const float (&x)[8], float scale) {
    constexpr float kRounder = 12582912.0f;
    const float inverse = ptx::rcp_approx(scale);
    uint32_t codes[8];
    float farthest = 0.0f;  // from a whole number
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float rounded = __fmaf_rn(x[i], inverse, kRounder);
        farthest = fmaxf(farthest, fabsf(__fmaf_rn(x[i], inverse, -__fsub_rn(rounded, kRounder))));
        codes[i] = __float_as_uint(rounded);
    }
    if (mutant(20) || mutant(21) || !(farthest < 0.49993f) || !(scale > 1e-30f && scale < 1e30f)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) codes[i] = static_cast<uint32_t>(round_code(x[i], scale));
    }
    return make_uint2(pack_bytes(codes[0], codes[1], codes[2], codes[3]), pack_bytes(codes[4], codes[5], codes[6], codes[7]));
}

}  // namespace kv8
