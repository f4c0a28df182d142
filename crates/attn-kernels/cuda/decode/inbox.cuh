// The shares of a request, merged by the CTAs of a cluster (sm_90) through each other's shared memory: no partials, no stage 2.
//
// A cluster of num_shares CTAs takes one request and head block, CTA `rank` one of as many equal contiguous shares of the visible
// tokens, cut at tiles of 64. The elements of the result (a row's four channels) are owned in equal runs, one a CTA. Each CTA
// merges its own warps and sends every element with its (m, l) to the inbox of the owner, which counts their bytes, merges the
// shares in fixed order and writes out and lse. The inbox lies behind the variant's shared memory and is used for nothing else: whoever is
// done may send, whatever the others are doing, once all have opened their inboxes.
#pragma once
#include "../common/ptx.cuh"
#include "../common/warp.cuh"
#include "result.cuh"
#include "traits.cuh"

namespace kv8 {

constexpr uint32_t kShareTile = 4 * kTileTokens;
constexpr uint32_t kMostShares = 16;  // CTAs of a cluster

// x / y for both below 2^12: a half more of x keeps the quotient further from a whole number than rcp_approx errs.
__device__ __forceinline__ uint32_t small_quotient(uint32_t x, uint32_t y) {
    return static_cast<uint32_t>((static_cast<float>(x) + 0.5f) * ptx::rcp_approx_ftz(static_cast<float>(y)));
}

// HEAD_DIM of the variant; BEGIN: bytes of shared memory in front of the inbox.
template <int HEAD_DIM, int BEGIN>
struct Inbox {
    static constexpr uint32_t kFours = HEAD_DIM / 4;
    static constexpr int kBarrierAt = BEGIN;
    static constexpr int kElementsAt = kBarrierAt + 16;  // float4 [heads][per_share][num_shares], then float2 of the same shape
    static_assert(BEGIN % 16 == 0);

    uint32_t num_shares;
    uint32_t rank;
    uint32_t per_share;  // elements of a head that a CTA owns at most
    uint32_t owned;      // by this one
    uint32_t barrier;

    // Where an element goes: the barrier of its owner, and its place among what that one receives.
    struct Address {
        uint32_t barrier;
        uint32_t slot;
    };

    // Made anew where it is used, rather than kept in registers through the tiles.
    __device__ __forceinline__ Inbox(uint32_t shares, uint32_t num_rows, uint8_t* shared)
        : num_shares(shares), rank(ptx::cluster_rank()), barrier(ptx::shared_address(shared + kBarrierAt)) {
        const uint32_t elements = num_rows * kFours;
        per_share = small_quotient(elements + num_shares - 1, num_shares);
        owned = min(elements, (rank + 1) * per_share) - min(elements, rank * per_share);
    }

    // Once, by all threads: opens the inbox of this CTA and says so to the others.
    __device__ __forceinline__ void open() const {
        const bool opens = threadIdx.x == 0 && threadIdx.y == 0;
        if (opens) {
            ptx::barrier_init(barrier);
            ptx::fence_barrier_init();
        }
        __syncwarp();
        if (opens) ptx::barrier_expect(barrier, owned * num_shares * blockDim.y * 24);
        __syncwarp();
        ptx::cluster_arrive();
    }

    // Once, before the first `send`.
    __device__ __forceinline__ void wait_for_others() const { ptx::cluster_wait(); }

    __device__ __forceinline__ Address address_of(uint32_t element) const {
        const uint32_t owner = small_quotient(element, per_share);
        return {ptx::address_in(barrier, owner), slot(element - owner * per_share, rank)};
    }

    __device__ __forceinline__ void send(const Address& address, const RowState& state, const float (&x)[4]) const {
        const uint32_t base = address.barrier + (kElementsAt - kBarrierAt);
        ptx::send_async(base + address.slot * 16, make_float4(x[0], x[1], x[2], x[3]), address.barrier);
        ptx::send_async(states_at(base) + address.slot * 8, make_float2(state.m, state.l), address.barrier);
    }

    // For each element of this thread's head that this CTA owns, by one thread: `write(place(element), state, x)`. What `place`
    // works out is ready when the shares arrive.
    template <class Place, class Write>
    __device__ __forceinline__ void receive(uint8_t* shared, Place&& place, Write&& write) const {
        const uint8_t* base = shared + kElementsAt;
        const uint32_t lanes_log2 = 32 - __clz(num_shares - 1);
        const uint32_t lanes = 1u << lanes_log2;
        bool waits = true;
        for (uint32_t first = 0; first < owned << lanes_log2; first += blockDim.x) {
            const uint32_t idx = first + threadIdx.x;
            const uint32_t source = idx & (lanes - 1);
            const uint32_t local = idx >> lanes_log2;
            const bool sent = local < owned && source < (mutant(27) ? num_shares - 1 : num_shares);
            const bool writes = source == 0 && local < owned;
            const uint32_t at = slot(sent ? local : 0, sent ? source : 0);
            const auto target = place(rank * per_share + (writes ? local : 0));
            if (waits) ptx::cluster_barrier_wait(barrier, 0);
            waits = false;
            float4 o = *reinterpret_cast<const float4*>(base + at * 16);
            float2 ml = *reinterpret_cast<const float2*>(states_at(base) + at * 8);
            if (!sent) o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (!sent || !(ml.y > 0.0f)) ml = make_float2(-CUDART_INF_F, 0.0f);
            float m = ml.x;
#pragma unroll
            for (uint32_t step = 1; step < kMostShares; step *= 2) {
                if (step < lanes) m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, step));
            }
            const float weight = ml.y > 0.0f ? (mutant(26) ? 1.0f : ptx::ex2_approx(ml.x - m)) : 0.0f;
            float sums[5] = {ml.y * weight, o.x * weight, o.y * weight, o.z * weight, o.w * weight};
#pragma unroll
            for (uint32_t step = 1; step < kMostShares; step *= 2) {
                if (step >= lanes) break;
#pragma unroll
                for (int i = 0; i < 5; ++i) sums[i] += __shfl_xor_sync(kFullWarp, sums[i], step);
            }
            if (writes) {
                float x[4] = {sums[1], sums[2], sums[3], sums[4]};
                write(target, RowState{m, sums[0]}, x);
            }
        }
    }

  private:
    __device__ __forceinline__ uint32_t slot(uint32_t local, uint32_t source) const {
        return (threadIdx.y * per_share + local) * num_shares + source;
    }
    template <class Base>
    __device__ __forceinline__ Base states_at(Base base) const {
        return base + blockDim.y * per_share * num_shares * 16;
    }
};

}  // namespace kv8
