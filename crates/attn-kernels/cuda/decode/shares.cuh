// Stage 1 in shares, by itself: what stage1.cuh does where num_shares > 0, for short steps. The same tiles by the same warps'
// code; around them nothing but what shares need, so that it fits 128 registers and eight warps a CTA.
//
// Block: x = 32 * WARPS, all on the tokens of one kv head. Grid: x = kv head, y = block of T::kRows query rows, z = request *
// num_shares + rank, in clusters of num_shares along z. CTA `rank` takes share `rank` of the request's tokens (inbox.cuh says how
// they are cut and merged); warp w its tiles w, w + WARPS, ...
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
    // kept there; where each element goes; the barriers of bulk copies; the inbox.
    static constexpr int kStatesAt = WARPS * T::kWarpBytes;                      // float4 [WARPS][kRows]
    static constexpr int kQueryAt = kStatesAt + WARPS * T::kRows * 16;           // as in Traits
    static constexpr int kAddressesAt = kQueryAt + T::kQueryBytes;               // uint2 [kRows * kFours]
    static constexpr int kBarriersAt = kAddressesAt + T::kRows * kFours * 8;     // u64 [WARPS][kNumStages]
    static constexpr int kSharedBytes = round_up(kBarriersAt + WARPS * T::kNumStages * 8, 16);
    static_assert(T::kRows * T::kMergePitch * 4 <= T::kWarpBytes);
    using SharesInbox = Inbox<T::kHeadDim, kSharedBytes>;

    struct Range {
        uint32_t start;
        uint32_t end;
    };

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

    // Element idx of the CTA's result: its warps merged, in their order.
    static __device__ __forceinline__ RowState merge_warps(const uint8_t* shared, uint32_t idx, float (&x)[4]) {
        const uint32_t row = idx / kFours;
        const float4* states = reinterpret_cast<const float4*>(shared + kStatesAt) + row;
        const uint8_t* outs = shared + (row * T::kMergePitch + idx % kFours * 4) * 4;
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
        if constexpr (T::kHeadDim == 128 && T::kGroups != Groups::k16Up) ptx::keep(lane);  // others have no register for it
        if (p.ready == kReadyNothing) ptx::wait_for_previous();
        const auto request = [&] { return p.num_shares > 1 ? ptx::cluster_z() : ptx::block_z(); };
        const QueryRows rows(p, ptx::block_x(), T::kRows);
        uint8_t* ring = shared + warp * T::kWarpBytes;
        const uint32_t barriers = ptx::shared_address(shared + kBarriersAt) + warp * T::kNumStages * 8;
        uint2* addresses = reinterpret_cast<uint2*>(shared + kAddressesAt);
        const auto read_kv_len = [&] { return reinterpret_cast<const uint32_t*>(p.kv_lens)[request()]; };
        uint32_t kv_len = read_kv_len();
        RunLoader<T>::open_barriers(barriers, lane);
        const uint32_t num_elements = Parts::rows_of(rows) * kFours;
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
            if (first && threadIdx.x < num_elements) ptx::prefetch_line(out_at(p, target_of(p, rows, request(), threadIdx.x)));
            first = false;
        };
        while (true) {
            const Range range = share_of(p, kv_len);
            const auto attend = [&](auto make) {
                const uint32_t first_token = range.start + warp * kTileTokens;
                const uint32_t tiles = (range.end - range.start + kTileTokens - 1) / kTileTokens;
                const uint32_t num_tiles = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
                const typename Parts::Share share{p, ring, lane, warp, kTileStride, request(), first_token, range.end, num_tiles, first, again};
                auto loader = make();
                again = Parts::template do_share<true>(share, loader, arith, state, before_queries);
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
            hand_over(shared, arith, state);
            // One warp that was careless sends all back: there is a barrier in the making of the queries.
            if constexpr (!kMayRepeat) {
                __syncthreads();
                break;
            }
            if (!__syncthreads_or(again)) break;
            ptx::fence_before_bulk_copies();
            __syncwarp();
            kv_len = read_kv_len();  // rather than keep it through the tiles
        }
        merge(p, shared, request());
    }

    // Puts the state of a warp where all warps of the CTA read it.
    static __device__ __forceinline__ void hand_over(uint8_t* shared, const Arith& arith, const State& state) {
        const uint32_t warp = threadIdx.x / 32;
        float4* states = reinterpret_cast<float4*>(shared + kStatesAt) + warp * T::kRows;
        float* outs = reinterpret_cast<float*>(shared + warp * T::kWarpBytes);
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

    static __device__ __forceinline__ void merge(const DecodeParams& p, uint8_t* shared, uint32_t request_idx) {
        const QueryRows rows(p, ptx::block_x(), T::kRows);
        const uint32_t num_rows = Parts::rows_of(rows);
        const bool sends = p.num_shares > 1;
        const SharesInbox inbox(max(p.num_shares, 1u), num_rows, shared);
        const uint2* addresses = reinterpret_cast<const uint2*>(shared + kAddressesAt);
        for (uint32_t idx = threadIdx.x; idx < num_rows * kFours; idx += WARPS * 32) {
            float x[4];
            if (sends) {
                const uint2 address = addresses[idx];
                const RowState merged = merge_warps(shared, idx, x);
                inbox.send({address.x, address.y}, merged, x);
            } else {
                const Target target = target_of(p, rows, request_idx, idx);
                write(p, target, merge_warps(shared, idx, x), x);
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
