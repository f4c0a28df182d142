// Reads what stage 1 reads, the same way, and computes nothing: the floor of stage 1 in practice.
//
// Grid and block as stage 1 with one block of query rows. `out` is never written unless num_workers is 2^32 - 1 (it is not:
// the store only keeps the copies from being optimized away).
#pragma once
#include "../cache/tile_loader.cuh"
#include "../params/decode.h"
#include "traits.cuh"

namespace kv8 {

template <class T>
__device__ __forceinline__ void read_items(const DecodeParams& p, uint8_t* shared) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t kv_head = blockIdx.x % p.cache.num_kv_heads;
    const uint32_t worker = blockIdx.x / p.cache.num_kv_heads;
    const uint32_t* worker_starts = reinterpret_cast<const uint32_t*>(p.worker_starts);
    const WorkItem* items = reinterpret_cast<const WorkItem*>(p.items);
    const uint8_t* ring = shared + warp * T::kWarpBytes;
    const uint32_t ring_address = ptx::shared_address(ring);
    TileLoader<T> loader(p.cache, kv_head, lane);
    uint32_t folded = 0;
    for (uint32_t item_idx = worker_starts[worker]; item_idx < worker_starts[worker + 1]; ++item_idx) {
        const WorkItem item = items[item_idx];
        const uint32_t item_tiles = (item.token_end - item.token_start + kTileTokens - 1) / kTileTokens;
        const uint32_t num_tiles = item_tiles > warp ? (item_tiles - warp + kWarps - 1) / kWarps : 0;
        loader.begin(page_row(p.cache, item.request_idx), item.token_start + warp * kTileTokens + (lane & 15), item.token_end);
        loader.page = loader.read_page(loader.position);
        for (uint32_t tile = 0; tile < num_tiles + T::kNumStages; ++tile) {
            const uint32_t slot = tile % T::kNumStages;
            if (tile >= T::kNumStages) {
                ptx::cp_async_wait<T::kNumStages - 1>();
                __syncwarp();
                folded ^= *reinterpret_cast<const uint32_t*>(ring + slot * T::kStageBytes + lane * 16);
                __syncwarp();
            }
            if (tile < num_tiles) {
                loader.locate();
                loader.copy_k(ring_address + slot * T::kStageBytes, lane);
                loader.copy_v(ring_address + slot * T::kStageBytes, lane);
                loader.page = loader.read_page(loader.position);
            }
            ptx::cp_async_commit();
        }
    }
    if (p.num_workers == 0xffffffffu) reinterpret_cast<uint32_t*>(p.out)[blockIdx.x * kNumThreads + threadIdx.x] = folded;
}

}  // namespace kv8
