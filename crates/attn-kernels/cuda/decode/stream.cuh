// Plain streams over memory: what the device can read, and copy, with nothing else to do.
// Grid: any; block: 512 threads. Each CTA walks chunks of kChunk vectors, grid-strided.
#pragma once
#include "../common/ptx.cuh"
#include "../params/stream.h"

namespace kv8 {

constexpr int kStreamThreads = 512;
constexpr int kVectorsPerThread = 8;

__device__ __forceinline__ void stream_read(const StreamParams& p) {
    const uint4* src = reinterpret_cast<const uint4*>(p.src);
    const uint64_t chunk = kStreamThreads * kVectorsPerThread;
    uint32_t folded = 0;
    for (uint64_t base = blockIdx.x * chunk; base + chunk <= p.num_vectors; base += gridDim.x * chunk) {
        uint4 v[kVectorsPerThread];
#pragma unroll
        for (int i = 0; i < kVectorsPerThread; ++i) v[i] = ptx::load_streaming(src + base + i * kStreamThreads + threadIdx.x);
#pragma unroll
        for (int i = 0; i < kVectorsPerThread; ++i) folded ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (p.num_vectors == ~0ull) *reinterpret_cast<uint32_t*>(p.dst) = folded;
}

__device__ __forceinline__ void stream_copy(const StreamParams& p) {
    const uint4* src = reinterpret_cast<const uint4*>(p.src);
    uint4* dst = reinterpret_cast<uint4*>(p.dst);
    const uint64_t chunk = kStreamThreads * kVectorsPerThread;
    for (uint64_t base = blockIdx.x * chunk; base + chunk <= p.num_vectors; base += gridDim.x * chunk) {
        uint4 v[kVectorsPerThread];
#pragma unroll
        for (int i = 0; i < kVectorsPerThread; ++i) v[i] = ptx::load_streaming(src + base + i * kStreamThreads + threadIdx.x);
#pragma unroll
        for (int i = 0; i < kVectorsPerThread; ++i) dst[base + i * kStreamThreads + threadIdx.x] = v[i];
    }
}

}  // namespace kv8
