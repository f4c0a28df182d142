// Copies tiles of 16 tokens from the cache into a warp's ring with cp.async. Shared by stage 1 and the copy-only reader.
//
// Lanes 0..15 know where K of the tile's tokens lies, lanes 16..31 where V lies; the copies take the offsets by shuffle.
// A token past the end, or on a page out of range, is not read: its bytes become zero and its bit in `live` stays clear.
// Code offsets are kept in units of 16 bytes, and so are packed scale offsets (8 bytes where their rows are no multiple of 16),
// in 32 bits: a plane may span 64 GiB (32 GiB), the host refuses more. Other scale offsets are 64 bits of bytes.
#pragma once
#include <type_traits>

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
    uint32_t pieces_log2;  // num_pieces rounded up to a power of two
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
        pieces_log2 = 32 - __clz(num_pieces - 1);
    }
};

template <class T>
struct TileLoader {
    static constexpr bool kPacked = T::kGroups == Groups::k8;
    static constexpr uint32_t kCodePieces = T::kHeadDim / 16;                // 16-byte pieces of a code row
    static constexpr uint32_t kScalePiece = T::kRawRowBytes % 16 == 0 ? 16 : 8;  // packed scales
    static constexpr uint32_t kScalePieces = T::kRawRowBytes / kScalePiece;
    static constexpr bool kLaneCodePiece = 32 % kCodePieces == 0;    // a lane copies the same piece of every row it copies
    static constexpr bool kLaneScalePiece = kPacked && 32 % kScalePieces == 0;

    // Of this kv head; where a warp's lanes cover whole rows, at the piece that this lane copies.
    const uint8_t* k_codes;
    const uint8_t* v_codes;
    const uint8_t* k_scales;
    const uint8_t* v_scales;
    ScaleCopy k_copy;
    ScaleCopy v_copy;
    uint32_t code_page_stride;  // of this lane's plane, in units of 16 bytes
    uint32_t code_slot_stride;
    using ScaleStride = std::conditional_t<kPacked, uint32_t, uint64_t>;
    ScaleStride scale_page_stride;  // bytes, or units of kScalePiece if packed
    ScaleStride scale_slot_stride;
    uint32_t page_len_log2;
    uint32_t num_pages;
    uint32_t tile_stride;   // tokens from a warp's tile to its next
    uint32_t record_bytes;  // records that follow each other without a gap in a page of 16 or more; 0: none
    uint32_t pitch;         // of rows in shared memory
    uint32_t barriers;      // shared address of this warp's barriers
    bool barriers_open;
    uint32_t run_slots;     // stages of the ring whose latest tile came as a run of records
    uint32_t phases;        // parity of each stage's barriers
    bool run;               // of the located tile

    const int32_t* page_row;
    uint32_t token_end;
    uint32_t position;  // of this lane's token in the tile that `locate` takes next
    int32_t page;       // its page index
    uint32_t code_offset;   // kNowhere if there is nothing to read
    uint32_t scale_offset;  // packed; otherwise the low half
    uint32_t scale_offset_high;
    uint32_t live;  // tokens of the located tile that may be read

    __device__ __forceinline__ TileLoader(const PagedCache& cache, uint32_t head_idx, uint32_t lane, uint32_t token_stride, uint32_t warp_barriers)
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
        scale_page_stride = static_cast<ScaleStride>(
            (is_v ? cache.v_scales.page_stride : cache.k_scales.page_stride) * unit / (kPacked ? kScalePiece : 1));
        scale_slot_stride = static_cast<ScaleStride>(
            (is_v ? cache.v_scales.slot_stride : cache.k_scales.slot_stride) * unit / (kPacked ? kScalePiece : 1));
        if constexpr (kLaneCodePiece) {
            k_codes += lane % kCodePieces * 16;
            v_codes += lane % kCodePieces * 16;
        }
        if constexpr (kLaneScalePiece) {
            k_scales += lane % kScalePieces * kScalePiece;
            v_scales += lane % kScalePieces * kScalePiece;
        }
        if constexpr (T::kRowTiles < 4) {  // with four row tiles there is no register to spare
            ptx::keep(k_codes);
            ptx::keep(v_codes);
            ptx::keep(k_scales);
            ptx::keep(v_scales);
            ptx::keep(code_page_stride);
            ptx::keep(code_slot_stride);
            if constexpr (kPacked) {
                ptx::keep(scale_page_stride);
                ptx::keep(scale_slot_stride);
            }
        }
        page_len_log2 = page_shift(cache);
        num_pages = cache.num_pages;
        page = 0;
        tile_stride = token_stride;
        barriers = warp_barriers;
        phases = 0;
        // A tile of records inside a page is one run of bytes: one bulk copy of a run moves more bytes a second than copies
        // row by row.
        record_bytes = ptx::kBulkCopies && cache.page_len >= kTileTokens && cache.record_bytes <= T::kPitch ? cache.record_bytes : 0;
        pitch = record_bytes != 0 ? record_bytes : T::kPitch;
        ptx::keep(record_bytes);
        ptx::keep(pitch);
        barriers_open = false;
    }

    // Begins a range: `first` is the position of this lane's token in the warp's first tile.
    __device__ __forceinline__ void begin(const int32_t* row, uint32_t first, uint32_t end) {
        page_row = row;
        position = first;
        token_end = mutant(1) && end > 0 ? end - 1 : end;
        run_slots = ~0u;
    }

    __device__ __forceinline__ int32_t read_page(uint32_t at) const {
        return at < token_end ? __ldg(page_row + (at >> page_len_log2)) : 0;
    }

    // Reads the pages of the first tiles into the stages that they will take.
    __device__ __forceinline__ void read_first_pages(uint8_t* ring, uint32_t lane) {
        int32_t pages[T::kNumStages];
#pragma unroll
        for (int i = 0; i < T::kNumStages; ++i) pages[i] = read_page(position + i * tile_stride);
        if (record_bytes != 0 && !barriers_open) {  // while the pages are on their way
            if (lane < 2 * T::kNumStages) ptx::barrier_init(barriers + 8 * lane);
            ptx::fence_before_bulk_copies();
            barriers_open = true;
        }
#pragma unroll
        for (int i = 0; i < T::kNumStages; ++i) {
            if (lane < kTileTokens) reinterpret_cast<int32_t*>(ring + i * T::kStageBytes + T::kPagesAt)[lane] = pages[i];
        }
        __syncwarp();
    }

    // The page of this lane's token in the tile that `stage` receives next.
    static __device__ __forceinline__ int32_t stage_page(const uint8_t* stage, uint32_t lane) {
        return reinterpret_cast<const int32_t*>(stage + T::kPagesAt)[lane & 15];
    }

    // Page indices travel a whole ring ahead, with the K copies of the tile before them in the same stage: under load a plain
    // load would wait behind all the copies in flight. Call after `locate` of the tile that the stage receives.
    __device__ __forceinline__ void copy_pages(uint32_t stage, uint32_t lane) const {
        const uint32_t at = position + (T::kNumStages - 1) * tile_stride;
        if (lane < kTileTokens && at < token_end) {
            ptx::cp_async<4>(stage + T::kPagesAt + lane * 4, page_row + (at >> page_len_log2), 0);
        }
    }

    // Turns `page` into offsets; `lane_token` is lane % 16. True for a lane whose page index is out of range.
    __device__ __forceinline__ bool locate(uint32_t lane_token) {
        const uint32_t slot = position & ((1u << page_len_log2) - 1);
        const bool inside = position < token_end;
        if (mutant(23) && static_cast<uint32_t>(page) >= num_pages) page = num_pages - 1;
        const bool readable = inside && static_cast<uint32_t>(page) < num_pages;
        live = __ballot_sync(kFullWarp, readable);
        const uint32_t index = static_cast<uint32_t>(page);
        code_offset = readable ? index * code_page_stride + slot * code_slot_stride : ptx::kNowhere;
        if constexpr (kPacked) {
            scale_offset = readable ? index * scale_page_stride + slot * scale_slot_stride : ptx::kNowhere;
        } else {
            const uint64_t offset = index * scale_page_stride + slot * scale_slot_stride;
            scale_offset = static_cast<uint32_t>(offset);
            scale_offset_high = readable ? static_cast<uint32_t>(offset >> 32) : ptx::kNowhere;
        }
        // Every token readable and the first of them at a multiple of 16: then the tile lies in one page.
        run = record_bytes != 0 && live == kFullWarp && ((position ^ lane_token) & (kTileTokens - 1)) == 0;
        position += tile_stride;
        return inside && !readable;
    }

    // Tokens of the located tile whose scale row starts in the middle of a word: K in bits 0..15, V in bits 16..31.
    __device__ __forceinline__ uint32_t misaligned_rows(uint32_t lane) const {
        if constexpr (kPacked) return 0;
        const uint32_t base = static_cast<uint32_t>(reinterpret_cast<uint64_t>(lane < 16 ? k_scales : v_scales));
        return __ballot_sync(kFullWarp, ((base + scale_offset) & 2) != 0);
    }

    // Fills stage `slot` of the ring at shared address `stage` with K of the located tile; then fill_v with its V. All reads of
    // the stage's K (V) must have been ordered by a warp barrier.
    __device__ __forceinline__ void fill_k(uint32_t slot, uint32_t stage, uint32_t lane) {
        if (run) {
            if (!(run_slots >> slot & 1)) {  // the stage was last written row by row
                ptx::fence_before_bulk_copies();
                __syncwarp();
            }
            if (lane == 0) ptx::bulk_copy(stage + T::kKeysAt, run_source(k_codes), record_bytes * kTileTokens, barriers + 16 * slot);
        } else {
            copy_codes(stage + T::kKeysAt, k_codes, lane, 0);
            copy_scales(stage + T::kKeysAt + T::kScalesAt, k_scales, k_copy, lane, 0);
        }
        run_slots = run ? run_slots | 1u << slot : run_slots & ~(1u << slot);
        copy_pages(stage, lane);
    }

    __device__ __forceinline__ void fill_v(uint32_t slot, uint32_t stage, uint32_t lane) const {
        if (run) {
            if (lane == 16) {
                ptx::bulk_copy(stage + T::kValuesAt, run_source(v_codes), record_bytes * kTileTokens, barriers + 16 * slot + 8);
            }
        } else {
            copy_codes(stage + T::kValuesAt, v_codes, lane, 16);
            copy_scales(stage + T::kValuesAt + T::kScalesAt, v_scales, v_copy, lane, 16);
        }
    }

    // Waits for one plane (0 = K, 1 = V) of a tile that came as a run. Row-by-row copies are awaited by group.
    __device__ __forceinline__ void wait_for_run(uint32_t slot, uint32_t plane) const {
        ptx::barrier_wait(barriers + 16 * slot + 8 * plane, phases >> slot & 1);
    }

  private:
    // For lanes 0 (K) and 16 (V): they hold the tile's first offset, and the copy of a row starts at piece 0 for them.
    __device__ __forceinline__ const uint8_t* run_source(const uint8_t* plane) const {
        static_assert(!kLaneCodePiece || 16 % kCodePieces == 0);
        return plane + static_cast<uint64_t>(code_offset) * 16;
    }

    // Neighbouring lanes take neighbouring pieces, so that the copies of eight lanes cover whole sectors.
    __device__ __forceinline__ void copy_codes(uint32_t dst, const uint8_t* plane, uint32_t lane, uint32_t owner) const {
        if constexpr (kLaneCodePiece) {
            constexpr uint32_t kRowStep = 32 / kCodePieces;
            const uint32_t first_row = lane / kCodePieces;
            const uint32_t to = dst + first_row * pitch + lane % kCodePieces * 16;
#pragma unroll
            for (uint32_t i = 0; i < kTileTokens / kRowStep; ++i) {
                const uint32_t offset = __shfl_sync(kFullWarp, code_offset, owner + first_row + kRowStep * i);
                ptx::cp_async<16>(to + kRowStep * i * pitch, plane + static_cast<uint64_t>(offset) * 16, offset);
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kCodePieces * kTileTokens / 32; ++i) {
                const uint32_t row = (lane + 32 * i) / kCodePieces;
                const uint32_t piece = (lane + 32 * i) % kCodePieces;
                const uint32_t offset = __shfl_sync(kFullWarp, code_offset, owner + row);
                ptx::cp_async<16>(dst + row * pitch + piece * 16, plane + piece * 16 + static_cast<uint64_t>(offset) * 16, offset);
            }
        }
    }

    __device__ __forceinline__ void copy_scales(uint32_t dst, const uint8_t* plane, const ScaleCopy& copy, uint32_t lane,
                                                uint32_t owner) const {
        if constexpr (kPacked) {
            constexpr uint32_t kCopies = kScalePieces * kTileTokens;
#pragma unroll
            for (uint32_t i = 0; i < (kCopies + 31) / 32; ++i) {
                const uint32_t idx = lane + 32 * i;
                const uint32_t row = idx / kScalePieces % kTileTokens;
                const uint32_t piece = idx % kScalePieces;
                const uint32_t offset = __shfl_sync(kFullWarp, scale_offset, owner + row);
                const uint8_t* src = plane + (kLaneScalePiece ? 0 : piece * kScalePiece) + static_cast<uint64_t>(offset) * kScalePiece;
                if (kCopies % 32 == 0 || idx < kCopies) {
                    ptx::cp_async<kScalePiece>(dst + row * pitch + piece * kScalePiece, src, offset);
                }
            }
        } else {
            for (uint32_t first = 0; first < kTileTokens << copy.pieces_log2; first += 32) {
                const uint32_t row = (first + lane) >> copy.pieces_log2 & (kTileTokens - 1);
                const uint32_t piece = (first + lane) & ((1u << copy.pieces_log2) - 1);
                const uint32_t low = __shfl_sync(kFullWarp, scale_offset, owner + row);
                const uint32_t high = __shfl_sync(kFullWarp, scale_offset_high, owner + row);
                if (first + lane >= kTileTokens << copy.pieces_log2 || piece >= copy.num_pieces) continue;
                const uint8_t* src = plane + (static_cast<uint64_t>(high) << 32 | low);
                const uint32_t at = piece << copy.piece_log2;
                const uint32_t to = dst + row * pitch + at;
                if (copy.piece_log2 == 4) {
                    ptx::cp_async<16>(to, src + at, high);
                } else if (copy.piece_log2 == 3) {
                    ptx::cp_async<8>(to, src + at, high);
                } else {
                    const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uint64_t>(src) & (copy.misaligned ? 2u : 0u));
                    ptx::cp_async<4>(to, src - shift + at, at < copy.row_bytes + shift ? high : ptx::kNowhere);
                }
            }
        }
    }
};

}  // namespace kv8
