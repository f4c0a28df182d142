// Stage 2: merges the partials of each request in token order and writes out and lse.
//
// Grid: x blocks share out the num_q_heads * q_len rows of a request, y blocks the requests; any number of each. Few enough of them find room
// while stage 1 ends, and let the kernel after them begin to look for it too; where stage 1 fills the device only once it has ended (docs/kernel-log.md,
// section 22).
// Block: (head_dim / 4, kMergeLanes). A thread owns four channels of a row. With few partials a lane takes a row by itself and folds
// them in order. Else the block takes a row: partials y, y + kMergeLanes, ... are folded to state y, and the states in order. Either way
// the bits of a request depend on its own partials alone. Requests without partials were finished by stage 1. May be launched as a
// programmatic dependent of stage 1.
#pragma once
#include "result.cuh"

namespace kv8 {

constexpr int kMergeLanes = 8;
constexpr int kMergeBatch = 4;  // partials a thread reads at once
constexpr uint32_t kFewPartials = 16;
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

// Stage 2 of a request with so many partials that every row takes a block.
__device__ __forceinline__ void merge_many(const DecodeParams& p, uint32_t request_idx, uint32_t begin, uint32_t end, uint32_t num_rows) {
    __shared__ float4 shared_o[kMergeLanes][64];
    __shared__ float2 shared_ml[kMergeLanes];
    for (uint32_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
        MergeState state = no_state();
        fold_partials(state, p, row, num_rows, begin + threadIdx.y, end, kMergeLanes);
        __syncthreads();
        shared_o[threadIdx.y][threadIdx.x] = state.o;
        if (threadIdx.x == 0) shared_ml[threadIdx.y] = make_float2(state.row.m, state.row.l);
        __syncthreads();
        if (threadIdx.y != 0) continue;
#pragma unroll
        for (int lane = 1; lane < kMergeLanes; ++lane) {
            fold(state, MergeState{{shared_ml[lane].x, shared_ml[lane].y}, shared_o[lane][threadIdx.x]});
        }
        write_merged(p, request_idx, row, state);
    }
}

__device__ __forceinline__ void merge_partials(const DecodeParams& p) {
    if (p.fills_device == 0) ptx::launch_dependents();
    if (p.ready == kReadyNothing) ptx::wait_for_previous();
    const uint32_t* starts = reinterpret_cast<const uint32_t*>(p.request_partials);
    const uint32_t num_rows = p.num_q_heads * p.q_len;
    const uint32_t num_groups = (num_rows + kMergeLanes - 1) / kMergeLanes;  // of rows, a lane each
    const uint32_t group_blocks = min(num_groups, gridDim.x);                // that share out a request of few partials
    const uint32_t turn = blockIdx.x / group_blocks;                         // which of these requests fall to this block
    const uint32_t num_turns = gridDim.x / group_blocks;
    // The tables are looked at before the wait, if they were ready before stage 1: later they are near.
    const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (uint32_t i = blockIdx.y + (thread + 1) * gridDim.y; i < p.batch; i += blockDim.x * blockDim.y * gridDim.y) ptx::touch(starts + i);
    uint32_t begin = starts[blockIdx.y];
    uint32_t past = starts[blockIdx.y + 1];
    ptx::wait_for_previous();
    if (p.fills_device != 0) ptx::launch_dependents();
    uint32_t next_turn = 0;
    for (uint32_t request_idx = blockIdx.y; request_idx < p.batch; request_idx += gridDim.y) {
        const uint32_t last = min(past, p.partial_capacity);
        const uint32_t first = begin;
        const uint32_t end = mutant(14) && last > first ? last - 1 : last;
        const uint32_t next = min(request_idx + gridDim.y, p.batch - 1);
        begin = starts[next];
        past = starts[next + 1];
        const bool is_mine = next_turn == turn;
        next_turn = next_turn + 1 == num_turns ? 0 : next_turn + 1;
        if (first >= end) continue;
        if (end - first > kFewPartials) {
            merge_many(p, request_idx, first, end, num_rows);
        } else if (is_mine) {
            for (uint32_t row = (blockIdx.x - turn * group_blocks) * kMergeLanes + threadIdx.y; row < num_rows; row += group_blocks * kMergeLanes) {
                MergeState state = no_state();
                fold_partials(state, p, row, num_rows, first, end, 1);
                write_merged(p, request_idx, row, state);
            }
        }
    }
}

}  // namespace kv8
