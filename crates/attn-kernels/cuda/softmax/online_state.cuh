// The running softmax of a warp over its tiles, in the base-2 domain, for the rows of its mma accumulators.
//
// Weights are 2^(s - reference). The reference is not the maximum but follows it: it rises only when a score passes it by more
// than kHeadroom, and is then set kBias below the maximum. So weights stay in f16's range (at most 2^15), small ones keep
// 2^kBias more of it than with the maximum itself, and the output is rescaled rarely.
// The value of a token may carry a power of two (its scales were normalized). Where exponents span more than f32 can bridge
// (SPLIT), out has a whole exponent of its own: out += 2^((s - reference) + (exponent - out_exponent)) * value. The sums are
// taken in that order because a large s would swallow the exponents. With SPLIT the exponent need not be whole: it may be the
// logarithm of a scale that is a factor of the value.
#pragma once
#include <cfloat>

#include "../common/mutant.cuh"
#include "../common/ptx.cuh"
#include "../common/warp.cuh"

namespace kv8 {

constexpr float kHeadroom = 15.0f;
constexpr float kBias = 8.0f;
constexpr float kWideMargin = 9.0f;  // less of both where the values of a tile carry exponents (f16 scales: at most 2^8)

// ROW_TILES tiles of 8 rows; a lane sees rows 2 * (lane % 4) + {0, 1} of each, at tokens lane / 4 + {0, 8}.
// EXACT: exp2f instead of ex2.approx.
template <int ROW_TILES, bool SPLIT, bool EXACT>
struct OnlineState {
    float reference[ROW_TILES][2];
    float sum[ROW_TILES][2];  // of this lane's tokens
    float out_exponent[ROW_TILES][2];  // a whole number; 0 unless SPLIT

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                reference[tile][j] = -FLT_MAX;
                out_exponent[tile][j] = SPLIT ? -FLT_MAX : 0.0f;
                sum[tile][j] = 0.0f;
            }
        }
    }

    static __device__ __forceinline__ float power(float x) { return EXACT ? exp2f(x) : ptx::ex2_approx_ftz(x); }

    // Turns scores (masked ones -inf) into weights, in place. shifts: exponents of this lane's two tokens, if `shifted`
    // (warp-uniform).
    template <int OUT_TILES>
    __device__ __forceinline__ void update(float (&scores)[ROW_TILES][4], bool shifted, const float (&shifts)[2],
                                           float (&out)[OUT_TILES][ROW_TILES][4]) {
        const float margin = !SPLIT && shifted ? kWideMargin : 0.0f;
        const float headroom = kHeadroom - margin;
        const float shift[2] = {SPLIT ? shifts[0] : 0.0f, SPLIT ? shifts[1] : 0.0f};
        bool rises = false;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float above = scores[tile][e] - reference[tile][e % 2];
                rises |= above > headroom;
                if (SPLIT) rises |= above + (shift[e / 2] - out_exponent[tile][e % 2]) > kHeadroom;
            }
        }
        if (__any_sync(kFullWarp, rises && !(mutant(17) && reference[0][0] > -FLT_MAX))) raise(scores, headroom, kBias - margin, shift, out);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float above = scores[tile][e] - reference[tile][e % 2];
                const float weight = power(above);
                sum[tile][e % 2] += weight;
                scores[tile][e] = SPLIT ? power(above + (shift[e / 2] - out_exponent[tile][e % 2])) : weight;
            }
        }
        if (!SPLIT && shifted) {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[tile][e] *= power_of_two(static_cast<int>(shifts[e / 2]));
            }
        }
    }

  private:
    template <int OUT_TILES>
    __device__ __forceinline__ void raise(const float (&scores)[ROW_TILES][4], float headroom, float bias,
                                          const float (&shift)[2], float (&out)[OUT_TILES][ROW_TILES][4]) {
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            float factor[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float s0 = scores[tile][j], s1 = scores[tile][2 + j];
                const float fall = follow(reference[tile][j], column_max(fmaxf(s0, s1)), headroom, bias);
                sum[tile][j] *= power(fall);
                factor[j] = fall;
                if (SPLIT) {
                    const float now = reference[tile][j];
                    const float out_top = column_max(fmaxf((s0 - now) + shift[0], (s1 - now) + shift[1]));
                    const float carried = fall + out_exponent[tile][j];
                    if (fall < 0.0f || out_top > out_exponent[tile][j] + kHeadroom) {
                        // Values that are all zero leave it where it began, and the difference below a number.
                        out_exponent[tile][j] = rintf(fmaxf(fmaxf(carried, -FLT_MAX), out_top - kBias));
                    }
                    factor[j] = carried - out_exponent[tile][j];
                }
                factor[j] = power(factor[j]);
            }
#pragma unroll
            for (int i = 0; i < OUT_TILES; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[i][tile][e] *= mutant(6) ? 1.0f : factor[e % 2];
            }
        }
    }

    // Raises `current` if `top` passed it; returns how far it moved, as a negative number.
    static __device__ __forceinline__ float follow(float& current, float top, float headroom, float bias) {
        if (!(top - current > headroom)) return 0.0f;
        const float before = current;
        current = top - bias;
        return before - current;
    }
};

}  // namespace kv8
