// The PTX instructions of a whole warp, each from the operands of all lanes to the results of all.
#pragma once
#include "../runtime/thread.hpp"

namespace kv8::emulated {

// Words 0 to 3: d, 4 to 7: a, 8 and 9: b; words 0 to 3 of the result: d.
void mma_16x8x16(const LaneOperands&, LaneOperands&, uint32_t);
void mma_16x8x32(const LaneOperands&, LaneOperands&, uint32_t);
// Words 0 to 3: the 16 bytes that the lane's address names; of the result: one word of each matrix.
void load_matrices(const LaneOperands&, LaneOperands&, uint32_t);
void load_transposed(const LaneOperands&, LaneOperands&, uint32_t);
// Word 0: two values of the matrix.
void transpose_8x8(const LaneOperands&, LaneOperands&, uint32_t);

}  // namespace kv8::emulated
