// The running softmax of a warp over its tiles, in the base-2 domain, for the rows of its mma accumulators.
//
// Weights are 2^(s - reference). The reference is not the maximum but follows it: it rises only when a score passes it by more
// than kHeadroom, and is then set kBias below the maximum. So weights stay in f16's range (at most 2^15), small ones keep
// 2^kBias more of it than with the maximum itself, and the output is rescaled rarely.
// The value of a token may carry a power of two (its scales were normalized): out += 2^(s + exponent - out_reference) * value.
#pragma once
#include <cfloat>

#include "../common/mutant.cuh"
#include "../common/ptx.cuh"
#include "../common/warp.cuh"

namespace kv8 {

constexpr float kHeadroom = 15.0f;
constexpr float kBias = 8.0f;

// ROW_TILES tiles of 8 rows; a lane sees rows 2 * (lane % 4) + {0, 1} of each, at tokens lane / 4 + {0, 8}.
// SPLIT: out has its own reference, needed when exponents span more than f32 can bridge. EXACT: exp2f instead of ex2.approx.
template <int ROW_TILES, bool SPLIT, bool EXACT>
struct OnlineState {
    float reference[ROW_TILES][2];
    float sum[ROW_TILES][2];  // of this lane's tokens
    float out_reference[ROW_TILES][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                reference[tile][j] = out_reference[tile][j] = -FLT_MAX;
                sum[tile][j] = 0.0f;
            }
        }
    }

    static __device__ __forceinline__ float power(float x) { return EXACT ? exp2f(x) : ptx::ex2_approx(x); }

    // Turns scores (masked ones -inf) into weights, in place. exponents: of this lane's two tokens.
    template <int OUT_TILES>
    __device__ __forceinline__ void update(float (&scores)[ROW_TILES][4], const int (&exponents)[2],
                                           float (&out)[OUT_TILES][ROW_TILES][4]) {
        const float shift[2] = {static_cast<float>(exponents[0]), static_cast<float>(exponents[1])};
        bool rises = false;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float shifted = scores[tile][e] + shift[e / 2];
                if (SPLIT) {
                    rises |= scores[tile][e] > reference[tile][e % 2] + kHeadroom;
                    rises |= shifted > out_reference[tile][e % 2] + kHeadroom;
                } else {
                    rises |= shifted > reference[tile][e % 2] + kHeadroom;
                }
            }
        }
        if (__any_sync(kFullWarp, rises)) raise(scores, shift, out);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float score = scores[tile][e];
                const float weight = power(score - reference[tile][e % 2]);
                sum[tile][e % 2] += weight;
                scores[tile][e] = SPLIT ? power(score + shift[e / 2] - out_reference[tile][e % 2])
                                        : weight * power_of_two(exponents[e / 2]);
            }
        }
    }

  private:
    template <int OUT_TILES>
    __device__ __forceinline__ void raise(const float (&scores)[ROW_TILES][4], const float (&shift)[2],
                                          float (&out)[OUT_TILES][ROW_TILES][4]) {
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            float factor[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (SPLIT) {
                    const float top = column_max(fmaxf(scores[tile][j], scores[tile][2 + j]));
                    sum[tile][j] *= follow(reference[tile][j], top);
                }
                const float top = column_max(fmaxf(scores[tile][j] + shift[0], scores[tile][2 + j] + shift[1]));
                factor[j] = follow(out_reference[tile][j], top);
                if (!SPLIT) {
                    sum[tile][j] *= factor[j];
                    reference[tile][j] = out_reference[tile][j];
                }
            }
#pragma unroll
            for (int i = 0; i < OUT_TILES; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[i][tile][e] *= mutant(6) ? 1.0f : factor[e % 2];
            }
        }
    }

    // Raises `current` if `top` passed it; returns the factor for what was accumulated against it.
    static __device__ __forceinline__ float follow(float& current, float top) {
        if (!(top > current + kHeadroom)) return 1.0f;
        const float next = top - kBias;
        const float factor = power(current - next);
        current = next;
        return factor;
    }
};

}  // namespace kv8
