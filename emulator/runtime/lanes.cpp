// Instructions of a whole warp: what its lanes exchange, and the products of the tensor cores.
#include "../device/cuda_fp16.h"
#include "../device/warp_instructions.hpp"

namespace kv8::emulated {

void only_meet(const LaneOperands&, LaneOperands&, uint32_t) {}

// `source` gives the lane to take from; a lane outside of the segment, or one that has ended, leaves the value as it is.
template <class Source>
static void take(const LaneOperands& brought, LaneOperands& results, uint32_t present, Source source) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t width = brought[lane].words[3];
        const uint32_t first = lane & ~(width - 1);
        const int64_t from = source(lane, first, width, brought[lane].words[2]);
        const bool is_there = from >= first && from < first + width && (present >> from & 1) != 0;
        const Operands& what = brought[is_there ? from : lane];
        results[lane].words[0] = what.words[0], results[lane].words[1] = what.words[1];
    }
}

void shuffle_from(const LaneOperands& brought, LaneOperands& results, uint32_t present) {
    take(brought, results, present, [](uint32_t, uint32_t first, uint32_t width, uint32_t by) -> int64_t { return first + (by & (width - 1)); });
}
void shuffle_xor(const LaneOperands& brought, LaneOperands& results, uint32_t present) {
    take(brought, results, present, [](uint32_t lane, uint32_t, uint32_t, uint32_t by) -> int64_t { return lane ^ by; });
}
void shuffle_up(const LaneOperands& brought, LaneOperands& results, uint32_t present) {
    take(brought, results, present, [](uint32_t lane, uint32_t, uint32_t, uint32_t by) -> int64_t { return static_cast<int64_t>(lane) - by; });
}

void ballot(const LaneOperands& brought, LaneOperands& results, uint32_t present) {
    uint32_t bits = 0;
    for (uint32_t lane = 0; lane < kLanes; ++lane) bits |= (present >> lane & brought[lane].words[0] & 1) << lane;
    for (Operands& result : results) result.words[0] = bits;
}

static float f16_at(const uint32_t* words, uint32_t idx) {
    return __half2float({static_cast<uint16_t>(words[idx / 2] >> (16 * (idx % 2)))});
}

// Fragments as PTX lays them out: group = lane / 4, column = lane % 4; of a: (row, depth) in words (group, low), (group + 8, low),
// (group, high), (group + 8, high); of b: low and high depth of column `group`; of d: (group, 2 * column + {0, 1}), then group + 8.

void mma_16x8x16(const LaneOperands& brought, LaneOperands& results, uint32_t) {
    float a[16][16], b[8][16];
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t group = lane / 4, column = lane % 4;
        const uint32_t* words = brought[lane].words + 4;
        for (uint32_t word = 0; word < 4; ++word) {
            for (uint32_t i = 0; i < 2; ++i) a[group + 8 * (word % 2)][2 * column + 8 * (word / 2) + i] = f16_at(words, 2 * word + i);
        }
        for (uint32_t word = 0; word < 2; ++word) {
            for (uint32_t i = 0; i < 2; ++i) b[group][2 * column + 8 * word + i] = f16_at(words, 8 + 2 * word + i);
        }
    }
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        for (uint32_t e = 0; e < 4; ++e) {
            const uint32_t row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
            // Products of f16 are exact in f32; their sum is rounded once, where the tensor cores keep fewer bits.
            double sum = __uint_as_float(brought[lane].words[e]);
            for (uint32_t k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k] * b[column][k]);
            results[lane].words[e] = __float_as_uint(static_cast<float>(sum));
        }
    }
}

void mma_16x8x32(const LaneOperands& brought, LaneOperands& results, uint32_t) {
    int32_t a[16][32], b[8][32];
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t group = lane / 4, column = lane % 4;
        const uint32_t* words = brought[lane].words + 4;
        for (uint32_t i = 0; i < 4; ++i) {
            for (uint32_t word = 0; word < 4; ++word) a[group + 8 * (word % 2)][4 * column + 16 * (word / 2) + i] = static_cast<int8_t>(words[word] >> (8 * i));
            for (uint32_t word = 0; word < 2; ++word) b[group][4 * column + 16 * word + i] = static_cast<int8_t>(words[4 + word] >> (8 * i));
        }
    }
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        for (uint32_t e = 0; e < 4; ++e) {
            const uint32_t row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
            int32_t sum = static_cast<int32_t>(brought[lane].words[e]);
            for (uint32_t k = 0; k < 32; ++k) sum += a[row][k] * b[column][k];
            results[lane].words[e] = static_cast<uint32_t>(sum);
        }
    }
}

// Words 0 to 3 of lane i: the 16 bytes of row i % 8 of matrix i / 8.
static uint32_t row_word(const LaneOperands& brought, uint32_t matrix, uint32_t row, uint32_t word) { return brought[matrix * 8 + row].words[word]; }

void load_matrices(const LaneOperands& brought, LaneOperands& results, uint32_t) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        for (uint32_t matrix = 0; matrix < 4; ++matrix) results[lane].words[matrix] = row_word(brought, matrix, lane / 4, lane % 4);
    }
}

static uint32_t half_of(uint32_t word, uint32_t idx) { return word >> (16 * (idx % 2)) & 0xffff; }

void load_transposed(const LaneOperands& brought, LaneOperands& results, uint32_t) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t column = lane / 4, row = lane % 4 * 2;
        for (uint32_t matrix = 0; matrix < 4; ++matrix) {
            results[lane].words[matrix] = half_of(row_word(brought, matrix, row, column / 2), column) |
                                          half_of(row_word(brought, matrix, row + 1, column / 2), column) << 16;
        }
    }
}

void transpose_8x8(const LaneOperands& brought, LaneOperands& results, uint32_t) {
    const auto at = [&](uint32_t row, uint32_t column) { return half_of(brought[row * 4 + column / 2].words[0], column); };
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t row = lane / 4, column = lane % 4 * 2;
        results[lane].words[0] = at(column, row) | at(column + 1, row) << 16;
    }
}

}  // namespace kv8::emulated
