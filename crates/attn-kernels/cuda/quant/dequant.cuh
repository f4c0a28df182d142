// Codes to f16 pairs. A code byte x, with its top bit flipped and 0x64 above it, is the f16 1152 + x, so that one exact
// subtraction gives x. The pair of a word's bytes (0, 2) costs one LOP3; the pair (1, 3) a shift more.
#pragma once
#include "../common/ptx.cuh"

namespace kv8 {

constexpr uint32_t kMagic = 0x64806480u;  // 1152 twice

// Bytes 0 and 2 of `word` as exact f16 values.
__device__ __forceinline__ uint32_t even_codes(uint32_t word) {
    return ptx::sub_f16x2(ptx::mask_flip<0x00ff00ffu, kMagic>(word), kMagic);
}

// Bytes 1 and 3 of `word` as exact f16 values.
__device__ __forceinline__ uint32_t odd_codes(uint32_t word) { return even_codes(word >> 8); }

// One signed byte of a word.
__device__ __forceinline__ float code_at(uint32_t word, int byte) {
    return static_cast<float>(static_cast<int8_t>(word >> (8 * byte)));
}

}  // namespace kv8
