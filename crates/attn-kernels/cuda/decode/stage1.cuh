// Stage 1: attention of one (request, kv head) over the token ranges of the plan.
//
// Block: x = 32 * token warps, y = kv heads of the CTA, 4 warps in all. One head with four token warps suits short work and few
// heads; four heads with one token warp each read the neighbouring rows of one token together, which shuffled slots need.
// Grid: x = worker * (num_kv_heads / blockDim.y) + head block (heads fastest: neighbouring heads share memory sectors in time),
// y = block of T::kRows query rows. A CTA does the items of its worker in order; within an item and head, token warp w owns the
// 16-token tiles w, w + token warps, ... counted from the item's first token, with its own cp.async ring and its own softmax
// state. There is no block barrier until the warps are merged, in fixed order: the bits of a result depend on the item's bounds
// and the block's shape alone. Variants that keep their queries in shared memory take one head a CTA.
// May be launched as a programmatic dependent of the kernel before it.
// An item without a partial writes out and lse; the others write (o, m, l) for stage 2.
//
// A step: wait K, score, refill K's slot; wait V, weigh, accumulate, refill V's slot. K and V are separate copy groups, so
// 2 * stages - 1 groups stay in flight.
#pragma once
#include <type_traits>

#include "../cache/tile_loader.cuh"
#include "../softmax/online_state.cuh"
#include "arithmetic_f32.cuh"
#include "arithmetic_mma.cuh"
#include "query_rows.cuh"
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
    using Arith = std::conditional_t<T::kArithmetic == Arithmetic::kMma, MmaArithmetic<T>, F32Arithmetic<T>>;
    static constexpr int kRowTiles = T::kRowTiles;
    static constexpr bool kExact = T::kArithmetic == Arithmetic::kF32;

    // soft-cap and ALiBi, base 2.
    static __device__ __forceinline__ void transform(const DecodeParams& p, const QueryRows& rows, const Visibility& visibility,
                                                     int32_t first_token, const Arith& arith, float (&scores)[kRowTiles][4]) {
        const float* slopes = reinterpret_cast<const float*>(p.alibi_slopes);
        const float cap = p.soft_cap * kLog2E;
        const float per_cap = p.soft_cap > 0.0f ? 2.0f / p.soft_cap : 0.0f;
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
                    const uint32_t row = min(rows.first + 8 * tile + 2 * arith.column + e % 2, rows.total - 1);
                    const int32_t position = visibility.first_position + static_cast<int32_t>(rows.position(row));
                    const int32_t token = first_token + static_cast<int32_t>(arith.row) + 8 * (e / 2);
                    const uint32_t head = mutant(12) ? rows.kv_head_idx * rows.gqa_group : rows.head(row);
                    s += slopes[head] * kLog2E * static_cast<float>(token - position);
                }
                scores[tile][e] = s;
            }
        }
    }

    static __device__ __forceinline__ void mask(const QueryRows& rows, const Visibility& visibility, int32_t first_token,
                                                uint32_t live, const Arith& arith, float (&scores)[kRowTiles][4]) {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const uint32_t row = min(rows.first + 8 * tile + 2 * arith.column + e % 2, rows.total - 1);
                const int32_t position = visibility.first_position + static_cast<int32_t>(rows.position(row));
                const uint32_t in_tile = arith.row + 8 * (e / 2);
                const bool seen = visibility.sees(position, first_token + static_cast<int32_t>(in_tile));
                if (!(live >> in_tile & 1) || !seen) scores[tile][e] = -CUDART_INF_F;
            }
        }
    }

    // Merges the warps' states in warp order and writes the rows of the item.
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
                    states[ring_idx * T::kRows + row] = make_float4(state.reference[tile][j], sum, state.out_exponent[tile][j], 0.0f);
                }
#pragma unroll
                for (int word = 0; word < T::kVWords; ++word) {
                    const float4 four = make_float4(arith.out[2 * word][tile][j], arith.out[2 * word][tile][2 + j],
                                                    arith.out[2 * word + 1][tile][j], arith.out[2 * word + 1][tile][2 + j]);
                    float* to = merge + (ring_idx * T::kRows + row) * T::kMergePitch + T::v_channel(word, arith.row);
                    *reinterpret_cast<float4*>(to) = four;
                }
            }
        }
        __syncthreads();
        constexpr uint32_t kFours = T::kHeadDim / 4;
        const uint32_t num_rows = min(static_cast<uint32_t>(T::kRows), rows.total - rows.first);
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
            write_row(p, item, rows, rows.first + row, channel, merged, x);
        }
        ptx::fence_before_bulk_copies();
        ptx::fence_before_bulk_copies();
        __syncthreads();  // the rings may be filled again, by bulk copies too
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

    static __device__ __forceinline__ void run(const DecodeParams& p, uint8_t* shared) {
        uint32_t lane = threadIdx.x % 32;
        uint32_t warp = threadIdx.x / 32;
        ptx::keep(lane);
        ptx::keep(warp);
        const uint32_t token_warps = blockDim.x / 32;
        const uint32_t tile_stride = token_warps * kTileTokens;
        const uint32_t head_blocks = p.cache.num_kv_heads >> (__ffs(blockDim.y) - 1);
        const uint32_t kv_head = blockIdx.x % head_blocks * blockDim.y + threadIdx.y;
        const uint32_t worker = blockIdx.x / head_blocks;
        const uint32_t ring_idx = threadIdx.y * token_warps + warp;
        const QueryRows rows(p, kv_head, blockIdx.y * T::kRows);
        ptx::launch_dependents();

        uint8_t* ring = shared + ring_idx * T::kWarpBytes;
        uint32_t ring_address = ptx::shared_address(ring);
        ptx::keep(ring_address);
        const uint32_t barriers = ptx::shared_address(shared + T::kBarriersAt) + ring_idx * T::kNumStages * 16;
        TileLoader<T> loader(p.cache, kv_head, lane, tile_stride, barriers);
        Arith arith(p, lane, loader.pitch, ring, shared + T::kQueryAt);
        OnlineState<kRowTiles, T::kAlwaysNormalize, kExact> state;
        ptx::wait_for_previous();  // nothing of device memory is read before this
        if (rows.first >= rows.total) return;

        const uint32_t* worker_starts = reinterpret_cast<const uint32_t*>(p.worker_starts);
        const WorkItem* items = reinterpret_cast<const WorkItem*>(p.items);
        const uint32_t item_end = worker_starts[worker + 1];

        for (uint32_t item_idx = worker_starts[worker]; item_idx < item_end; ++item_idx) {
            const uint4 words = *reinterpret_cast<const uint4*>(items + item_idx);
            const WorkItem item{words.x, words.y, words.z, words.w};
            const uint32_t item_tiles = (item.token_end - item.token_start + kTileTokens - 1) / kTileTokens;
            const uint32_t num_tiles = item_tiles > warp ? (item_tiles - warp + token_warps - 1) / token_warps : 0;
            const uint32_t first_token = item.token_start + warp * kTileTokens + (mutant(2) && warp != 0 ? 1 : 0);

            const auto report = [&](bool bad, uint32_t tile) {
                if (bad && lane < 16 && blockIdx.y == 0) {
                    report_error(p.error, kErrorPageOutOfRange, item.request_idx, kv_head,
                                 first_token + tile * tile_stride + lane, loader.page, 0);
                }
            };
            const auto fill_k = [&](uint32_t slot, uint32_t offset, uint32_t tile) {
                report(loader.locate(lane & 15), tile);
                loader.fill_k(slot, ring_address + offset, lane);
            };
            const auto fill_v = [&](uint32_t slot, uint32_t offset) {
                const uint32_t misaligned = loader.misaligned_rows(lane);
                if (lane == 0) *reinterpret_cast<uint2*>(ring + offset + T::kMetaAt) = make_uint2(loader.live, misaligned);
                loader.fill_v(slot, ring_address + offset, lane);
            };

            typename Arith::RawQuery raw_query;
            loader.begin(page_row(p.cache, item.request_idx), first_token + (lane & 15), item.token_end);
            arith.fetch_query(p, rows, item.request_idx, raw_query);
            const uint32_t kv_len = reinterpret_cast<const uint32_t*>(p.kv_lens)[item.request_idx];
            loader.read_first_pages(ring, lane);
#pragma unroll 1
            for (uint32_t i = 0; i < T::kNumStages; ++i) {
                loader.page = loader.stage_page(ring + i * T::kStageBytes, lane);
                __syncwarp();
                if (i < num_tiles) fill_k(i, i * T::kStageBytes, i);
                ptx::cp_async_commit();
                if (i < num_tiles) fill_v(i, i * T::kStageBytes);
                ptx::cp_async_commit();
            }

            const Visibility visibility(p, kv_len);
            const int32_t clear_begin = visibility.clear_begin();
            const int32_t clear_end = visibility.clear_end() - kTileTokens;
            const bool transformed = p.soft_cap > 0.0f || p.alibi_slopes != 0;
            arith.load_query(p, raw_query, warp);
            arith.clear();
            state.clear();

            uint32_t slot = 0;
            uint32_t offset = 0;  // of the tile's stage in the ring
            int32_t tile_token = static_cast<int32_t>(first_token);
#pragma unroll 1
            for (uint32_t tile = 0; tile < num_tiles; ++tile) {
                const bool refill = tile + T::kNumStages < num_tiles;
                const uint8_t* stage = ring + offset;
                const bool came_as_run = loader.run_slots >> slot & 1;
                ptx::cp_async_wait<2 * T::kNumStages - 1>();
                if (came_as_run) loader.wait_for_run(slot, 0);
                __syncwarp();
                const uint2 meta = *reinterpret_cast<const uint2*>(stage + T::kMetaAt);
                loader.page = loader.stage_page(stage, lane);
                const uint32_t misaligned = T::kGroups == Groups::k8 ? 0 : meta.y;
                float scores[kRowTiles][4];
                arith.score(stage, misaligned, scores);

                __syncwarp();  // K's slot is read, and so are meta and the pages
                if (refill) fill_k(slot, offset, tile + T::kNumStages);
                ptx::cp_async_commit();
                ptx::cp_async_wait<2 * T::kNumStages - 1>();
                if (came_as_run) {
                    loader.wait_for_run(slot, 1);
                    loader.phases ^= 1u << slot;
                }
                __syncwarp();

                int token_exponents[2];
                const bool shifted = arith.prepare_values(stage, misaligned, token_exponents);
                if (transformed) transform(p, rows, visibility, tile_token, arith, scores);
                const uint32_t live = meta.x | (mutant(3) ? 0xffffu : 0u);
                if ((live & 0xffffu) != 0xffffu || tile_token < clear_begin || tile_token > clear_end) {
                    mask(rows, visibility, tile_token, live, arith, scores);
                }
                state.update(scores, shifted, token_exponents, arith.out);
                arith.accumulate(stage, scores);

                __syncwarp();  // V's slot is read
                if (refill) fill_v(slot, offset);
                ptx::cp_async_commit();
                tile_token += static_cast<int32_t>(tile_stride);
                offset += T::kStageBytes;
                if (++slot == T::kNumStages) slot = offset = 0;
            }
            finish_item(p, item, rows, arith, state, shared, ring_idx);
        }
    }
};

}  // namespace kv8
