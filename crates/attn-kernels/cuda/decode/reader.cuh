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
__device__ __forceinline__ void fill(TileLoader<T>& loader, uint32_t slot, uint32_t stage, uint32_t lane) {
    loader.locate(lane & 15);
    loader.fill_k(slot, stage, lane);
    loader.fill_v(slot, stage, lane);
}

template <class T>
__device__ __forceinline__ void read_items(const DecodeParams& p, uint8_t* shared) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t token_warps = blockDim.x / 32;
    const uint32_t head_blocks = p.cache.num_kv_heads >> (__ffs(blockDim.y) - 1);
    const uint32_t kv_head = blockIdx.x % head_blocks * blockDim.y + threadIdx.y;
    const uint32_t worker = blockIdx.x / head_blocks;
    const uint32_t* worker_starts = reinterpret_cast<const uint32_t*>(p.worker_starts);
    const WorkItem* items = reinterpret_cast<const WorkItem*>(p.items);
    const uint32_t ring_idx = threadIdx.y * token_warps + warp;
    uint8_t* ring = shared + ring_idx * T::kWarpBytes;
    const uint32_t ring_address = ptx::shared_address(ring);
    const uint32_t barriers = ptx::shared_address(shared + T::kBarriersAt) + ring_idx * T::kNumStages * 16;
    TileLoader<T> loader(p.cache, kv_head, lane, token_warps * kTileTokens, barriers);
    uint32_t folded = 0;
    for (uint32_t item_idx = worker_starts[worker]; item_idx < worker_starts[worker + 1]; ++item_idx) {
        const WorkItem item = items[item_idx];
        const uint32_t item_tiles = (item.token_end - item.token_start + kTileTokens - 1) / kTileTokens;
        const uint32_t num_tiles = item_tiles > warp ? (item_tiles - warp + token_warps - 1) / token_warps : 0;
        loader.begin(page_row(p.cache, item.request_idx), item.token_start + warp * kTileTokens + (lane & 15), item.token_end);
        loader.read_first_pages(ring, lane);
#pragma unroll 1
        for (uint32_t i = 0; i < T::kNumStages; ++i) {
            if (i < num_tiles) {
                loader.page = loader.stage_page(ring + i * T::kStageBytes, lane);
                __syncwarp();
                fill(loader, i, ring_address + i * T::kStageBytes, lane);
            }
            ptx::cp_async_commit();
        }
        uint32_t slot = 0;
        for (uint32_t tile = 0; tile < num_tiles; ++tile) {
            const uint8_t* stage = ring + slot * T::kStageBytes;
            ptx::cp_async_wait<T::kNumStages - 1>();
            if (loader.run_slots >> slot & 1) {
                loader.wait_for_run(slot, 0);
                loader.wait_for_run(slot, 1);
                loader.phases ^= 1u << slot;
            }
            __syncwarp();
            folded ^= *reinterpret_cast<const uint32_t*>(stage + lane * 16);
            loader.page = loader.stage_page(stage, lane);
            __syncwarp();
            if (tile + T::kNumStages < num_tiles) fill(loader, slot, ring_address + slot * T::kStageBytes, lane);
            ptx::cp_async_commit();
            slot = slot + 1 == T::kNumStages ? 0 : slot + 1;
        }
    }
    if (p.num_workers == 0xffffffffu) reinterpret_cast<uint32_t*>(p.out)[blockIdx.x * kNumThreads + threadIdx.x] = folded;
}

}  // namespace kv8
