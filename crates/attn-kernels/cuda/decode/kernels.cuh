// How a row of instances.toml becomes a kernel. The files in instances/ are written by dev/instances.py from that table.
#pragma once
#include "items.cuh"
#include "reader.cuh"
#include "shares.cuh"
#include "stage1.cuh"

// A row names the shared memory that the host must ask for; it is checked here against what the variant uses.
#define KV8_STAGE1(SYMBOL, SHARED_BYTES, MIN_CTAS, ...)                                                                   \
    static_assert(kv8::Traits<__VA_ARGS__, MIN_CTAS>::kSharedBytes == (SHARED_BYTES), "shared_bytes of instances.toml");    \
    extern "C" __global__ void __launch_bounds__(kv8::kNumThreads, MIN_CTAS)                                              \
        SYMBOL(const __grid_constant__ kv8::DecodeParams p) {                                                             \
        extern __shared__ __align__(128) uint8_t shared[];                                                                \
        kv8::Stage1<kv8::Traits<__VA_ARGS__, MIN_CTAS>>::run(p, shared);                                                  \
    }

// Eight warps a CTA.
#define KV8_SHARES(SYMBOL, SHARED_BYTES, MIN_CTAS, ...)                                                                   \
    static_assert(kv8::SharesOf<MIN_CTAS, __VA_ARGS__>::kSharedBytes == (SHARED_BYTES), "shared_bytes of instances.toml");  \
    extern "C" __global__ void __launch_bounds__(kv8::kWideWarps * 32, MIN_CTAS)                                         \
        SYMBOL(const __grid_constant__ kv8::DecodeParams p) {                                                             \
        extern __shared__ __align__(128) uint8_t shared[];                                                                \
        kv8::SharesOf<MIN_CTAS, __VA_ARGS__>::run(p, shared);                                                             \
    }

#define KV8_ITEMS(SYMBOL, SHARED_BYTES, MIN_CTAS, ...)                                                                   \
    static_assert(kv8::ItemsOf<MIN_CTAS, __VA_ARGS__>::kSharedBytes == (SHARED_BYTES), "shared_bytes of instances.toml");  \
    extern "C" __global__ void __launch_bounds__(kv8::kWideWarps * 32, MIN_CTAS)                                         \
        SYMBOL(const __grid_constant__ kv8::DecodeParams p) {                                                             \
        extern __shared__ __align__(128) uint8_t shared[];                                                                \
        kv8::ItemsOf<MIN_CTAS, __VA_ARGS__>::run(p, shared);                                                             \
    }

#define KV8_READER(SYMBOL, SHARED_BYTES, MIN_CTAS, ...)                                                                   \
    static_assert(kv8::Traits<__VA_ARGS__, MIN_CTAS>::kSharedBytes == (SHARED_BYTES), "shared_bytes of instances.toml");    \
    extern "C" __global__ void __launch_bounds__(kv8::kNumThreads, MIN_CTAS)                                              \
        SYMBOL(const __grid_constant__ kv8::DecodeParams p) {                                                             \
        extern __shared__ __align__(128) uint8_t shared[];                                                                \
        kv8::read_items<kv8::Traits<__VA_ARGS__, MIN_CTAS>>(p, shared);                                                   \
    }
