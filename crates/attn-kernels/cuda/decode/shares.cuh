// Stage 1 with eight warps a CTA: requests in shares (num_shares > 0), or the items of a plan (num_shares = 0; variants of groups of 8). The same tiles by the same warps' code as stage1.cuh; around them nothing but what these need, so that it fits 128
// registers.
//
// Block: x = 32 * WARPS, all on the tokens of one kv head. Grid: x = kv head, y = block of T::kRows query rows.
// Shares: z = request * num_shares + rank, in clusters of num_shares along z. CTA `rank` takes share `rank` of the request's tokens
// (inbox.cuh says how they are cut and merged); warp w its tiles w, w + WARPS, ...
// Items: z = worker, which does its items in order. Items that are pieces of one request, end to end and of one length (the last may be
// shorter), a multiple of kTileStride, are a run: the ring goes through from one to the next, and at its end each warp leaves its state in the
// stage that it has just read, for all to merge. The bits of an item depend on its bounds alone.
//
// What a lone step waits for, in order: the kernel before, the queries, a tile, the other warps, the other CTAs. Everything that does not
// depend on them is done before: addresses, first tiles (where the history is ready), where to send and where to write.
#pragma once
#include "stage1.cuh"

namespace kv8 {

constexpr int kShareWarps = 8;

template <class T, int WARPS>
struct Shares {
    using Parts = Stage1<T>;
    using Arith = typename Parts::Arith;
    using State = typename Parts::State;
    static constexpr uint32_t kFours = T::kHeadDim / 4;
    static constexpr uint32_t kTileStride = WARPS * kTileTokens;
    static constexpr bool kMayRepeat = T::kArithmetic == Arithmetic::kMma && !T::kAlwaysNormalize && !T::kLooksFirst;

    // Shared memory: the rings, and in each, when its tiles are done, the warp's out; the warps' states; the queries, where they are
    // kept there; where each element goes; the barriers of bulk copies; what is kept of a run;
    // the inbox.
    static constexpr int kStatesAt = WARPS * T::kWarpBytes;                      // float4 [WARPS][kRows]
    static constexpr int kQueryAt = kStatesAt + WARPS * T::kRows * 16;           // as in Traits
    static constexpr int kAddressesAt = kQueryAt + T::kQueryBytes;               // uint2 [kRows * kFours]
    static constexpr int kBarriersAt = kAddressesAt + T::kRows * kFours * 8;     // u64 [WARPS][kNumStages]
    static constexpr int kKeptAt = kBarriersAt + WARPS * T::kNumStages * 8;
    static constexpr int kSharedBytes = round_up(kKeptAt + 32, 16);
    static_assert(T::kRows * T::kMergePitch * 4 <= T::kWarpBytes);
    // Whether this variant takes items: others have no register left for the loop over them. And whether a state fits a stage, so that a run of
    // items can go through.
    static constexpr bool kTakesItems = T::kGroups == Groups::k8 && T::kHeadDim != 96;
    static constexpr bool kHasRuns = kTakesItems && T::kRows * T::kMergePitch * 4 <= T::kStageBytes;
    using SharesInbox = Inbox<T::kHeadDim, kSharedBytes>;

    struct Range {
        uint32_t start;
        uint32_t end;
    };

    // What is kept of a run of items.
    struct Kept {
        uint32_t request_idx;
        uint32_t partial_idx;  // of the piece at hand
        uint32_t num_to_end;   // pieces before the last that have not ended
        uint32_t piece_tiles;  // of a warp, in each of these
        uint32_t next_end;     // tiles of a warp up to the end of the piece at hand; 0: it is the last
        uint32_t first_item;
        uint32_t next_item;    // after the run
        uint32_t item_end;     // of the worker
    };
    static_assert(sizeof(Kept) == 32);

    static __device__ __forceinline__ Kept* kept(uint8_t* shared) { return reinterpret_cast<Kept*>(shared + kKeptAt); }

    // The run that begins with an item of this worker; every lane looks at one of the items that may belong to it. The first warp keeps
    // what is asked for later.
    static __device__ __forceinline__ Range run_at(const DecodeParams& p, uint8_t* shared, uint32_t item_idx, uint32_t item_end, uint32_t& request_idx) {
        const uint32_t lane = threadIdx.x % 32;
        const WorkItem item = Parts::item_at(p, min(item_idx + lane, item_end - 1));
        const uint32_t length = __shfl_sync(kFullWarp, item.token_end - item.token_start, 0);
        request_idx = __shfl_sync(kFullWarp, item.request_idx, 0);
        const uint32_t begin = __shfl_sync(kFullWarp, item.token_start, 0);
        const uint32_t first_partial = __shfl_sync(kFullWarp, item.partial_idx, 0);
        const uint32_t end_before = __shfl_up_sync(kFullWarp, item.token_end, 1);
        const bool goes_on = kHasRuns && lane != 0 && item_idx + lane < item_end && item.request_idx == request_idx && length % kTileStride == 0 &&
                             item.token_start == end_before && end_before == begin + lane * length && item.partial_idx == first_partial + lane;
        const uint32_t last = __clz(__brev(~__ballot_sync(kFullWarp, goes_on || lane == 0))) - 1;
        const uint32_t tiles = length / kTileStride;
        if (threadIdx.x == 0) {
            *kept(shared) = Kept{request_idx, item.partial_idx, last, tiles, last == 0 ? 0 : tiles, item_idx, item_idx + last + 1, item_end};
        }
        static_assert(!kTakesItems || T::kQueryInShared);  // there is a barrier in the making of the queries
        return {begin, __shfl_sync(kFullWarp, item.token_end, last)};
    }

    // The share of this CTA; as Stage1::share_of, with one division.
    static __device__ __forceinline__ Range share_of(const DecodeParams& p, uint32_t kv_len) {
        const uint32_t seen = p.q_len + p.window - 1;
        const uint32_t start = p.window != 0 && kv_len > seen ? kv_len - seen : 0;
        const uint32_t first_tile = start / kShareTile;
        const uint32_t num_tiles = (kv_len + kShareTile - 1) / kShareTile - first_tile;
        uint32_t from = 0, to = num_tiles;
        if (p.num_shares > 1) {
            const uint32_t rank = ptx::cluster_rank();
            const uint32_t each = num_tiles / p.num_shares;
            const uint32_t rest = num_tiles - each * p.num_shares;
            from = each * rank + small_quotient(rest * rank, p.num_shares);
            to = each * (rank + 1) + small_quotient(rest * (rank + 1), p.num_shares);
        }
        const uint32_t token_start = min(max((first_tile + from) * kShareTile, start), kv_len);
        return {token_start, max(min((first_tile + to) * kShareTile, kv_len), token_start)};
    }

    // Where a thread writes what it merges last.
    struct Target {
        uint64_t element;  // of out
        uint64_t row;      // of lse
        uint32_t head;
    };

    static __device__ __forceinline__ Target target_of(const DecodeParams& p, const QueryRows& rows, uint32_t request_idx, uint32_t idx) {
        const uint32_t row = rows.first() + idx / kFours;
        const uint64_t index = rows.index(p, request_idx, row);
        Target target{index * T::kHeadDim + idx % kFours * 4, idx % kFours == 0 ? index : ~0ull, rows.head(row)};
        ptx::keep(target.element);
        ptx::keep(target.row);
        ptx::keep(target.head);
        return target;
    }

    static __device__ __forceinline__ const uint8_t* out_at(const DecodeParams& p, const Target& target) {
        return reinterpret_cast<const uint8_t*>(p.out) + target.element * float_bytes(p.out_type);
    }

    static __device__ __forceinline__ void write(const DecodeParams& p, const Target& target, const RowState& state, float (&x)[4]) {
        const RowResult result = finish_row(state, p, target.head);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] *= result.factor;
        store_float4(reinterpret_cast<void*>(p.out), target.element, p.out_type, x);
        if (p.lse != 0 && target.row != ~0ull) reinterpret_cast<float*>(p.lse)[target.row] = result.lse;
    }

    static __device__ __forceinline__ void write_partial(const DecodeParams& p, const QueryRows& rows, uint32_t partial_idx, uint32_t idx,
                                                         const RowState& state, const float (&x)[4]) {
        if (partial_idx >= p.partial_capacity) return;
        const uint64_t index = rows.partial_index(p, partial_idx, rows.first() + idx / kFours);
        store_float4(reinterpret_cast<void*>(p.partial_o), index * T::kHeadDim + idx % kFours * 4, kFloatF32, x);
        if (idx % kFours == 0) reinterpret_cast<float2*>(p.partial_ml)[index] = make_float2(state.m, state.l);
    }

    // Element idx of the CTA's result: its warps merged, in their order. Their outs lie at `offset` of their rings.
    static __device__ __forceinline__ RowState merge_warps(const uint8_t* shared, uint32_t offset, uint32_t idx, float (&x)[4]) {
        const uint32_t row = idx / kFours;
        const float4* states = reinterpret_cast<const float4*>(shared + kStatesAt) + row;
        const uint8_t* outs = shared + offset + (row * T::kMergePitch + idx % kFours * 4) * 4;
        constexpr int kMerged = mutant(4) ? WARPS - 1 : WARPS;
        float4 s[WARPS];
        RowState merged{-CUDART_INF_F, 0.0f};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            s[w] = states[w * T::kRows];
            if (s[w].y > 0.0f) merged.m = fmaxf(merged.m, s[w].x);
        }
        x[0] = x[1] = x[2] = x[3] = 0.0f;
#pragma unroll
        for (int w = 0; w < kMerged; ++w) {
            const float4 o = *reinterpret_cast<const float4*>(outs + w * T::kWarpBytes);
            const float fall = s[w].x - merged.m;
            const bool any = s[w].y > 0.0f;
            const float weight = mutant(5) ? 1.0f : ptx::ex2_approx(fall);
            merged.l += any ? s[w].y * weight : 0.0f;
            float half = 1.0f;
            float factor = weight;
            if constexpr (T::kAlwaysNormalize) {
                // In two halves: the exponents may lie further apart than one f32 can bridge.
                half = mutant(5) ? 1.0f : ptx::ex2_approx(0.5f * fminf(fmaxf(fall + s[w].z, -250.0f), 250.0f));
                factor = half;
            }
            const float four[4] = {o.x, o.y, o.z, o.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] += any ? four[i] * factor * half : 0.0f;
        }
        return merged;
    }

    static __device__ __forceinline__ void run(const DecodeParams& p, uint8_t* shared) {
        uint32_t lane = threadIdx.x % 32;
        uint32_t warp = threadIdx.x / 32;
        // Others have no register for it; with items it is done anew for each run.
        if constexpr (!kTakesItems && T::kHeadDim == 128 && T::kGroups != Groups::k16Up) ptx::keep(lane);
        if (p.ready == kReadyNothing) ptx::wait_for_previous();
        const bool by_items = kTakesItems && p.num_shares == 0;
        const auto request_of_share = [&] { return p.num_shares > 1 ? ptx::cluster_z() : ptx::block_z(); };
        uint32_t request_idx = 0;  // of the items
        const auto request = [&] { return by_items ? request_idx : request_of_share(); };
        const auto read_kv_len = [&] { return reinterpret_cast<const uint32_t*>(p.kv_lens)[request_of_share()]; };
        uint32_t kv_len = 0;
        Range range{};
        if (by_items) {
            const uint32_t* worker_starts = reinterpret_cast<const uint32_t*>(p.worker_starts) + ptx::block_z();
            const uint32_t first_item = worker_starts[0];
            const uint32_t item_end = worker_starts[1];
            if (first_item == item_end) {
                ptx::wait_for_previous();
                return;
            }
            // The step that follows is stage 2, whose blocks may take what room there is.
            ptx::launch_dependents();
            range = run_at(p, shared, first_item, item_end, request_idx);
        } else {
            kv_len = read_kv_len();
            if constexpr (kTakesItems) range = share_of(p, kv_len);
            if (kHasRuns && threadIdx.x == 0) kept(shared)->next_end = 0;
        }
        const QueryRows rows(p, ptx::block_x(), T::kRows);
        const uint32_t num_elements = Parts::rows_of(rows) * kFours;
        uint8_t* ring = shared + warp * T::kWarpBytes;
        uint2* addresses = reinterpret_cast<uint2*>(shared + kAddressesAt);
        RunLoader<T>::open_barriers(ptx::shared_address(shared + kBarriersAt) + warp * T::kNumStages * 8, lane);
        if (p.num_shares > 1) {
            const SharesInbox inbox(p.num_shares, Parts::rows_of(rows), shared);
            inbox.open();
            for (uint32_t idx = threadIdx.x; idx < num_elements; idx += WARPS * 32) {
                const auto address = inbox.address_of(idx);
                addresses[idx] = make_uint2(address.barrier, address.slot);
            }
        }
        Arith arith(p, lane, ring, shared + kQueryAt);
        State state;
        bool first = true;
        bool again = false;
        uint32_t phases = 0;
        const auto before_queries = [&] {
            // The others of the cluster began with this one; their inboxes are open by now.
            if (first && p.num_shares > 1) ptx::cluster_wait();
            if constexpr (kTakesItems) {
                const QueryRows rows_here(p, ptx::block_x(), T::kRows);
                const uint32_t thread = ptx::thread_x();
                if (first && thread < Parts::rows_of(rows_here) * kFours) {
                    ptx::prefetch_line(out_at(p, target_of(p, rows_here, request(), thread)));
                }
            } else if (first && threadIdx.x < num_elements) {
                ptx::prefetch_line(out_at(p, target_of(p, rows, request(), threadIdx.x)));
            }
            first = false;
        };
        while (true) {
            if constexpr (kTakesItems) {
                // Worked out anew for each run, so that nothing of it is kept through the tiles of the one before.
                const uint32_t thread = ptx::thread_x();
                lane = thread % 32;
                warp = thread / 32;
                if constexpr (T::kHeadDim == 128) ptx::keep(lane);
            } else {
                range = share_of(p, kv_len);
            }
            uint8_t* ring = shared + warp * T::kWarpBytes;
            const uint32_t barriers = ptx::shared_address(shared + kBarriersAt) + warp * T::kNumStages * 8;
            const auto attend = [&](auto make) {
                const uint32_t first_token = range.start + warp * kTileTokens;
                const uint32_t tiles = (range.end - range.start + kTileTokens - 1) / kTileTokens;
                const uint32_t num_tiles = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
                const typename Parts::Share share{p, ring, lane, warp, kTileStride, request(), first_token, range.end, num_tiles, first, again};
                auto loader = make();
                again = Parts::template do_share<true>(share, loader, arith, state, before_queries, Pieces{p, shared});
                return loader;
            };
            const bool aligned = range.start % kTileTokens == 0;
            if (RunLoader<T>::serves(p.cache) && aligned) {
                phases = attend([&] { return RunLoader<T>(p.cache, ptx::block_x(), lane, kTileStride, ring, barriers, phases); }).phases;
            } else if (T::kBlocks && aligned && BlockLoader<T>::serves(p.cache)) {
                if constexpr (T::kBlocks) attend([&] { return BlockLoader<T>(p.cache, ptx::block_x(), lane, kTileStride, ring); });
            } else {
                attend([&] { return RowLoader<T>(p.cache, ptx::block_x(), lane, kTileStride, ring); });
            }
            hand_over(shared, 0, arith, state);
            // One warp that was careless sends all back: there is a barrier in the making of the queries.
            const bool repeats = kMayRepeat ? __syncthreads_or(again) != 0 : (__syncthreads(), false);
            if (repeats) {
                ptx::fence_before_bulk_copies();
                __syncwarp();
            } else {
                merge(p, shared);
                if (!by_items || kept(shared)->next_item == kept(shared)->item_end) break;
                again = false;
                ptx::fence_before_bulk_copies();
                __syncthreads();  // the rings may be filled again
            }
            // Read again rather than kept through the tiles.
            if (by_items) {
                const Kept now = *kept(shared);
                __syncthreads();
                range = run_at(p, shared, repeats ? now.first_item : now.next_item, now.item_end, request_idx);
            } else {
                kv_len = read_kv_len();
                if constexpr (kTakesItems) range = share_of(p, kv_len);
            }
        }
    }

    // Ends the pieces of a worker's items while the ring is under way.
    struct Pieces {
        static constexpr bool kMany = kHasRuns;
        const DecodeParams& p;
        uint8_t* shared;

        // Looked up, rather than kept in a register through the tiles.
        __device__ __forceinline__ bool ends_with(uint32_t tile) const {
            return *const_cast<volatile uint32_t*>(&kept(shared)->next_end) == tile + 1;
        }

        __device__ __forceinline__ void hand_over(const Arith& arith, const State& state, uint32_t offset) {
            const Kept now = *kept(shared);
            Shares::hand_over(shared, offset, arith, state);
            __syncthreads();
            const QueryRows rows(p, ptx::block_x(), T::kRows);
            const uint32_t num_elements = Parts::rows_of(rows) * kFours;
            for (uint32_t idx = threadIdx.x; idx < num_elements; idx += WARPS * 32) {
                float x[4];
                const RowState merged = merge_warps(shared, offset, idx, x);
                write_partial(p, rows, now.partial_idx, idx, merged, x);
            }
            if (threadIdx.x == 0) {
                kept(shared)->partial_idx = now.partial_idx + 1;
                kept(shared)->num_to_end = now.num_to_end - 1;
                kept(shared)->next_end = now.num_to_end > 1 ? now.next_end + now.piece_tiles : 0;
            }
            ptx::fence_before_bulk_copies();
            __syncthreads();  // the stage may be filled again
        }
    };

    // Puts the state of a warp where all warps of the CTA read it, its out at `offset` of the ring.
    static __device__ __forceinline__ void hand_over(uint8_t* shared, uint32_t offset, const Arith& arith, const State& state) {
        const uint32_t warp = threadIdx.x / 32;
        float4* states = reinterpret_cast<float4*>(shared + kStatesAt) + warp * T::kRows;
        float* outs = reinterpret_cast<float*>(shared + warp * T::kWarpBytes + offset);
#pragma unroll
        for (int tile = 0; tile < T::kRowTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t row = 8 * tile + 2 * arith.column + j;
                const float sum = column_sum(state.sum[tile][j]);
                if (arith.row == 0) {
                    states[row] = make_float4(state.reference[tile][j], sum, state.out_exponent[tile][j] + Arith::kOutExponent, 0.0f);
                }
                arith.store(outs + row * T::kMergePitch, tile, j);
            }
        }
    }

    static __device__ __forceinline__ void merge(const DecodeParams& p, uint8_t* shared) {
        uint32_t request_idx = p.num_shares > 1 ? ptx::cluster_z() : ptx::block_z();
        uint32_t partial_idx = kNoPartial;
        if (kTakesItems && p.num_shares == 0) {
            request_idx = kept(shared)->request_idx;
            partial_idx = kept(shared)->partial_idx;
        }
        const QueryRows rows(p, ptx::block_x(), T::kRows);
        const uint32_t num_rows = Parts::rows_of(rows);
        const bool sends = p.num_shares > 1;
        const SharesInbox inbox(max(p.num_shares, 1u), num_rows, shared);
        const uint2* addresses = reinterpret_cast<const uint2*>(shared + kAddressesAt);
        for (uint32_t idx = threadIdx.x; idx < num_rows * kFours; idx += WARPS * 32) {
            float x[4];
            if (sends) {
                const uint2 address = addresses[idx];
                const RowState merged = merge_warps(shared, 0, idx, x);
                inbox.send({address.x, address.y}, merged, x);
            } else if (partial_idx != kNoPartial) {
                write_partial(p, rows, partial_idx, idx, merge_warps(shared, 0, idx, x), x);
            } else {
                const Target target = target_of(p, rows, request_idx, idx);
                write(p, target, merge_warps(shared, 0, idx, x), x);
            }
        }
        if (sends) {
            inbox.receive(
                shared, [&](uint32_t idx) { return target_of(p, rows, request_idx, idx); },
                [&](const Target& target, const RowState& merged, float (&x)[4]) { write(p, target, merged, x); });
        }
    }
};

template <int MIN_CTAS, int HEAD_DIM, Groups GROUPS, Scales SCALES, int ROW_TILES, Arithmetic ARITHMETIC, int NUM_STAGES>
using SharesOf = Shares<Traits<HEAD_DIM, GROUPS, SCALES, ROW_TILES, ARITHMETIC, NUM_STAGES, MIN_CTAS, GROUPS != Groups::kWhole>, kShareWarps>;

}  // namespace kv8
