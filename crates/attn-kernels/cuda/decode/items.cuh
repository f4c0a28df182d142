// Stage 1 of the items of a plan (num_shares = 0) with eight warps a CTA: what stage1.cuh does for one head a block.
//
// Block and grid: see wide.cuh; z = worker, which does its items in order. Items that are pieces of one request, end to end and of one
// length (the last may be shorter), a multiple of kTileStride, are a run: the ring goes through from one to the next, and at its end each
// warp leaves its state in the stage that it has just read, for all to merge. The bits of an item depend on its bounds alone.
//
// Only for variants that have a register left for the loop over items.
#pragma once
#include "wide.cuh"

namespace kv8 {

// What is kept of a run of items.
struct KeptRun {
    uint32_t request_idx;
    uint32_t partial_idx;  // of the piece at hand
    uint32_t num_to_end;   // pieces before the last that have not ended
    uint32_t piece_tiles;  // of a warp, in each of these
    uint32_t next_end;     // tiles of a warp up to the end of the piece at hand; 0: it is the last
    uint32_t first_item;
    uint32_t next_item;  // after the run
    uint32_t item_end;   // of the worker
};

// Of its own: KeptRun.
template <class T, int WARPS>
struct Items : Wide<T, WARPS, sizeof(KeptRun)> {
    using Base = Wide<T, WARPS, sizeof(KeptRun)>;
    using typename Base::Arith;
    using typename Base::Range;
    using typename Base::State;
    using Parts = typename Base::Parts;
    using Base::kFours;
    using Base::kTileStride;
    // Whether a state fits a stage, so that a run can go through.
    static constexpr bool kHasRuns = T::kRows * T::kMergePitch * 4 <= T::kStageBytes;
    static_assert(Base::kOwnAt % 16 == 0);

    static __device__ __forceinline__ KeptRun* kept(uint8_t* shared) { return reinterpret_cast<KeptRun*>(shared + Base::kOwnAt); }

    // The run that begins with an item of this worker; every lane looks at one of the items that may belong to it. The first warp keeps
    // what is asked for later.
    static __device__ __forceinline__ Range run_at(const DecodeParams& p, uint8_t* shared, uint32_t item_idx, uint32_t item_end,
                                                   uint32_t& request_idx) {
        const uint32_t lane = threadIdx.x % 32;
        const WorkItem item = Parts::item_at(p, min(item_idx + lane, item_end - 1));
        const uint32_t length = __shfl_sync(kFullWarp, item.token_end - item.token_start, 0);
        request_idx = __shfl_sync(kFullWarp, item.request_idx, 0);
        const uint32_t begin = __shfl_sync(kFullWarp, item.token_start, 0);
        const uint32_t first_partial = __shfl_sync(kFullWarp, item.partial_idx, 0);
        const uint32_t end_before = __shfl_up_sync(kFullWarp, item.token_end, 1);
        const bool goes_on = kHasRuns && lane != 0 && item_idx + lane < item_end && item.request_idx == request_idx &&
                             length % kTileStride == 0 && item.token_start == end_before && end_before == begin + lane * length &&
                             item.partial_idx == first_partial + lane;
        const uint32_t last = __clz(__brev(~__ballot_sync(kFullWarp, goes_on || lane == 0))) - 1;
        const uint32_t tiles = length / kTileStride;
        if (threadIdx.x == 0) {
            *kept(shared) =
                KeptRun{request_idx, item.partial_idx, last, tiles, last == 0 ? 0 : tiles, item_idx, item_idx + last + 1, item_end};
        }
        static_assert(T::kQueryInShared);  // there is a barrier in the making of the queries
        return {begin, __shfl_sync(kFullWarp, item.token_end, last)};
    }

    // Ends the pieces of a run while the ring is under way.
    struct Pieces {
        static constexpr bool kMany = kHasRuns;
        const DecodeParams& p;
        uint8_t* shared;

        // Looked up, rather than kept in a register through the tiles.
        __device__ __forceinline__ bool ends_with(uint32_t tile) const {
            return *const_cast<volatile uint32_t*>(&kept(shared)->next_end) == tile + 1;
        }

        __device__ __forceinline__ void hand_over(const Arith& arith, const State& state, uint32_t offset) {
            const KeptRun now = *kept(shared);
            Base::hand_over(shared, offset, arith, state);
            __syncthreads();
            const QueryRows rows(p, ptx::block_x(), T::kRows);
            const uint32_t num_elements = Parts::rows_of(rows) * kFours;
            for (uint32_t idx = threadIdx.x; idx < num_elements; idx += WARPS * 32) {
                float x[4];
                const RowState merged = Base::merge_warps(shared, offset, idx, x);
                write_partial(p, rows, now.partial_idx, idx, merged, x);
            }
            if (threadIdx.x == 0) {
                kept(shared)->partial_idx = now.partial_idx + (mutant(28) ? 0 : 1);
                kept(shared)->num_to_end = now.num_to_end - 1;
                kept(shared)->next_end = now.num_to_end > 1 ? now.next_end + now.piece_tiles : 0;
            }
            ptx::fence_before_bulk_copies();
            __syncthreads();  // the stage may be filled again
        }
    };

    static __device__ __forceinline__ void run(const DecodeParams& p, uint8_t* shared) {
        if (p.ready == kReadyNothing) ptx::wait_for_previous();
        const uint32_t* worker_starts = reinterpret_cast<const uint32_t*>(p.worker_starts) + ptx::block_z();
        const uint32_t first_item = worker_starts[0];
        const uint32_t item_end = worker_starts[1];
        if (first_item == item_end) {
            ptx::wait_for_previous();
            return;
        }
        // The step that follows is stage 2, whose blocks may take what room there is.
        ptx::launch_dependents();
        uint32_t request_idx;
        Range range = run_at(p, shared, first_item, item_end, request_idx);
        uint32_t lane = threadIdx.x % 32;
        uint32_t warp = threadIdx.x / 32;
        RunLoader<T>::open_barriers(ptx::shared_address(shared + Base::kBarriersAt) + warp * T::kNumStages * 8, lane);
        Arith arith(p, lane, shared + warp * T::kWarpBytes, shared + Base::kQueryAt);
        State state;
        bool first = true;
        bool again = false;
        uint32_t phases = 0;
        const auto before_queries = [&] {
            const QueryRows rows(p, ptx::block_x(), T::kRows);
            const uint32_t thread = ptx::thread_x();
            if (first && thread < Parts::rows_of(rows) * kFours) {
                ptx::prefetch_line(Base::out_at(p, Base::target_of(p, rows, request_idx, thread)));
            }
            first = false;
        };
        while (true) {
            // Worked out anew for each run, so that nothing of it is kept through the tiles of the one before.
            const uint32_t thread = ptx::thread_x();
            lane = thread % 32;
            warp = thread / 32;
            if constexpr (T::kHeadDim == 128) ptx::keep(lane);
            Base::template attend<false>(
                p, shared, lane, warp, range, [&] { return request_idx; }, first, again, phases, arith, state, before_queries,
                Pieces{p, shared});
            Base::hand_over(shared, 0, arith, state);
            // One warp that was careless sends all back: there is a barrier in the making of the queries.
            const bool repeats = Base::kMayRepeat ? __syncthreads_or(again) != 0 : (__syncthreads(), false);
            if (repeats) {
                ptx::fence_before_bulk_copies();
                __syncwarp();
            } else {
                merge(p, shared);
                if (kept(shared)->next_item == kept(shared)->item_end) break;
                again = false;
                ptx::fence_before_bulk_copies();
                __syncthreads();  // the rings may be filled again
            }
            // Read again rather than kept through the tiles.
            const KeptRun now = *kept(shared);
            __syncthreads();
            range = run_at(p, shared, repeats ? now.first_item : now.next_item, now.item_end, request_idx);
        }
    }

    // The last piece of a run.
    static __device__ __forceinline__ void merge(const DecodeParams& p, uint8_t* shared) {
        const uint32_t request_idx = kept(shared)->request_idx;
        const uint32_t partial_idx = kept(shared)->partial_idx;
        const QueryRows rows(p, ptx::block_x(), T::kRows);
        for (uint32_t idx = threadIdx.x; idx < Parts::rows_of(rows) * kFours; idx += WARPS * 32) {
            float x[4];
            if (partial_idx != kNoPartial) {
                write_partial(p, rows, partial_idx, idx, Base::merge_warps(shared, 0, idx, x), x);
            } else {
                const typename Base::Target target = Base::target_of(p, rows, request_idx, idx);
                Base::write(p, target, Base::merge_warps(shared, 0, idx, x), x);
            }
        }
    }

    static __device__ __forceinline__ void write_partial(const DecodeParams& p, const QueryRows& rows, uint32_t partial_idx, uint32_t idx,
                                                         const RowState& state, const float (&x)[4]) {
        if (partial_idx >= p.partial_capacity) return;
        const uint64_t index = rows.partial_index(p, partial_idx, rows.first() + idx / kFours);
        store_float4(reinterpret_cast<void*>(p.partial_o), index * T::kHeadDim + idx % kFours * 4, kFloatF32, x);
        if (idx % kFours == 0) reinterpret_cast<float2*>(p.partial_ml)[index] = make_float2(state.m, state.l);
    }
};

template <int MIN_CTAS, int HEAD_DIM, Groups GROUPS, Scales SCALES, int ROW_TILES, Arithmetic ARITHMETIC, int NUM_STAGES>
using ItemsOf = Items<WideTraits<MIN_CTAS, HEAD_DIM, GROUPS, SCALES, ROW_TILES, ARITHMETIC, NUM_STAGES>, kWideWarps>;

}  // namespace kv8
