// What CUDA C++ adds to C++, as far as the kernels use it, for a compiler of CPUs. Included before every kernel source.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../runtime/thread.hpp"

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline)) inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// Of one block at a time: blocks that share a processor of the machine follow each other.
#define __shared__ static thread_local

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

#define threadIdx (kv8::emulated::current->index)
#define blockIdx (kv8::emulated::current->block->index)
#define blockDim (kv8::emulated::current->block->cluster->block_shape)
#define gridDim (kv8::emulated::current->block->cluster->grid)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
constexpr auto min(A a, B b) -> std::common_type_t<A, B> {
    return b < a ? b : a;
}
template <class A, class B>
constexpr auto max(A a, B b) -> std::common_type_t<A, B> {
    return a < b ? b : a;
}

template <class To, class From>
inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __int_as_float(int32_t x) { return bits_as<float>(x); }
inline int32_t __float_as_int(float x) { return bits_as<int32_t>(x); }

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __brev(uint32_t x) {
    uint32_t y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t y = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t which = selector >> (4 * i) & 15;
        uint32_t byte = static_cast<uint32_t>(both >> (8 * (which & 7))) & 0xff;
        if ((which & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
        y |= byte << (8 * i);
    }
    return y;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max(a & 0xffff0000u, b & 0xffff0000u) | max(a & 0xffffu, b & 0xffffu); }

// Rounded to nearest even each, never fused unless said: the compiler is told so too.
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float x) {
    if (!(x > -2147483648.0f)) return x != x ? 0 : INT32_MIN;
    return x >= 2147483648.0f ? INT32_MAX : static_cast<int>(std::nearbyintf(x));
}

template <class T>
inline T __ldg(const T* at) {
    return *at;
}
template <class T>
inline T __ldcg(const T* at) {
    return *at;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint32_t atomicAdd(uint32_t* at, uint32_t x) { return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST); }
inline uint32_t atomicCAS(uint32_t* at, uint32_t expected, uint32_t wanted) {
    __atomic_compare_exchange_n(at, &expected, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
inline uint32_t atomicInc(uint32_t* at, uint32_t last) {
    uint32_t before = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(at, &before, before >= last ? 0 : before + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return before;
}

// ---- of a warp ----

namespace kv8::emulated {

// Words 0 and 1: a value of up to 8 bytes; word 2: the lane, or the lanes to cross or to go up; word 3: lanes of a segment.
void shuffle_from(const LaneOperands&, LaneOperands&, uint32_t);
void shuffle_xor(const LaneOperands&, LaneOperands&, uint32_t);
void shuffle_up(const LaneOperands&, LaneOperands&, uint32_t);
void ballot(const LaneOperands&, LaneOperands&, uint32_t);
void only_meet(const LaneOperands&, LaneOperands&, uint32_t);

template <class T>
inline T shuffle(Combine combine, uint32_t mask, T x, uint32_t by, uint32_t width) {
    static_assert(sizeof(T) <= 8);
    Operands mine{};
    std::memcpy(mine.words, &x, sizeof x);
    mine.words[2] = by, mine.words[3] = width;
    const Operands got = meet_lanes(combine, mask, mine);
    std::memcpy(&x, got.words, sizeof x);
    return x;
}

inline uint32_t vote(uint32_t mask, bool x) {
    Operands mine{};
    mine.words[0] = x;
    return meet_lanes(ballot, mask, mine).words[0];
}

}  // namespace kv8::emulated

template <class T>
inline T __shfl_sync(uint32_t mask, T x, uint32_t lane, uint32_t width = 32) {
    return kv8::emulated::shuffle(kv8::emulated::shuffle_from, mask, x, lane, width);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T x, uint32_t lanes, uint32_t width = 32) {
    return kv8::emulated::shuffle(kv8::emulated::shuffle_xor, mask, x, lanes, width);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T x, uint32_t lanes, uint32_t width = 32) {
    return kv8::emulated::shuffle(kv8::emulated::shuffle_up, mask, x, lanes, width);
}
inline uint32_t __ballot_sync(uint32_t mask, bool x) { return kv8::emulated::vote(mask, x); }
inline bool __any_sync(uint32_t mask, bool x) { return kv8::emulated::vote(mask, x) != 0; }
inline bool __all_sync(uint32_t mask, bool x) { return kv8::emulated::vote(mask, !x) == 0; }
inline void __syncwarp(uint32_t mask = ~0u) { kv8::emulated::meet_lanes(kv8::emulated::only_meet, mask, {}); }
inline void __syncthreads() { kv8::emulated::meet_block(false); }
inline bool __syncthreads_or(bool x) { return kv8::emulated::meet_block(x); }
