// The products of stage 1 on the tensor cores: S^T = K Q^T and O^T = V^T P^T with m16n8k16, f16 operands, f32 sums.
//
// Tokens are the rows of K's product and the depth of V's, query rows are the columns of both, so GQA groups of any size waste
// only columns. Fragments come straight from shared memory with wide loads: a lane reads consecutive channels of its K rows
// (the order of the channels along the depth is free, q follows it), and for V the same 4 to 16 channels of the four tokens of
// its fragment, which a byte permute turns into token pairs: no transposing loads. Operand rounding: docs/kernel-error.md.
#pragma once
#include "../common/mutant.cuh"
#include "../params/decode.h"
#include "../quant/dequant.cuh"
#include "../quant/normalize.cuh"
#include "query_rows.cuh"
#include "traits.cuh"

namespace kv8 {

// Where the f16 scales of a tile are read from.
struct ScaleSource {
    const uint8_t* rows;
    int pitch;
    uint32_t misaligned;  // rows that start two bytes later
    uint32_t shift;       // channel >> shift is the group

    __device__ __forceinline__ uint32_t one(uint32_t row, uint32_t channel) const {
        if (mutant(15)) channel ^= 8;
        const uint8_t* at = rows + row * pitch + (channel >> shift) * 2 + (misaligned >> row & 1) * 2;
        return *reinterpret_cast<const uint16_t*>(at);
    }

    // Scales of channels [channel, channel + 8) and [channel + 8, channel + 16), packed.
    template <Groups GROUPS>
    __device__ __forceinline__ uint32_t pair(uint32_t row, uint32_t channel) const {
        if constexpr (GROUPS == Groups::k8) {
            const uint32_t both = *reinterpret_cast<const uint32_t*>(rows + row * pitch + channel / 8 * 2);
            return mutant(15) ? both >> 16 | both << 16 : both;
        } else if constexpr (GROUPS == Groups::k16Up) {
            return one(row, channel) * 0x10001u;
        } else {
            return one(row, channel) | one(row, channel + 8) << 16;
        }
    }

    // Scale of up to 8 channels, twice.
    template <Groups GROUPS>
    __device__ __forceinline__ uint32_t single(uint32_t row, uint32_t channel) const {
        if constexpr (GROUPS == Groups::k8) {
            return *reinterpret_cast<const uint16_t*>(rows + row * pitch + channel / 8 * 2) * 0x10001u;
        } else {
            return one(row, channel) * 0x10001u;
        }
    }
};

__device__ __forceinline__ uint32_t low_twice(uint32_t pair) { return __byte_perm(pair, pair, 0x1010); }
__device__ __forceinline__ uint32_t high_twice(uint32_t pair) { return __byte_perm(pair, pair, 0x3232); }

template <class T>
struct MmaArithmetic {
    static constexpr int kRowTiles = T::kRowTiles;
    static constexpr int kQuerySteps = T::kQueryInShared ? 1 : T::kKSteps;
    static constexpr int kPackedGroups = T::kGroups == Groups::k8 ? T::kMaxGroups : 0;

    float out[T::kVTiles][kRowTiles][4];
    uint2 query[kQuerySteps][kRowTiles];
    const uint2* shared_query;
    float factor[kRowTiles][2];    // softmax_scale * log2(e), with the row's power of two unless scales are normalized
    int exponent[kRowTiles][2];    // the row's power of two, where it is kept apart
    uint32_t lane, row, column;    // row = lane / 4, column = lane % 4
    bool careful;                  // look for scales that leave f16's range; else only remember whether there were any
    uint32_t wide_scales;          // top bits set: there were
    const DecodeParams& params;
    uint32_t k_shift, v_shift;
    uint8_t* normal;               // this warp's scratch for normalized scales
    int* exponents;
    ScaleSource values;            // V scales of the tile at hand

    __device__ __forceinline__ MmaArithmetic(const DecodeParams& p, uint32_t lane_idx, uint8_t* warp_shared, uint8_t* query_shared)
        : shared_query(reinterpret_cast<const uint2*>(query_shared)),
          lane(lane_idx),
          row(lane_idx / 4),
          column(lane_idx % 4),
          careful(false),
          wide_scales(0),
          params(p),
          k_shift(group_shift(T::kHeadDim, p.cache.k_group_len)),
          v_shift(group_shift(T::kHeadDim, p.cache.v_group_len)),
          normal(warp_shared + T::kNormalAt),
          exponents(reinterpret_cast<int*>(warp_shared + T::kExponentsAt)) {}

    __device__ __forceinline__ uint32_t k_groups() const { return num_groups(T::kHeadDim, params.cache.k_group_len); }
    __device__ __forceinline__ uint32_t v_groups() const { return num_groups(T::kHeadDim, params.cache.v_group_len); }
    __device__ __forceinline__ uint32_t scale_type() const {
        if constexpr (T::kScales == Scales::kF16) return kScaleF16;
        if constexpr (T::kScales == Scales::kBf16) return kScaleBf16;
        if constexpr (T::kScales == Scales::kF32) return kScaleF32;
        return params.cache.scale_type;
    }

    // The query rows as they lie in memory. Read before the ring is filled: later they would wait behind its copies.
    struct RawQuery {
        uint4 parts[kRowTiles][T::kHeadDim / 32][2];  // 8 channels each; the second half is for f32
    };

    // Where this lane's first channel of its query rows lies; nullptr: there is no such row. Needs nothing but the shapes.
    struct QuerySource {
        const uint8_t* rows[kRowTiles];
    };

    __device__ __forceinline__ QuerySource find_query(const DecodeParams& p, const QueryRows& rows, uint32_t request_idx) const {
        QuerySource source;
        const uint32_t channel = T::k_channel(0, column);
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            const uint32_t query_row = rows.first() + 8 * tile + row;
            const uint64_t element = rows.element(p, request_idx, min(query_row, rows.total() - 1)) + channel;
            const uint8_t* q = reinterpret_cast<const uint8_t*>(p.q) + element * float_bytes(p.q_type);
            source.rows[tile] = query_row < rows.total() ? q : nullptr;
            ptx::keep(source.rows[tile]);
        }
        return source;
    }

    // Makes the way to the queries known, and brings what lies there now into the L2: the kernel before may still write it.
    __device__ __forceinline__ void ask_for(const QuerySource& source) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            if (source.rows[tile] != nullptr) ptx::prefetch_line(source.rows[tile]);
        }
    }

    __device__ __forceinline__ void fetch_query(const DecodeParams& p, const QuerySource& source, RawQuery& raw) const {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int part = 0; part < T::kHeadDim / 32; ++part) {
                constexpr int kParts = T::kKUnitBytes / 8;  // of a unit
                const uint32_t channel = T::k_channel(part / kParts, 0) + 8 * (part % kParts);
                raw.parts[tile][part][0] = raw.parts[tile][part][1] = make_uint4(0, 0, 0, 0);
                if (source.rows[tile] == nullptr) continue;
                if (p.q_type == kFloatF32) {
                    const uint4* src = reinterpret_cast<const uint4*>(source.rows[tile] + channel * 4);
                    raw.parts[tile][part][0] = src[0];
                    raw.parts[tile][part][1] = src[1];
                } else {
                    raw.parts[tile][part][0] = *reinterpret_cast<const uint4*>(source.rows[tile] + channel * 2);
                }
            }
        }
    }

    // Makes B fragments of the query rows; each row is scaled by a power of two so that its largest magnitude lies in
    // [2^14, 2^15). Lane `row` of a row tile holds query row `row`.
    __device__ __forceinline__ void load_query(const DecodeParams& p, const RawQuery& raw, uint32_t warp) {
        const float scale = p.softmax_scale * 1.4426950408889634f;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            float x[T::kKUnits][T::kKUnitBytes];
            float largest = 0.0f;
            with_type(p.q_type, [&](auto type) {
#pragma unroll
                for (int unit = 0; unit < T::kKUnits; ++unit) {
#pragma unroll
                    for (int part = 0; part < T::kKUnitBytes / 8; ++part) {
                        const uint4(&halves)[2] = raw.parts[tile][unit * (T::kKUnitBytes / 8) + part];
                        float eight[8];
                        unpack_float8(halves[0], halves[1], decltype(type)::value, eight);
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            x[unit][8 * part + i] = eight[i];
                            largest = fmaxf(largest, fabsf(eight[i]));
                        }
                    }
                }
            });
            largest = segment_max(largest, 4);
            const int exp = largest > 0.0f && largest <= FLT_MAX ? clamp_int(floor_log2(largest) - 14, -126, 126) : 0;
            const float shrink = power_of_two(-exp);
#pragma unroll
            for (int unit = 0; unit < T::kKUnits; ++unit) {
#pragma unroll
                for (int word = 0; word < T::kKWordsPerUnit; ++word) {
                    const float* four = &x[unit][4 * word];
                    const uint2 fragment = make_uint2(ptx::pack_f16x2(four[0] * shrink, four[2] * shrink),
                                                      ptx::pack_f16x2(four[1] * shrink, four[3] * shrink));
                    const int step = unit * T::kKWordsPerUnit + word;
                    if constexpr (T::kQueryInShared) {
                        if (warp == 0) const_cast<uint2*>(shared_query)[(step * kRowTiles + tile) * 32 + lane] = fragment;
                    } else {
                        query[step][tile] = fragment;
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row_exp = __shfl_sync(kFullWarp, exp, (2 * column + j) * 4);
                exponent[tile][j] = row_exp;
                factor[tile][j] = T::kAlwaysNormalize ? scale : scale * power_of_two(row_exp);
            }
        }
        if constexpr (T::kQueryInShared) __syncthreads();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < T::kVTiles; ++i) {
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[i][tile][e] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void begin_item(bool carefully) {
        careful = carefully;
        wide_scales = 0;
    }

    // Whether the item has to be done again with `careful` set.
    __device__ __forceinline__ bool was_careless() const {
        return !T::kAlwaysNormalize && !T::kLooksFirst && !careful && __any_sync(kFullWarp, (wide_scales & 0x80008000u) != 0);
    }

    // Scores of the tile's tokens (rows `row` and `row` + 8), base 2, before caps and masks.
    template <class Shape>
    __device__ __forceinline__ void score(const Shape& shape, const uint8_t* stage, uint32_t misaligned,
                                          float (&scores)[kRowTiles][4]) {
        const uint8_t* scales = stage + (mutant(16) ? shape.values_at : 0) + shape.scales_at;
        ScaleSource source{scales, static_cast<int>(shape.scale_pitch), misaligned & 0xffffu, k_shift};
        uint32_t pairs[T::kKUnits][2];
        bool normalized = T::kAlwaysNormalize;
        if constexpr (T::kAlwaysNormalize) {
            source = normalize(scales, shape.scale_pitch, source.misaligned, k_groups(), k_shift);
        }
        load_pairs(source, pairs);
        if constexpr (!T::kAlwaysNormalize) {
            if constexpr (!T::kLooksFirst) {
#pragma unroll
                for (int unit = 0; unit < T::kKUnits; ++unit) {
                    wide_scales |= (pairs[unit][0] + kWideF16Test) | (pairs[unit][1] + kWideF16Test);
                }
            }
            if (T::kLooksFirst || careful) {
                bool wide = false;
#pragma unroll
                for (int unit = 0; unit < T::kKUnits; ++unit) wide |= holds_wide_scale(pairs[unit][0]) || holds_wide_scale(pairs[unit][1]);
                normalized = __any_sync(kFullWarp, wide);
                if (normalized) {
                    load_pairs(normalize(source.rows, source.pitch, source.misaligned, k_groups(), k_shift), pairs);
                }
            }
        }
        constexpr int kChains = kRowTiles == 1 ? 2 : 1;  // sums that do not wait for each other
        float sums[kChains][kRowTiles][4];
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) {
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[chain][tile][e] = 0.0f;
            }
        }
#pragma unroll
        for (int unit = 0; unit < T::kKUnits; ++unit) {
            uint32_t words[2][T::kKWordsPerUnit];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                load_words(stage + (row + 8 * r) * shape.pitch + placed<Shape>(T::k_channel(unit, column), row), words[r]);
            }
#pragma unroll
            for (int word = 0; word < T::kKWordsPerUnit; ++word) {
                const int step = unit * T::kKWordsPerUnit + word;
                const bool high = T::kKWordsPerUnit == 4 && word >= 2;
                const uint32_t scale0 = high ? high_twice(pairs[unit][0]) : low_twice(pairs[unit][0]);
                const uint32_t scale1 = high ? high_twice(pairs[unit][1]) : low_twice(pairs[unit][1]);
                const uint32_t a0 = ptx::mul_f16x2(even_codes(words[0][word]), scale0);
                const uint32_t a1 = ptx::mul_f16x2(even_codes(words[1][word]), scale1);
                const uint32_t a2 = ptx::mul_f16x2(odd_codes(words[0][word]), scale0);
                const uint32_t a3 = ptx::mul_f16x2(odd_codes(words[1][word]), scale1);
#pragma unroll
                for (int tile = 0; tile < kRowTiles; ++tile) {
                    const uint2 b = T::kQueryInShared ? shared_query[(step * kRowTiles + tile) * 32 + lane]
                                                      : query[step % kQuerySteps][tile];
                    ptx::mma_16x8x16(sums[step % kChains][tile], a0, a1, a2, a3, b.x, b.y);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[tile][e] = kChains == 2 ? sums[0][tile][e] + sums[kChains - 1][tile][e] : sums[0][tile][e];
        }
        if constexpr (T::kAlwaysNormalize) {
            const int token_exponent[2] = {exponents[row], exponents[row + 8]};
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int exp = clamp_int(token_exponent[e / 2] + exponent[tile][e % 2], -126, 127);
                    scores[tile][e] = scores[tile][e] * factor[tile][e % 2] * power_of_two(exp);
                }
            }
        } else {
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                for (int e = 0; e < 4; ++e) scores[tile][e] *= factor[tile][e % 2];
            }
            if (normalized) {
                const float raise[2] = {power_of_two(exponents[row]), power_of_two(exponents[row + 8])};
#pragma unroll
                for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) scores[tile][e] *= raise[e / 2];
                }
            }
        }
    }

    // Makes the tile's V scales ready. True if they were normalized: then `token_exponents` are the powers of two of tokens
    // `row` and `row` + 8.
    template <class Shape>
    __device__ __forceinline__ bool prepare_values(const Shape& shape, const uint8_t* stage, uint32_t misaligned,
                                                   float (&token_exponents)[2]) {
        values = ScaleSource{stage + shape.values_at + shape.scales_at, static_cast<int>(shape.scale_pitch), misaligned >> 16, v_shift};
        bool normalized = T::kAlwaysNormalize;
        if (!T::kAlwaysNormalize && (T::kLooksFirst || careful)) {
            // Each lane looks at half of a row: every scale of the tile is seen once.
            const uint8_t* own = values.rows + (lane & 15) * values.pitch;
            bool wide = false;
            if constexpr (kPackedGroups > 0) {
#pragma unroll
                for (int i = 0; i < kPackedGroups / 4; ++i) {
                    wide |= holds_wide_scale(reinterpret_cast<const uint32_t*>(own)[(lane / 16) * (kPackedGroups / 4) + i]);
                }
            } else {
                own += (values.misaligned >> (lane & 15) & 1) * 2;
                for (uint32_t i = lane / 16; i < v_groups(); i += 2) {
                    wide |= holds_wide_scale(reinterpret_cast<const uint16_t*>(own)[i]);
                }
            }
            normalized = __any_sync(kFullWarp, wide);
        }
        if (T::kAlwaysNormalize || normalized) {
            values = normalize(values.rows, values.pitch, values.misaligned, v_groups(), v_shift);
            token_exponents[0] = static_cast<float>(exponents[row]);
            token_exponents[1] = static_cast<float>(exponents[row + 8]);
        }
        return normalized;
    }

    // out += weights * V of the tile.
    template <class Shape>
    __device__ __forceinline__ void accumulate(const Shape& shape, const uint8_t* stage, const float (&weights)[kRowTiles][4]) {
        uint2 p[kRowTiles];
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
            p[tile].x = ptx::transpose_8x8(ptx::pack_f16x2(weights[tile][0], weights[tile][1]));
            p[tile].y = ptx::transpose_8x8(ptx::pack_f16x2(weights[tile][2], weights[tile][3]));
        }
        const uint8_t* codes = stage + shape.values_at;
        constexpr int kFirst = T::kHeadDim == 64 || T::kHeadDim == 96 ? 2 : 4;
        accumulate_unit<0, kFirst>(shape, codes, p);
        if constexpr (T::kVWords > kFirst) accumulate_unit<kFirst, T::kVWords - kFirst>(shape, codes, p);
    }

    static constexpr float kOutExponent = 0.0f;

    // Writes what the lane holds of query row 2 * column + j of `tile` to a row of out.
    __device__ __forceinline__ void store(float* to, int tile, int j) const {
#pragma unroll
        for (int word = 0; word < T::kVWords; ++word) {
            *reinterpret_cast<float4*>(to + T::v_channel(word, row)) = make_float4(
                out[2 * word][tile][j], out[2 * word][tile][2 + j], out[2 * word + 1][tile][j], out[2 * word + 1][tile][2 + j]);
        }
    }

  private:
    __device__ __forceinline__ ScaleSource normalize(const uint8_t* raw, int raw_pitch, uint32_t misaligned, uint32_t groups,
                                                     uint32_t shift) {
        __syncwarp();  // what was normalized before is read
        normalize_scales<kPackedGroups>(raw, raw_pitch, misaligned, groups, scale_type(), normal, T::kNormalPitch, exponents, lane);
        return ScaleSource{normal, T::kNormalPitch, 0u, shift};
    }

    __device__ __forceinline__ void load_pairs(const ScaleSource& source, uint32_t (&pairs)[T::kKUnits][2]) const {
#pragma unroll
        for (int unit = 0; unit < T::kKUnits; ++unit) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t channel = T::k_channel(unit, column);
                pairs[unit][r] = T::kKUnitBytes == 16 ? source.template pair<T::kGroups>(row + 8 * r, channel)
                                                      : source.template single<T::kGroups>(row + 8 * r, channel);
            }
        }
    }

    template <int WORDS>
    static __device__ __forceinline__ void load_words(const uint8_t* src, uint32_t (&words)[WORDS]) {
        if constexpr (WORDS == 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(src);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else if constexpr (WORDS == 2) {
            const uint2 v = *reinterpret_cast<const uint2*>(src);
            words[0] = v.x, words[1] = v.y;
        } else {
            words[0] = *reinterpret_cast<const uint32_t*>(src);
        }
    }

    // Where the 16-byte piece of `channel` lies in a row of codes.
    template <class Shape>
    static __device__ __forceinline__ uint32_t placed(uint32_t channel, uint32_t token) {
        return channel ^ (token & Shape::swizzle) * 16;
    }

    // The token rows of a V fragment: k = 2c, 2c + 1, 2c + 8, 2c + 9.
    __device__ __forceinline__ uint32_t fragment_token(int i) const { return 2 * column + ((i ^ (mutant(18) ? 1 : 0)) & 1) + (i & 2) * 4; }

    template <int WORD0, int WORDS, class Shape>
    __device__ __forceinline__ void accumulate_unit(const Shape& shape, const uint8_t* codes, const uint2 (&p)[kRowTiles]) {
        const uint32_t channel = T::v_channel(WORD0, row);
        uint32_t words[4][WORDS];
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_words(codes + fragment_token(i) * shape.pitch + placed<Shape>(channel, fragment_token(i)), words[i]);
            pairs[i] = WORDS == 4 ? values.template pair<T::kGroups>(fragment_token(i), channel)
                                  : values.template single<T::kGroups>(fragment_token(i), channel);
            if (!T::kAlwaysNormalize && !T::kLooksFirst) wide_scales |= pairs[i] + kWideF16Test;
        }
        const uint32_t low01 = __byte_perm(pairs[0], pairs[1], 0x5410);
        const uint32_t low23 = __byte_perm(pairs[2], pairs[3], 0x5410);
        const uint32_t high01 = WORDS == 4 ? __byte_perm(pairs[0], pairs[1], 0x7632) : low01;
        const uint32_t high23 = WORDS == 4 ? __byte_perm(pairs[2], pairs[3], 0x7632) : low23;
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            const uint32_t scale01 = word >= 2 ? high01 : low01;
            const uint32_t scale23 = word >= 2 ? high23 : low23;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Bytes: channel x of both tokens, channel x + 1 of both tokens, interleaved so that pairs are (0, 2), (1, 3).
                const uint32_t select = half == 0 ? 0x5410 : 0x7632;
                const uint32_t codes01 = __byte_perm(words[0][word], words[1][word], select);
                const uint32_t codes23 = __byte_perm(words[2][word], words[3][word], select);
                const uint32_t a0 = ptx::mul_f16x2(even_codes(codes01), scale01);
                const uint32_t a1 = ptx::mul_f16x2(odd_codes(codes01), scale01);
                const uint32_t a2 = ptx::mul_f16x2(even_codes(codes23), scale23);
                const uint32_t a3 = ptx::mul_f16x2(odd_codes(codes23), scale23);
#pragma unroll
                for (int tile = 0; tile < kRowTiles; ++tile) {
                    ptx::mma_16x8x16(out[2 * (WORD0 + word) + half][tile], a0, a1, a2, a3, p[tile].x, p[tile].y);
                }
            }
        }
    }
};

}  // namespace kv8
