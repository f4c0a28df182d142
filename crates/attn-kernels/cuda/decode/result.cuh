// From a state (out unnormalized, m in base 2, l) to the caller's out and lse; the sink is one more state, with no value,
// merged last. Shared by the items that cover a request and by stage 2.
#pragma once
#include <math_constants.h>

#include "../common/dtype.cuh"
#include "../common/mutant.cuh"
#include "../common/ptx.cuh"
#include "../params/decode.h"

namespace kv8 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct RowState {
    float m;  // base 2; -inf if nothing was seen
    float l;  // sum of 2^(s - m)
};

// What to multiply the unnormalized output with, and the row's lse.
struct RowResult {
    float factor;
    float lse;
};

__device__ __forceinline__ RowResult finish_row(RowState state, const DecodeParams& p, uint32_t head_idx) {
    if (p.sinks == 0 && !mutant(10) && !mutant(24) && !mutant(19)) {
        // The usual case, which a short step waits for.
        const bool any = state.l > 0.0f;
        return RowResult{any ? ptx::rcp_approx(state.l) : 0.0f, any ? (state.m + log2f(state.l)) * kLn2 : -CUDART_INF_F};
    }
    const float* sinks = reinterpret_cast<const float*>(p.sinks);
    const float sink = sinks != nullptr && !mutant(10) ? sinks[head_idx] * kLog2E : -CUDART_INF_F;
    if (state.l == 0.0f && !mutant(24)) return RowResult{0.0f, sink == -CUDART_INF_F ? sink : sinks[head_idx]};
    const float m = fmaxf(state.m, sink);
    const float rescale = exp2f(state.m - m);
    const float sum = state.l * rescale + exp2f(sink - m);
    return RowResult{rescale / sum, mutant(19) ? m + log2f(sum) : (m + log2f(sum)) * kLn2};
}

}  // namespace kv8
