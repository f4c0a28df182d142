// The f16 conversions that the kernels use.
#pragma once
#include "cuda.hpp"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};

inline __half __float2half_rn(float x) { return {bits_as<uint16_t>(static_cast<_Float16>(x))}; }
inline float __half2float(__half x) { return static_cast<float>(bits_as<_Float16>(x.bits)); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
