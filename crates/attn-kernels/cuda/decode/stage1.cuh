// Stage 1: attention of one (request, kv head) over the token ranges of the plan.
//
// Block: x = 32 * token warps, y = kv heads of the CTA, 4 warps in all. One head with four token warps suits short work and few
// heads; four heads with one token warp each read the neighbouring rows of one token together, which shuffled slots need.
// Grid: x = head block, of num_kv_heads / blockDim.y (fastest: neighbouring heads share memory sectors in time), y = block of
// T::kRows query rows, z = worker. A CTA does the items of its worker in order; within an item and head, token warp w owns the
// 16-token tiles w, w + token warps, ... counted from the item's first token, with its own cp.async ring and its own softmax
// state. There is no block barrier until the warps are merged, in fixed order: the bits of a result depend on the item's bounds
// and the block's shape alone. Variants that keep their queries in shared memory take one head a CTA.
// May be launched as a programmatic dependent of the kernel before it.
// An item without a partial writes out and lse; the others write (o, m, l) for stage 2.
// In shares (num_shares > 0) there are no items: a cluster of num_shares CTAs takes one request and head block, see inbox.cuh, and
// z = request * num_shares + rank.
//
// A step: wait for a tile, score its K, weigh, accumulate its V, refill its stage (in step with other heads: the
// stage before). Tiles come as runs of records by bulk copy, or as rows that lie side by side, where the cache and the item allow,
// else row by row.
#pragma once
#include <type_traits>

#include "../cache/block_loader.cuh"
#include "../cache/row_loader.cuh"
#include "../cache/run_loader.cuh"
#include "../softmax/online_state.cuh"
#include "arithmetic_f32.cuh"
#include "arithmetic_mma.cuh"
#include "arithmetic_whole.cuh"
#include "inbox.cuh"
#include "query_rows.cuh"
#include "ready.cuh"
#include "result.cuh"
#include "traits.cuh"

namespace kv8 {

// Which tokens the query rows see: row i of q_len sits at kv_len - q_len + i.
struct Visibility {
    int32_t first_position;  // of query row 0; may be negative
    int32_t last_position;
    int32_t window;

    __device__ __forceinline__ Visibility(const DecodeParams& p, uint32_t kv_len)
        : first_position(static_cast<int32_t>(kv_len) - static_cast<int32_t>(p.q_len)),
          last_position(static_cast<int32_t>(kv_len) - 1),
          window(static_cast<int32_t>(p.window)) {}

    // Every query row sees every token of [clear_begin, clear_end).
    __device__ __forceinline__ int32_t clear_begin() const { return window == 0 ? 0 : last_position - window + 1; }
    __device__ __forceinline__ int32_t clear_end() const { return first_position + 1; }

    __device__ __forceinline__ bool sees(int32_t query_position, int32_t token) const {
        if (mutant(7)) return token < query_position && (window == 0 || token > query_position - window);
        if (mutant(8)) return token <= query_position && (window == 0 || token >= query_position - window);
        if (mutant(9)) return token <= last_position && (window == 0 || token > query_position - window);
        return token <= query_position && (window == 0 || token > query_position - window);
    }
};

template <class T>
struct Stage1 {
    using TensorArith = std::conditional_t<T::kWhole, WholeArithmetic<T>, MmaArithmetic<T>>;
    using Arith = std::conditional_t<T::kArithmetic == Arithmetic::kMma, TensorArith, F32Arithmetic<T>>;
    static constexpr int kRowTiles = T::kRowTiles;
    static constexpr bool kExact = T::kArithmetic == Arithmetic::kF32;
    using SharesInbox = Inbox<T::kHeadDim, T::kSharedBytes>;

    // Made anew where they are used, rather than kept in registers through the tiles.
    static __device__ __forceinline__ QueryRows rows_here(const DecodeParams& p) {
        return QueryRows(p, ptx::block_x() * blockDim.y + threadIdx.y, T::kRows);
    }

    // soft-cap and ALiBi, base 2.
    static __device__ __forceinline__ void transform(const DecodeParams& p, const Visibility& visibility,
                                                     int32_t first_token, const Arith& arith, float (&scores)[kRowTiles][4]) {
        const float* slopes = reinterpret_cast<const float*>(p.alibi_slopes);
        const float cap = p.soft_cap * kLog2E;
        const float per_cap = p.soft_cap > 0.0f ? 2.0f * ptx::rcp_approx(p.soft_cap) : 0.0f;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float s = scores[tile][e];
                if (p.soft_cap > 0.0f && !mutant(11)) {
                    // tanh(x) = 1 - 2 / (1 + e^2x), and e^2x = 2^(s * 2 / soft_cap).
                    s = kExact ? cap * tanhf(s * kLn2 / p.soft_cap)
                               : cap * (1.0f - 2.0f * ptx::rcp_approx(1.0f + ptx::ex2_approx(s * per_cap)));
                }
                if (slopes != nullptr) {
                    const QueryRows rows = rows_here(p);
                    const uint32_t row = min(rows.first() + 8 * tile + 2 * arith.column + e % 2, rows.total() - 1);
                    const int32_t position = visibility.first_position + static_cast<int32_t>(rows.position(row));
                    const int32_t token = first_token + static_cast<int32_t>(arith.row) + 8 * (e / 2);
                    const uint32_t head = mutant(12) ? rows.kv_head_idx * rows.p.gqa_group : rows.head(row);
                    s += slopes[head] * kLog2E * static_cast<float>(token - position);
                }
                scores[tile][e] = s;
            }
        }
    }

    static __device__ __forceinline__ void mask(const DecodeParams& p, const Visibility& visibility, int32_t first_token,
                                                uint32_t live, const Arith& arith, float (&scores)[kRowTiles][4]) {
        const QueryRows rows(p, 0, T::kRows);  // of any head
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const uint32_t row = min(rows.first() + 8 * tile + 2 * arith.column + e % 2, rows.total() - 1);
                const int32_t position = visibility.first_position + static_cast<int32_t>(rows.position(row));
                const uint32_t in_tile = arith.row + 8 * (e / 2);
                const bool seen = visibility.sees(position, first_token + static_cast<int32_t>(in_tile));
                if (!(live >> in_tile & 1) || !seen) scores[tile][e] = -CUDART_INF_F;
            }
        }
    }

    // Merges the warps' states in warp order and writes the rows of the item, or sends them.
    template <class State>
    static __device__ __forceinline__ void finish_item(const DecodeParams& p, const WorkItem& item, const QueryRows& rows,
                                                       const Arith& arith, State& state, uint8_t* shared, uint32_t ring_idx) {
        float4* states = reinterpret_cast<float4*>(shared + T::kStatesAt);
        float* merge = reinterpret_cast<float*>(shared);
        ptx::cp_async_wait<0>();
        __syncthreads();  // every ring is drained and may be overwritten
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t row = 8 * tile + 2 * arith.column + j;
                const float sum = column_sum(state.sum[tile][j]);
                if (arith.row == 0) {
                    states[ring_idx * T::kRows + row] = make_float4(state.reference[tile][j], sum, state.out_exponent[tile][j] + Arith::kOutExponent, 0.0f);
                }
                arith.store(merge + (ring_idx * T::kRows + row) * T::kMergePitch, tile, j);
            }
        }
        __syncthreads();
        constexpr uint32_t kFours = T::kHeadDim / 4;
        const uint32_t num_rows = rows_of(rows);
        const bool sends = p.num_shares > 1;
        const SharesInbox inbox(max(p.num_shares, 1u), num_rows, shared);
        if (sends) inbox.wait_for_others();
        const int token_warps = static_cast<int>(blockDim.x / 32);
        const uint32_t first_ring = threadIdx.y * token_warps;
        for (uint32_t idx = threadIdx.x; idx < num_rows * kFours; idx += blockDim.x) {
            const uint32_t row = idx / kFours;
            const uint32_t channel = idx % kFours * 4;
            RowState merged{-CUDART_INF_F, 0.0f};
            for (int w = 0; w < token_warps; ++w) {
                const float4 s = states[(first_ring + w) * T::kRows + row];
                if (s.y > 0.0f) merged.m = fmaxf(merged.m, s.x);
            }
            float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (int w = 0; w < (mutant(4) && token_warps > 1 ? token_warps - 1 : token_warps); ++w) {
                const float4 s = states[(first_ring + w) * T::kRows + row];
                if (!(s.y > 0.0f)) continue;
                merged.l += s.y * (mutant(5) ? 1.0f : exp2f(s.x - merged.m));
                // In two halves: the exponents may lie further apart than one f32 can bridge.
                const float half = mutant(5) ? 1.0f : exp2f(0.5f * fminf(fmaxf((s.x - merged.m) + s.z, -250.0f), 250.0f));
                const float4 o = *reinterpret_cast<const float4*>(merge + ((first_ring + w) * T::kRows + row) * T::kMergePitch + channel);
                x[0] += o.x * half * half, x[1] += o.y * half * half, x[2] += o.z * half * half, x[3] += o.w * half * half;
            }
            if (sends) {
                inbox.send(inbox.address_of(idx), merged, x);
            } else {
                write_row(p, item, rows, rows.first() + row, channel, merged, x);
            }
        }
        ptx::fence_before_bulk_copies();
        __syncthreads();  // the rings may be filled again, by bulk copies too
    }

    static __device__ __forceinline__ uint32_t rows_of(const QueryRows& rows) {
        return min(static_cast<uint32_t>(T::kRows), rows.total() - rows.first());
    }

    static __device__ __forceinline__ WorkItem item_at(const DecodeParams& p, uint32_t item_idx) {
        const uint4 words = reinterpret_cast<const uint4*>(p.items)[item_idx];
        return WorkItem{words.x, words.y, words.z, words.w};
    }

    // The share of this CTA of a cluster; the same as attn_plan's with tiles of 64.
    static __device__ __forceinline__ WorkItem share_of(const DecodeParams& p, uint32_t request_idx) {
        const uint32_t end = reinterpret_cast<const uint32_t*>(p.kv_lens)[request_idx];
        const uint32_t rank = ptx::cluster_rank();
        const uint32_t seen = p.q_len + p.window - 1;  // of the last tokens, by some row
        const uint32_t start = p.window != 0 && end > seen ? end - seen : 0;
        const uint32_t first_tile = start / kShareTile;
        const uint32_t num_tiles = (end + kShareTile - 1) / kShareTile - first_tile;
        const uint32_t from = first_tile + num_tiles * rank / p.num_shares;
        const uint32_t to = first_tile + num_tiles * (rank + 1) / p.num_shares;
        const uint32_t token_start = min(max(from * kShareTile, start), end);
        return WorkItem{request_idx, token_start, max(min(to * kShareTile, end), token_start), kNoPartial};
    }

    static __device__ __forceinline__ void write_row(const DecodeParams& p, const WorkItem& item, const QueryRows& rows,
                                                     uint32_t row, uint32_t channel, const RowState& state, float (&x)[4]) {
        if (item.partial_idx == kNoPartial) {
            const RowResult result = finish_row(state, p, rows.head(row));
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] *= result.factor;
            store_float4(reinterpret_cast<void*>(p.out), rows.element(p, item.request_idx, row) + channel, p.out_type, x);
            if (channel == 0 && p.lse != 0) reinterpret_cast<float*>(p.lse)[rows.index(p, item.request_idx, row)] = result.lse;
        } else if (item.partial_idx < p.partial_capacity) {
            const uint64_t index = rows.partial_index(p, item.partial_idx, row);
            store_float4(reinterpret_cast<void*>(p.partial_o), index * T::kHeadDim + channel, kFloatF32, x);
            if (channel == 0) reinterpret_cast<float2*>(p.partial_ml)[index] = make_float2(state.m, state.l);
        }
    }

    using State = OnlineState<kRowTiles, T::kAlwaysNormalize, kExact>;

    // What a warp does of an item, whichever way its tiles come.
    struct Share {
        const DecodeParams& p;
        uint8_t* ring;
        uint32_t lane;
        uint32_t warp;
        uint32_t tile_stride;  // tokens
        uint32_t request_idx;
        uint32_t first_token;  // of the warp's first tile
        uint32_t token_end;
        uint32_t num_tiles;    // of the warp
        bool wait;             // for the kernel before this one
        bool careful;          // look at scales before they are used
    };

    // A share is one piece: its state is handed over when its tiles are done.
    struct OnePiece {
        static constexpr bool kMany = false;
    };

    // Whether a scale left f16's range, which is rare: then all of it once more, carefully.
    // `before_queries` is called before the wait for the kernel before this one, if there is one to wait for. LETS_GO: the next
    // kernel may begin `kLead` tiles before all of this warp are asked for, so that its first copies follow on the last of this one; not
    // much before, for it would ask for its own at the cost of these, and not before the first tile is done.
    // `pieces` takes the state away at the ends of all pieces but the last, through the stage that was left then.
    template <bool LETS_GO = false, class Loader, class Before, class Pieces = OnePiece>
    static __device__ __forceinline__ bool do_share(const Share& share, Loader& loader, Arith& arith, State& state,
                                                    Before&& before_queries, Pieces pieces = {}) {
        const DecodeParams& p = share.p;
        const uint32_t num_tiles = share.num_tiles;
        const int32_t* pages = page_row(p.cache, share.request_idx);
        const auto report = [&](uint32_t position, int32_t page) {
            if (blockIdx.y == 0) report_error(p.error, kErrorPageOutOfRange, share.request_idx, rows_here(p).kv_head_idx, position, page, 0);
        };
        loader.begin(pages, share.first_token, share.token_end);
        const uint32_t kv_len = reinterpret_cast<const uint32_t*>(p.kv_lens)[share.request_idx];
        const auto query = arith.find_query(p, rows_here(p), share.request_idx);
        uint32_t filled = 0;  // stages
        const auto fill_ring = [&](uint32_t end) {
#pragma unroll 1
            for (; filled < end; ++filled) {
                if (filled < num_tiles) loader.fill(filled, filled * T::kStageBytes, report);
                loader.commit();
            }
        };
        if (share.wait) {
            const uint32_t num_early = tiles_before<T>(share.first_token, share.tile_stride, num_tiles, complete_tokens(p, kv_len));
            fill_ring(num_early);
            loader.prefetch_first_tiles(num_early, num_tiles);
            arith.ask_for(query);
            before_queries();
            ptx::wait_for_previous();
        }
        typename Arith::RawQuery raw_query;
        arith.fetch_query(p, query, raw_query);
        fill_ring(T::kNumStages);
        if (LETS_GO && num_tiles <= T::kNumStages) ptx::launch_dependents();
        constexpr uint32_t kUnasked = T::kNumStages + 1 + Loader::kLead;
        const uint32_t goes_after = max(num_tiles, kUnasked) - kUnasked;
        const Visibility visibility(p, kv_len);
        const int32_t clear_begin = visibility.clear_begin();
        const int32_t clear_end = visibility.clear_end() - kTileTokens;
        const bool transformed = p.soft_cap > 0.0f || p.alibi_slopes != 0;
        const auto shape = loader.shape();
        arith.load_query(p, raw_query, share.warp);
        arith.begin_item(share.careful);
        arith.clear();
        state.clear();
        uint32_t slot = 0;
        uint32_t offset = 0;  // of the tile's stage in the ring
        uint32_t tile_token = share.first_token;
#pragma unroll 1
        for (uint32_t tile = 0; tile < num_tiles; ++tile) {
            uint8_t* stage = share.ring + offset;
            loader.wait(slot);
            __syncwarp();
            if (Loader::kInStep && tile != 0) {
                const uint32_t before = slot == 0 ? T::kNumStages - 1 : slot - 1;
                if (tile - 1 + T::kNumStages < num_tiles) loader.fill(before, before * T::kStageBytes, report);
                loader.commit();
            }
            const bool is_partial = loader.is_partial(slot, tile_token);
            const uint32_t misaligned = loader.misaligned_rows_of(offset);
            uint32_t live = 0xffffu;
            if (is_partial) {
                live = loader.live_tokens(slot, offset, tile_token);
                loader.clear_dead(offset, live);
            }
            float scores[kRowTiles][4];
            arith.score(shape, stage, misaligned, scores);
            float token_exponents[2];
            const bool shifted = arith.prepare_values(shape, stage, misaligned, token_exponents);
            const int32_t token = static_cast<int32_t>(tile_token);
            if (transformed) transform(p, visibility, token, arith, scores);
            if (is_partial || token < clear_begin || token > clear_end) {
                mask(p, visibility, token, live | (mutant(3) ? 0xffffu : 0u), arith, scores);
            }
            state.update(scores, shifted, token_exponents, arith.out);
            arith.accumulate(shape, stage, scores);
            __syncwarp();  // the stage is read
            loader.done(slot);
            if constexpr (Pieces::kMany) {
                if (pieces.ends_with(tile)) {
                    pieces.hand_over(arith, state, offset);
                    arith.clear();
                    state.clear();
                }
            }
            if (!Loader::kInStep) {
                if (tile + T::kNumStages < num_tiles) loader.fill(slot, offset, report);
                loader.commit();
            }
            if (LETS_GO && tile == goes_after) ptx::launch_dependents();
            tile_token += share.tile_stride;
            offset += T::kStageBytes;
            if (++slot == T::kNumStages) slot = offset = 0;
        }
        if (T::kLooksFirst) return false;
        const bool again = arith.was_careless();
        return Loader::kInStep ? __syncthreads_or(again) : again;
    }

    static __device__ __forceinline__ void run(const DecodeParams& p, uint8_t* shared) {
        uint32_t lane = threadIdx.x % 32;
        uint32_t warp = threadIdx.x / 32;
        ptx::keep(lane);
        ptx::keep(warp);
        const uint32_t token_warps = blockDim.x / 32;
        const auto worker = [&] { return p.num_shares > 1 ? ptx::cluster_z() : ptx::block_z(); };  // or request
        const auto ring_idx = [&] { return threadIdx.y * token_warps + warp; };
        ptx::launch_dependents();
        // Nothing of device memory is read before the kernel before this one has ended, unless the tables were ready even then.
        const bool early = p.ready != kReadyNothing;
        if (!early) ptx::wait_for_previous();
        const uint32_t* worker_starts = reinterpret_cast<const uint32_t*>(p.worker_starts);
        const bool by_plan = p.num_shares == 0;
        const uint32_t first_item = by_plan ? worker_starts[worker()] : 0;
        const uint32_t last_item = by_plan ? worker_starts[worker() + 1] : 1;

        uint8_t* ring = shared + ring_idx() * T::kWarpBytes;
        const uint32_t barriers = ptx::shared_address(shared + T::kBarriersAt) + ring_idx() * T::kNumStages * 8;
        RunLoader<T>::open_barriers(barriers, lane);
        uint32_t phases = 0;  // of the barriers
        Arith arith(p, lane, ring, shared + T::kQueryAt);
        State state;
        if (p.num_shares > 1) SharesInbox(p.num_shares, rows_of(rows_here(p)), shared).open();
        if (first_item == last_item || blockIdx.y * T::kRows >= p.gqa_group * p.q_len) {
            ptx::wait_for_previous();
            return;
        }

#pragma unroll 1
        for (uint32_t item_idx = first_item, item_end = last_item; item_idx < item_end;) {
            // What is not needed while the tiles go by waits where the warps' states will stand.
            static_assert(T::kRows * sizeof(float4) >= 2 * sizeof(uint4));
            volatile uint32_t* kept = reinterpret_cast<uint32_t*>(shared + T::kStatesAt) + ring_idx() * T::kRows * 4;
            if (lane == 0) {
                const WorkItem item = by_plan ? item_at(p, item_idx) : share_of(p, worker());
                kept[0] = item.request_idx, kept[1] = item.token_start, kept[2] = item.token_end, kept[3] = item.partial_idx;
                kept[4] = item_idx, kept[5] = item_end, kept[6] = phases;
            }
            __syncwarp();
            bool wait = early && item_idx == first_item;
            bool again = false;
            do {
                const uint32_t kv_head = rows_here(p).kv_head_idx;
                const uint32_t token_start = kept[1];
                const uint32_t token_end = kept[2];
                const uint32_t item_tiles = (token_end - token_start + kTileTokens - 1) / kTileTokens;
                const uint32_t num_tiles = item_tiles > warp ? (item_tiles - warp + token_warps - 1) / token_warps : 0;
                const uint32_t first_token = token_start + warp * kTileTokens + (mutant(2) && warp != 0 ? 1 : 0);
                const Share share{p, ring, lane, warp, token_warps * kTileTokens, kept[0], first_token, token_end, num_tiles, wait, again};
                if (RunLoader<T>::serves(p.cache) && first_token % kTileTokens == 0) {
                    RunLoader<T> loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring, barriers, kept[6]);
                    again = do_share(share, loader, arith, state, [] {});
                    __syncwarp();  // the phases before are read, by warps without a tile too
                    if (lane == 0) kept[6] = loader.phases;
                } else if (T::kBlocks && first_token % kTileTokens == 0 && BlockLoader<T>::serves(p.cache)) {
                    if constexpr (T::kBlocks) {
                        BlockLoader<T> loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring);
                        again = do_share(share, loader, arith, state, [] {});
                    }
                } else if (RowLoader<T, true>::serves()) {
                    RowLoader<T, true> loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring);
                    again = do_share(share, loader, arith, state, [] {});
                } else {
                    RowLoader<T> loader(p.cache, kv_head, lane, token_warps * kTileTokens, ring);
                    again = do_share(share, loader, arith, state, [] {});
                }
                wait = false;
                ptx::fence_before_bulk_copies();
                __syncwarp();
            } while (again);
            const WorkItem item{kept[0], 0, 0, kept[3]};
            item_idx = kept[4] + 1;
            item_end = kept[5];
            phases = kept[6];
            finish_item(p, item, rows_here(p), arith, state, shared, ring_idx());
        }
        if (p.num_shares > 1) {
            const QueryRows rows = rows_here(p);
            const auto place = [](uint32_t element) { return element; };
            SharesInbox(p.num_shares, rows_of(rows), shared).receive(shared, place, [&](uint32_t element, const RowState& merged, float (&x)[4]) {
                const WorkItem whole{worker(), 0, 0, kNoPartial};
                write_row(p, whole, rows, rows.first() + element / SharesInbox::kFours, element % SharesInbox::kFours * 4, merged, x);
            });
        }
    }
};

}  // namespace kv8
