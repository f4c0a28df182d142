// Stage 2: merges the partials of each request in token order and writes out and lse.
//
// Grid: x = blocks of rows (any number of the num_q_heads * q_len rows), y = request.
// Block: (head_dim / 4, kMergeLanes). A thread owns four channels of a row. Partials y, y + kMergeLanes, ... of a request are folded to state
// y, and the states are folded in order: the bits of a request depend on its own partials alone. Few partials are one each of
// a state: then every lane takes a row by itself. Requests without partials were finished by stage 1. May be launched as a
// programmatic dependent of stage 1.
#pragma once
#include "result.cuh"

namespace kv8 {

constexpr int kMergeLanes = 8;
constexpr int kMergeBatch = 4;  // partials a thread reads at once
constexpr int kMaxMergeThreads = 256 / 4 * kMergeLanes;

struct MergeState {
    RowState row;
    float4 o;
};

// Folds `b` into `a`; an empty state has m = -inf and l = 0 and changes nothing.
__device__ __forceinline__ void fold(MergeState& a, const MergeState& b) {
    if (b.row.l == 0.0f) return;
    const float m = fmaxf(a.row.m, b.row.m);
    const float wa = a.row.l == 0.0f ? 0.0f : exp2f(a.row.m - m);
    const float wb = mutant(13) ? 1.0f : exp2f(b.row.m - m);
    a.row.m = m;
    a.row.l = a.row.l * wa + b.row.l * wb;
    a.o = make_float4(a.o.x * wa + b.o.x * wb, a.o.y * wa + b.o.y * wb, a.o.z * wa + b.o.z * wb, a.o.w * wa + b.o.w * wb);
}

// Folds partials first, first + step, ... into a state.
__device__ __forceinline__ void fold_partials(MergeState& state, const DecodeParams& p, uint32_t row, uint32_t num_rows, uint32_t first, uint32_t end, uint32_t step) {
    const float4* partial_o = reinterpret_cast<const float4*>(p.partial_o);
    const float2* partial_ml = reinterpret_cast<const float2*>(p.partial_ml);
#pragma unroll 1
    for (; first < end; first += kMergeBatch * step) {
        MergeState batch[kMergeBatch];
#pragma unroll
        for (int i = 0; i < kMergeBatch; ++i) {
            const uint64_t index = static_cast<uint64_t>(min(first + i * step, end - 1)) * num_rows + row;
            const float2 ml = partial_ml[index];
            batch[i] = MergeState{{ml.x, first + i * step < end ? ml.y : 0.0f}, partial_o[index * blockDim.x + threadIdx.x]};
        }
#pragma unroll
        for (int i = 0; i < kMergeBatch; ++i) fold(state, batch[i]);
    }
}

__device__ __forceinline__ MergeState no_state() { return {{-CUDART_INF_F, 0.0f}, make_float4(0.0f, 0.0f, 0.0f, 0.0f)}; }

__device__ __forceinline__ void write_merged(const DecodeParams& p, uint32_t request_idx, uint32_t row, const MergeState& state) {
    const uint32_t head = row / p.q_len;
    const uint32_t position = row % p.q_len;
    const RowResult result = finish_row(state.row, p, head);
    const uint64_t index = (static_cast<uint64_t>(request_idx) * p.q_len + position) * p.num_q_heads + head;
    const float x[4] = {state.o.x * result.factor, state.o.y * result.factor, state.o.z * result.factor, state.o.w * result.factor};
    store_float4(reinterpret_cast<void*>(p.out), (index * blockDim.x + threadIdx.x) * 4, p.out_type, x);
    if (threadIdx.x == 0 && p.lse != 0) reinterpret_cast<float*>(p.lse)[index] = result.lse;
}

__device__ __forceinline__ void merge_partials(const DecodeParams& p) {
    __shared__ float4 shared_o[kMergeLanes][64];
    __shared__ float2 shared_ml[kMergeLanes];
    const uint32_t request_idx = blockIdx.y;
    ptx::launch_dependents();
    if (p.ready == kReadyNothing) ptx::wait_for_previous();
    const uint32_t* starts = reinterpret_cast<const uint32_t*>(p.request_partials);
    const uint32_t begin = starts[request_idx];
    const uint32_t last = min(starts[request_idx + 1], p.partial_capacity);
    const uint32_t end = mutant(14) && last > begin ? last - 1 : last;
    ptx::wait_for_previous();
    if (begin >= end) return;
    const uint32_t num_rows = p.num_q_heads * p.q_len;
    const bool is_few = end - begin <= kMergeLanes;
    const uint32_t first = begin + (is_few ? 0 : threadIdx.y);
    const uint32_t step = is_few ? 1 : kMergeLanes;
    const uint32_t rows_at_once = is_few ? kMergeLanes : 1;
    for (uint32_t row = blockIdx.x * rows_at_once + (is_few ? threadIdx.y : 0); row < num_rows; row += gridDim.x * rows_at_once) {
        MergeState state = no_state();
        fold_partials(state, p, row, num_rows, first, end, step);
        if (!is_few) {
            __syncthreads();
            shared_o[threadIdx.y][threadIdx.x] = state.o;
            if (threadIdx.x == 0) shared_ml[threadIdx.y] = make_float2(state.row.m, state.row.l);
            __syncthreads();
            if (threadIdx.y != 0) continue;
#pragma unroll
            for (int lane = 1; lane < kMergeLanes; ++lane) {
                fold(state, MergeState{{shared_ml[lane].x, shared_ml[lane].y}, shared_o[lane][threadIdx.x]});
            }
        }
        write_merged(p, request_idx, row, state);
    }
}

}  // namespace kv8
