// Stage 1 in shares (num_shares > 0), by itself: what stage1.cuh does there, with eight warps a CTA, for short steps.
//
// Block and grid: see wide.cuh; z = request * num_shares + rank, in clusters of num_shares along z. CTA `rank` takes share `rank` of the
// request's tokens; inbox.cuh says how they are cut and merged.
//
// What a lone step waits for, in order: the kernel before, the queries, a tile, the other warps, the other CTAs. Everything that does not
// depend on them is done before: addresses, first tiles (where the history is ready), where to send and where to write.
#pragma once
#include "inbox.cuh"
#include "wide.cuh"

namespace kv8 {

// Of its own: where each element goes, uint2 [kRows * kFours]. The inbox lies behind everything else.
template <class T, int WARPS>
struct Shares : Wide<T, WARPS, T::kRows * T::kHeadDim / 4 * 8> {
    using Base = Wide<T, WARPS, T::kRows * T::kHeadDim / 4 * 8>;
    using typename Base::Range;
    using typename Base::Target;
    using Parts = typename Base::Parts;
    using Base::kFours;
    using SharesInbox = Inbox<T::kHeadDim, Base::kSharedBytes>;

    static __device__ __forceinline__ uint2* addresses_at(uint8_t* shared) { return reinterpret_cast<uint2*>(shared + Base::kOwnAt); }

    static __device__ __forceinline__ uint32_t request(const DecodeParams& p) { return p.num_shares > 1 ? ptx::cluster_z() : ptx::block_z(); }

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

    static __device__ __forceinline__ void run(const DecodeParams& p, uint8_t* shared) {
        uint32_t lane = threadIdx.x % 32;
        uint32_t warp = threadIdx.x / 32;
        if constexpr (T::kHeadDim == 128 && T::kGroups != Groups::k16Up) ptx::keep(lane);  // others have no register for it
        if (p.ready == kReadyNothing) ptx::wait_for_previous();
        const auto read_kv_len = [&] { return reinterpret_cast<const uint32_t*>(p.kv_lens)[request(p)]; };
        uint32_t kv_len = read_kv_len();
        const QueryRows rows(p, ptx::block_x(), T::kRows);
        const uint32_t num_elements = Parts::rows_of(rows) * kFours;
        uint8_t* ring = shared + warp * T::kWarpBytes;
        uint2* addresses = addresses_at(shared);
        RunLoader<T>::open_barriers(ptx::shared_address(shared + Base::kBarriersAt) + warp * T::kNumStages * 8, lane);
        if (p.num_shares > 1) {
            const SharesInbox inbox(p.num_shares, Parts::rows_of(rows), shared);
            inbox.open();
            for (uint32_t idx = threadIdx.x; idx < num_elements; idx += WARPS * 32) {
                const auto address = inbox.address_of(idx);
                addresses[idx] = make_uint2(address.barrier, address.slot);
            }
        }
        typename Base::Arith arith(p, lane, ring, shared + Base::kQueryAt);
        typename Base::State state;
        bool first = true;
        bool again = false;
        uint32_t phases = 0;
        const auto before_queries = [&] {
            // The others of the cluster began with this one; their inboxes are open by now.
            if (first && p.num_shares > 1) ptx::cluster_wait();
            if (first && threadIdx.x < num_elements) {
                ptx::prefetch_line(Base::out_at(p, Base::target_of(p, rows, request(p), threadIdx.x)));
            }
            first = false;
        };
        while (true) {
            const Range range = share_of(p, kv_len);
            Base::template attend<true>(
                p, shared, lane, warp, range, [&] { return request(p); }, first, again, phases, arith, state, before_queries,
                typename Parts::OnePiece{});
            Base::hand_over(shared, 0, arith, state);
            // One warp that was careless sends all back: there is a barrier in the making of the queries.
            const bool repeats = Base::kMayRepeat ? __syncthreads_or(again) != 0 : (__syncthreads(), false);
            if (!repeats) break;
            ptx::fence_before_bulk_copies();
            __syncwarp();
            kv_len = read_kv_len();  // rather than keep it through the tiles
        }
        merge(p, shared);
    }

    static __device__ __forceinline__ void merge(const DecodeParams& p, uint8_t* shared) {
        const uint32_t request_idx = request(p);
        const QueryRows rows(p, ptx::block_x(), T::kRows);
        const uint32_t num_rows = Parts::rows_of(rows);
        const bool sends = p.num_shares > 1;
        const SharesInbox inbox(max(p.num_shares, 1u), num_rows, shared);
        const uint2* addresses = addresses_at(shared);
        for (uint32_t idx = threadIdx.x; idx < num_rows * kFours; idx += WARPS * 32) {
            float x[4];
            if (sends) {
                const uint2 address = addresses[idx];
                const RowState merged = Base::merge_warps(shared, 0, idx, x);
                inbox.send({address.x, address.y}, merged, x);
            } else {
                const Target target = Base::target_of(p, rows, request_idx, idx);
                Base::write(p, target, Base::merge_warps(shared, 0, idx, x), x);
            }
        }
        if (sends) {
            inbox.receive(
                shared, [&](uint32_t idx) { return Base::target_of(p, rows, request_idx, idx); },
                [&](const Target& target, const RowState& merged, float (&x)[4]) { Base::write(p, target, merged, x); });
        }
    }
};

template <int MIN_CTAS, int HEAD_DIM, Groups GROUPS, Scales SCALES, int ROW_TILES, Arithmetic ARITHMETIC, int NUM_STAGES>
using SharesOf = Shares<WideTraits<MIN_CTAS, HEAD_DIM, GROUPS, SCALES, ROW_TILES, ARITHMETIC, NUM_STAGES>, kWideWarps>;

}  // namespace kv8
