// Floating types chosen at run time: loads to f32, stores from f32 (round to nearest even).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../params/paged_cache.h"

namespace kv8 {

__device__ __forceinline__ float f16_bits_to_f32(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float bf16_bits_to_f32(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ uint32_t float_bytes(uint32_t type) { return type == kFloatF32 ? 4u : 2u; }

// Reads element `idx` of an array of `type`.
__device__ __forceinline__ float load_float(const void* base, uint64_t idx, uint32_t type) {
    if (type == kFloatF32) return static_cast<const float*>(base)[idx];
    const uint32_t bits = static_cast<const uint16_t*>(base)[idx];
    return type == kFloatF16 ? f16_bits_to_f32(bits) : bf16_bits_to_f32(bits);
}

__device__ __forceinline__ void unpack_f16(uint32_t word, float& low, float& high) {
    low = f16_bits_to_f32(word & 0xffffu);
    high = f16_bits_to_f32(word >> 16);
}

__device__ __forceinline__ void unpack_bf16(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}

// 8 consecutive elements from their bytes: `a`, and `b` for f32.
__device__ __forceinline__ void unpack_float8(const uint4& a, const uint4& b, uint32_t type, float (&x)[8]) {
    if (type == kFloatF32) {
        const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(words[i]);
        return;
    }
    const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (type == kFloatF16) {
            unpack_f16(words[i], x[2 * i], x[2 * i + 1]);
        } else {
            unpack_bf16(words[i], x[2 * i], x[2 * i + 1]);
        }
    }
}

// Calls `use(tag)` with the type as a constant: one branch in the place of one an element.
template <uint32_t TYPE>
struct TypeTag {
    static constexpr uint32_t value = TYPE;
};
template <class Use>
__device__ __forceinline__ void with_type(uint32_t type, Use&& use) {
    if (type == kFloatBf16) {
        use(TypeTag<kFloatBf16>{});
    } else if (type == kFloatF16) {
        use(TypeTag<kFloatF16>{});
    } else {
        use(TypeTag<kFloatF32>{});
    }
}

// Reads 8 consecutive elements; `src` is aligned to 16 bytes.
__device__ __forceinline__ void load_float8(const uint8_t* src, uint32_t type, float (&x)[8]) {
    const uint4* vectors = reinterpret_cast<const uint4*>(src);
    unpack_float8(vectors[0], type == kFloatF32 ? vectors[1] : vectors[0], type, x);
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&h);
}

// Writes 4 consecutive elements starting at element `idx` (a multiple of 4) of an array aligned to 16 bytes.
__device__ __forceinline__ void store_float4(void* base, uint64_t idx, uint32_t type, const float (&x)[4]) {
    if (type == kFloatF32) {
        *reinterpret_cast<float4*>(static_cast<float*>(base) + idx) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
        uint2 packed;
        packed.x = type == kFloatF16 ? pack_f16(x[0], x[1]) : pack_bf16(x[0], x[1]);
        packed.y = type == kFloatF16 ? pack_f16(x[2], x[3]) : pack_bf16(x[2], x[3]);
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + idx) = packed;
    }
}

}  // namespace kv8
