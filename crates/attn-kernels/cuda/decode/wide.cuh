// What the two kernels of eight warps a CTA have in common, shares.cuh and items.cuh: their shared memory, how a warp attends to its part of
// a range of tokens, how the warps hand over and are merged, where a result is written. The tiles are those of stage1.cuh, by the same code;
// around them no more than a kernel needs, so that it fits 128 registers.
//
// Block: x = 32 * WARPS, all on the tokens of one kv head: warp w takes the 16-token tiles w, w + WARPS, ... of a range. Grid: x = kv head,
// y = block of T::kRows query rows, z = as each says.
#pragma once
#include "stage1.cuh"

namespace kv8 {

constexpr int kWideWarps = 8;

// OWN_BYTES: of shared memory that the kernel keeps for itself.
template <class T, int WARPS, int OWN_BYTES>
struct Wide {
    using Parts = Stage1<T>;
    using Arith = typename Parts::Arith;
    using State = typename Parts::State;
    static constexpr uint32_t kFours = T::kHeadDim / 4;
    static constexpr uint32_t kTileStride = WARPS * kTileTokens;
    static constexpr bool kMayRepeat = T::kArithmetic == Arithmetic::kMma && !T::kAlwaysNormalize && !T::kLooksFirst;

    // Shared memory: the rings, and in each, when its tiles are done, the warp's out; the warps' states; the queries, where they are
    // kept there; what the kernel has of its own; the barriers of bulk copies.
    static constexpr int kStatesAt = WARPS * T::kWarpBytes;             // float4 [WARPS][kRows]
    static constexpr int kQueryAt = kStatesAt + WARPS * T::kRows * 16;  // as in Traits
    static constexpr int kOwnAt = kQueryAt + T::kQueryBytes;
    static constexpr int kBarriersAt = kOwnAt + OWN_BYTES;  // u64 [WARPS][kNumStages]
    static constexpr int kSharedBytes = round_up(kBarriersAt + WARPS * T::kNumStages * 8, 16);
    static_assert(T::kRows * T::kMergePitch * 4 <= T::kWarpBytes);

    struct Range {
        uint32_t start;
        uint32_t end;
    };

    // Attends to what is of warp `warp` in a range, whichever way its tiles come. `request` is asked where it is needed; `first` and `again`
    // are `wait` and `careful` of Stage1::Share, `again` is its answer too; `phases` are those of the barriers; the rest is as do_share says.
    template <bool LETS_GO, class Request, class Before, class Pieces>
    static __device__ __forceinline__ void attend(const DecodeParams& p, uint8_t* shared, uint32_t& lane, uint32_t& warp, const Range& range,
                                                  Request&& request, bool& first, bool& again, uint32_t& phases, Arith& arith, State& state,
                                                  Before&& before_queries, Pieces pieces) {
        uint8_t* ring = shared + warp * T::kWarpBytes;
        const uint32_t barriers = ptx::shared_address(shared + kBarriersAt) + warp * T::kNumStages * 8;
        const auto attend_by = [&](auto make) {
            const uint32_t first_token = range.start + warp * kTileTokens;
            const uint32_t tiles = (range.end - range.start + kTileTokens - 1) / kTileTokens;
            const uint32_t num_tiles = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
            const typename Parts::Share share{p,           ring,      lane,      warp,  kTileStride, request(),
                                              first_token, range.end, num_tiles, first, again};
            auto loader = make();
            again = Parts::template do_share<LETS_GO>(share, loader, arith, state, before_queries, pieces);
            return loader;
        };
        const bool aligned = range.start % kTileTokens == 0;
        if (RunLoader<T>::serves(p.cache) && aligned) {
            phases = attend_by([&] { return RunLoader<T>(p.cache, ptx::block_x(), lane, kTileStride, ring, barriers, phases); }).phases;
        } else if (T::kBlocks && aligned && BlockLoader<T>::serves(p.cache)) {
            if constexpr (T::kBlocks) attend_by([&] { return BlockLoader<T>(p.cache, ptx::block_x(), lane, kTileStride, ring); });
        } else {
            attend_by([&] { return RowLoader<T>(p.cache, ptx::block_x(), lane, kTileStride, ring); });
        }
    }

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
};

// Queries wait in shared memory where that saves registers.
template <int MIN_CTAS, int HEAD_DIM, Groups GROUPS, Scales SCALES, int ROW_TILES, Arithmetic ARITHMETIC, int NUM_STAGES>
using WideTraits = Traits<HEAD_DIM, GROUPS, SCALES, ROW_TILES, ARITHMETIC, NUM_STAGES, MIN_CTAS, GROUPS != Groups::kWhole>;

}  // namespace kv8
