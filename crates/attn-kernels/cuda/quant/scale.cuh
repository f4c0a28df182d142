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

// Codes of eight channels that share a scale, packed, by division; zeros for a scale of 0.
__device__ __forceinline__ uint2 divide_codes(const float (&x)[8], float scale) {
    uint32_t codes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = scale != 0.0f ? static_cast<uint32_t>(round_code(x[i], scale)) : 0u;
    return make_uint2(pack_bytes(codes[0], codes[1], codes[2], codes[3]), pack_bytes(codes[4], codes[5], codes[6], codes[7]));
}

// The same without a division, for values of input type IN. Returns whether they are sure to be the same: not for scales that are
// not finite or whose reciprocal leaves the range.
//
// A quotient by the approximate reciprocal is within 2^-16 of the true one: both are at most 127, and the reciprocal errs by 2^-23 of
// itself. Inputs and scales of 16 bits have at most 11 significant bits, so that a quotient that is not halfway between two whole
// numbers is at least 2^-12 away from it: |2 x - (2 k + 1) scale| is a multiple of the smaller of the two's units. Rounded to 2^-13, what is
// halfway becomes exactly that and nothing else does; rounded to a whole number then, it goes to the even one, as the IEEE
// quotient would. With wider types the code is sure where no half lies that near. The sum with 1.5 * 2^23 leaves it in its low byte.
template <uint32_t IN, uint32_t SCALE>
__device__ __forceinline__ bool round_codes(const float (&x)[8], float scale, uint2& packed) {
    constexpr float kRounder = 12582912.0f;
    constexpr float kFine = 1536.0f;  // a sum with it is a multiple of 2^-13
    constexpr float kLeast = SCALE == kScaleF16 ? 0x1p-24f : 1e-30f;
    const float inverse = ptx::rcp_approx_ftz(fmaxf(scale, kLeast));
    bool is_sure = scale < 1e30f && (SCALE == kScaleF16 || scale == 0.0f || scale >= kLeast);
    uint32_t codes[8];
    float farthest = 0.0f;  // from a whole number
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if constexpr (IN != kFloatF32 && SCALE != kScaleF32) {
            codes[i] = __float_as_uint(__fadd_rn(__fmaf_rn(x[i], inverse, kFine), kRounder - kFine));
        } else {
            const float rounded = __fmaf_rn(x[i], inverse, kRounder);
            farthest = fmaxf(farthest, fabsf(__fmaf_rn(x[i], inverse, -__fsub_rn(rounded, kRounder))));
            codes[i] = __float_as_uint(rounded);
        }
    }
    packed = make_uint2(pack_bytes(codes[0], codes[1], codes[2], codes[3]), pack_bytes(codes[4], codes[5], codes[6], codes[7]));
    return is_sure && farthest < 0.49998f;
}

}  // namespace kv8
