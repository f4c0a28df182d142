// Reads what stage 1 reads, the same way, and computes nothing: the floor of stage 1 in practice.
//
// Grid and block as stage 1 with one block of query rows. `out` is never written unless num_workers is 2^32 - 1 (it is not:
// the store only keeps the copies from being optimized away).
#pragma once
#include "../cache/block_loader.cuh"
#include "../cache/row_loader.cuh"
#include "../cache/run_loader.cuh"
#include "../params/decode.h"
#include "ready.cuh"
#include "traits.cuh"

namespace kv8 {

template <class T, class Loader>
__device__ __forceinline__ uint32_t read_share(Loader& loader, const int32_t* pages, uint32_t first_token, uint32_t token_end,
                                               uint32_t num_tiles, bool wait, uint32_t history) {
    const auto ignore = [](uint32_t, int32_t) {};
    uint32_t folded = 0;
    loader.begin(pages, first_token, token_end);
    uint32_t stage = 0;
    if (wait) {
        const uint32_t num_early = tiles_before<T>(first_token, loader.tile_stride, num_tiles, history);
#pragma unroll 1
        for (; stage < num_early; ++stage) {
            loader.fill(stage, stage * T::kStageBytes, ignore);
            loader.commit();
        }
        loader.prefetch_first_tiles(num_early, num_tiles);
        ptx::wait_for_previous();
    }
#pragma unroll 1
    for (; stage < T::kNumStages; ++stage) {
        if (stage < num_tiles) loader.fill(stage, stage * T::kStageBytes, ignore);
        loader.commit();
    }
    uint32_t slot = 0;
#pragma unroll 1
    for (uint32_t tile = 0; tile < num_tiles; ++tile) {
        loader.wait(slot);
        __syncwarp();
        if (Loader::kInStep && tile != 0) {
            const uint32_t before = slot == 0 ? T::kNumStages - 1 : slot - 1;
            if (tile - 1 + T::kNumStages < num_tiles) loader.fill(before, before * T::kStageBytes, ignore);
            loader.commit();
        }
        folded ^= *reinterpret_cast<const uint32_t*>(loader.ring + slot * T::kStageBytes + loader.lane * 16);
        __syncwarp();
        loader.done(slot);
        if (!Loader::kInStep) {
            if (tile + T::kNumStages < num_tiles) loader.fill(slot, slot * T::kStageBytes, ignore);
            loader.commit();
        }
        slot = slot + 1 == T::kNumStages ? 0 : slot + 1;
    }
    return folded;
}

template <class T>
__device__ __forceinline__ void read_items(const DecodeParams& p, uint8_t* shared) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t token_warps = blockDim.x / 32;
    const uint32_t kv_head = blockIdx.x * blockDim.y + threadIdx.y;
    const uint32_t worker = blockIdx.z;
    ptx::launch_dependents();
    const bool early = p.ready != kReadyNothing;
    if (!early) ptx::wait_for_previous();
    const uint32_t* worker_starts = reinterpret_cast<const uint32_t*>(p.worker_starts);
    const WorkItem* items = reinterpret_cast<const WorkItem*>(p.items);
    const uint32_t first_item = worker_starts[worker];
    const uint32_t item_end = worker_starts[worker + 1];
    const uint32_t ring_idx = threadIdx.y * token_warps + warp;
    uint8_t* ring = shared + ring_idx * T::kWarpBytes;
    const uint32_t barriers = ptx::shared_address(shared + T::kBarriersAt) + ring_idx * T::kNumStages * 8;
    const bool has_runs = RunLoader<T>::serves(p.cache);
    RunLoader<T>::open_barriers(barriers, lane);
    RunLoader<T> run_loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring, barriers, 0);
    RowLoader<T> row_loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring);
    uint32_t folded = 0;
    if (first_item == item_end) ptx::wait_for_previous();
#pragma unroll 1
    for (uint32_t item_idx = first_item; item_idx < item_end; ++item_idx) {
        const WorkItem item = items[item_idx];
        const uint32_t item_tiles = (item.token_end - item.token_start + kTileTokens - 1) / kTileTokens;
        const uint32_t num_tiles = item_tiles > warp ? (item_tiles - warp + token_warps - 1) / token_warps : 0;
        const uint32_t first_token = item.token_start + warp * kTileTokens;
        const int32_t* pages = page_row(p.cache, item.request_idx);
        const bool wait = early && item_idx == first_item;
        const uint32_t history = wait ? complete_tokens(p, reinterpret_cast<const uint32_t*>(p.kv_lens)[item.request_idx]) : 0;
        if (has_runs && first_token % kTileTokens == 0) {
            folded ^= read_share<T>(run_loader, pages, first_token, item.token_end, num_tiles, wait, history);
        } else if (T::kBlocks && first_token % kTileTokens == 0 && BlockLoader<T>::serves(p.cache)) {
            if constexpr (T::kBlocks) {
                BlockLoader<T> loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring);
                folded ^= read_share<T>(loader, pages, first_token, item.token_end, num_tiles, wait, history);
            }
        } else if (RowLoader<T, true>::serves()) {
            __syncthreads();  // the rings are read
            RowLoader<T, true> loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring);
            folded ^= read_share<T>(loader, pages, first_token, item.token_end, num_tiles, wait, history);
        } else {
            ptx::fence_before_bulk_copies();
            folded ^= read_share<T>(row_loader, pages, first_token, item.token_end, num_tiles, wait, history);
        }
    }
    if (p.gqa_group == 0xffffffffu) reinterpret_cast<uint32_t*>(p.out)[blockIdx.z * kNumThreads + threadIdx.x] = folded;
}

}  // namespace kv8
