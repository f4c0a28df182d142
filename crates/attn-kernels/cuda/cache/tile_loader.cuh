// Copies tiles of 16 tokens from the cache into a warp's ring with cp.async. Shared by stage 1 and the copy-only reader.
//
// Lanes 0..15 know where K of the tile's tokens lies, lanes 16..31 where V lies; the copies take the addresses by shuffle.
// A token past the end, or on a page out of range, is not read: its bytes become zero and its bit in `valid` stays clear.
// Code addresses are kept in units of 16 bytes, so a plane may span 64 GiB; the host refuses more.
#pragma once
#include "../common/mutant.cuh"
#include "../common/ptx.cuh"
#include "../common/warp.cuh"
#include "../decode/traits.cuh"
#include "../quant/scale.cuh"
#include "paged_cache.cuh"

namespace kv8 {

// The scale rows of one plane as pieces that cp.async can copy.
struct ScaleCopy {
    uint32_t row_bytes;
    uint32_t num_pieces;
    uint32_t piece_log2;  // 2, 3 or 4
    bool misaligned;      // rows may start in the middle of a word: copy the words around them

    __device__ __forceinline__ ScaleCopy(const Plane& plane, uint32_t groups, uint32_t type) {
        const uint32_t unit = scale_bytes(type);
        row_bytes = groups * unit;
        const uint32_t strides = static_cast<uint32_t>(plane.page_stride | plane.slot_stride | plane.head_stride) * unit;
        const uint32_t bits = static_cast<uint32_t>(plane.base) | strides | row_bytes | 16u;
        const uint32_t align_log2 = __ffs(bits) - 1;
        misaligned = align_log2 < 2;
        piece_log2 = misaligned ? 2 : align_log2;
        num_pieces = misaligned ? row_bytes / 4 + 1 : row_bytes >> piece_log2;
    }
};

template <class T>
struct TileLoader {
    const uint8_t* k_codes;  // of this kv head
    const uint8_t* v_codes;
    const uint8_t* k_scales;
    const uint8_t* v_scales;
    ScaleCopy k_copy;
    ScaleCopy v_copy;
    uint32_t code_page_stride;  // of this lane's plane, in units of 16 bytes
    uint32_t code_slot_stride;
    uint64_t scale_page_stride;  // bytes
    uint64_t scale_slot_stride;
    uint32_t page_len_log2;
    uint32_t num_pages;

    const int32_t* page_row;
    uint32_t token_end;
    uint32_t position;  // of this lane's token in the tile that `locate` takes next
    int32_t page;       // its page index
    uint32_t code_offset;
    uint64_t scale_offset;
    uint32_t live;  // tokens of the located tile that may be read

    __device__ __forceinline__ TileLoader(const PagedCache& cache, uint32_t head_idx, uint32_t lane)
        : k_copy(cache.k_scales, num_groups(cache.head_dim, cache.k_group_len), cache.scale_type),
          v_copy(cache.v_scales, num_groups(cache.head_dim, cache.v_group_len), cache.scale_type) {
        const uint32_t unit = scale_bytes(cache.scale_type);
        k_codes = reinterpret_cast<const uint8_t*>(cache.k_codes.base) + head_idx * cache.k_codes.head_stride;
        v_codes = reinterpret_cast<const uint8_t*>(cache.v_codes.base) + head_idx * cache.v_codes.head_stride;
        k_scales = reinterpret_cast<const uint8_t*>(cache.k_scales.base) + head_idx * cache.k_scales.head_stride * unit;
        v_scales = reinterpret_cast<const uint8_t*>(cache.v_scales.base) + head_idx * cache.v_scales.head_stride * unit;
        const bool is_v = lane >= 16;
        code_page_stride = static_cast<uint32_t>((is_v ? cache.v_codes.page_stride : cache.k_codes.page_stride) >> 4);
        code_slot_stride = static_cast<uint32_t>((is_v ? cache.v_codes.slot_stride : cache.k_codes.slot_stride) >> 4);
        scale_page_stride = (is_v ? cache.v_scales.page_stride : cache.k_scales.page_stride) * unit;
        scale_slot_stride = (is_v ? cache.v_scales.slot_stride : cache.k_scales.slot_stride) * unit;
        page_len_log2 = page_shift(cache);
        num_pages = cache.num_pages;
        page = 0;
    }

    // Begins a range: `first` is the position of this lane's token in the warp's first tile.
    __device__ __forceinline__ void begin(const int32_t* row, uint32_t first, uint32_t end) {
        page_row = row;
        position = first;
        token_end = end;
    }

    __device__ __forceinline__ int32_t read_page(uint32_t at) const {
        return at < token_end ? __ldg(page_row + (at >> page_len_log2)) : 0;
    }

    // Page indices travel a whole ring ahead, with the K copies of the tile before them in the same stage: under load a plain
    // load would wait behind all the copies in flight. Call after `locate` of the tile that the stage receives.
    __device__ __forceinline__ void copy_pages(uint32_t stage, uint32_t lane) const {
        const uint32_t at = position + (T::kNumStages - 1) * kWarps * kTileTokens;
        if (lane < kTileTokens && at < token_end) {
            ptx::cp_async<4>(stage + T::kPagesAt + lane * 4, page_row + (at >> page_len_log2), 4);
        }
    }

    // Turns `page` into offsets; true for a lane whose page index is out of range.
    __device__ __forceinline__ bool locate() {
        const uint32_t slot = position & ((1u << page_len_log2) - 1);
        const bool inside = position < token_end;
        const bool bad = inside && static_cast<uint32_t>(page) >= num_pages;
        const bool readable = inside && !bad;
        live = __ballot_sync(kFullWarp, readable);
        const uint32_t index = readable ? static_cast<uint32_t>(page) : 0u;
        code_offset = index * code_page_stride + (readable ? slot : 0u) * code_slot_stride;
        scale_offset = index * scale_page_stride + (readable ? slot : 0u) * scale_slot_stride;
        position += kWarps * kTileTokens;
        return bad;
    }

    // Tokens of the located tile whose scale row starts in the middle of a word: K in bits 0..15, V in bits 16..31.
    __device__ __forceinline__ uint32_t misaligned_rows(uint32_t lane) const {
        if constexpr (T::kGroups == Groups::k8) return 0;
        const uint8_t* row = (lane < 16 ? k_scales : v_scales) + scale_offset;
        return __ballot_sync(kFullWarp, (reinterpret_cast<uint64_t>(row) & 2) != 0);
    }

    __device__ __forceinline__ void copy_k(uint32_t stage, uint32_t lane) const {
        copy_codes<T::kKPitch>(stage + T::kKCodesAt, k_codes, lane, 0);
        copy_scales<T::kKScalePitch>(stage + T::kKScalesAt, k_scales, k_copy, lane, 0);
    }

    __device__ __forceinline__ void copy_v(uint32_t stage, uint32_t lane) const {
        copy_codes<T::kVPitch>(stage + T::kVCodesAt, v_codes, lane, 16);
        copy_scales<T::kVScalePitch>(stage + T::kVScalesAt, v_scales, v_copy, lane, 16);
    }

  private:
    __device__ __forceinline__ uint32_t readable_bytes(uint32_t row, uint32_t bytes) const {
        return live >> row & 1 ? bytes : 0u;
    }

    template <int PITCH>
    __device__ __forceinline__ void copy_codes(uint32_t dst, const uint8_t* plane, uint32_t lane, uint32_t owner) const {
        constexpr uint32_t kPieces = T::kHeadDim / 16;
#pragma unroll
        for (uint32_t i = 0; i < kPieces * kTileTokens / 32; ++i) {
            const uint32_t idx = lane + 32 * i;
            const uint32_t row = idx / kPieces;
            const uint32_t piece = idx % kPieces;
            const uint64_t offset = __shfl_sync(kFullWarp, code_offset, owner + row);
            ptx::cp_async<16>(dst + row * PITCH + piece * 16, plane + (offset << 4) + piece * 16, readable_bytes(row, 16));
        }
    }

    template <int PITCH>
    __device__ __forceinline__ void copy_scales(uint32_t dst, const uint8_t* plane, const ScaleCopy& copy, uint32_t lane,
                                                uint32_t owner) const {
        const uint32_t row = lane & 15;
        const uint8_t* src = plane + shuffle_u64(scale_offset, owner + row);
        if constexpr (T::kGroups == Groups::k8) {
            constexpr uint32_t kPiece = T::kRawRowBytes % 16 == 0 ? 16 : 8;
            constexpr uint32_t kPieces = T::kRawRowBytes / kPiece;
#pragma unroll
            for (uint32_t i = 0; i < (kPieces + 1) / 2; ++i) {
                const uint32_t piece = 2 * i + lane / 16;
                if (kPieces % 2 == 0 || piece < kPieces) {
                    ptx::cp_async<kPiece>(dst + row * PITCH + piece * kPiece, src + piece * kPiece, readable_bytes(row, kPiece));
                }
            }
        } else {
            const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uint64_t>(src) & (copy.misaligned ? 2u : 0u));
            for (uint32_t piece = lane / 16; piece < copy.num_pieces; piece += 2) {
                const uint32_t at = piece << copy.piece_log2;
                const uint32_t to = dst + row * PITCH + at;
                if (copy.piece_log2 == 4) {
                    ptx::cp_async<16>(to, src + at, readable_bytes(row, 16));
                } else if (copy.piece_log2 == 3) {
                    ptx::cp_async<8>(to, src + at, readable_bytes(row, 8));
                } else {
                    ptx::cp_async<4>(to, src - shift + at, at < copy.row_bytes + shift ? readable_bytes(row, 4) : 0u);
                }
            }
        }
    }
};

}  // namespace kv8
