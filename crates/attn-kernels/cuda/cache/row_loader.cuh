// Copies tiles of 16 tokens row by row into a warp's ring with cp.async: any layout. See run_loader.cuh for the other way.
//
// Lanes 0..15 know where K of the tile's tokens lies, lanes 16..31 where V lies; the copies take the offsets by shuffle.
// A token past the end, or on a page out of range, is not read: its bytes become zero and its bit in `live` stays clear.
// Code offsets are kept in units of 16 bytes, and so are packed scale offsets (8 bytes where their rows are no multiple of 16),
// in 32 bits: a plane may span 64 GiB (32 GiB), the host refuses more. Other scale offsets are 64 bits of bytes.
//
// TOGETHER: the warps of the heads of a CTA (four; two would do) go through the same tokens in step, and each copies its share of
// them for all these heads. One instruction then asks for up to 512 neighbouring bytes, and heads do not drift apart: those that do
// ask for the same memory pages at different times, which costs a fifth past 2 GB. A stage is refilled once all have left it,
// which they know when they meet at the next.
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

template <class T, bool TOGETHER = false>
struct RowLoader {
    static constexpr bool kInStep = TOGETHER;
    static constexpr uint32_t kLead = 2;  // tiles; see Stage1::do_share. Pages are looked up token by token first
    static constexpr bool kPacked = T::kGroups == Groups::k8;
    static constexpr uint32_t kCodePieces = T::kHeadDim / 16;                // 16-byte pieces of a code row
    static constexpr uint32_t kScalePiece = T::kRawRowBytes % 16 == 0 ? 16 : 8;  // packed scales
    static constexpr uint32_t kScalePieces = kPacked ? T::kRawRowBytes / kScalePiece : 1;
    static constexpr bool kLaneCodePiece = 32 % kCodePieces == 0;    // a lane copies the same piece of every row it copies
    static constexpr bool kLaneScalePiece = kPacked && 32 % kScalePieces == 0;
    // Other variants have no registers for it.
    static constexpr bool kCanTogether = T::kRowTiles == 1 && !T::kAlwaysNormalize && T::kWholeLines && kCodePieces == 8 &&
                                         kScalePieces == 2 && T::kNumStages > 1;

    // Where the rows of a tile lie in a stage.
    struct Shape {
        static constexpr uint32_t pitch = T::kRowPitch;
        static constexpr uint32_t scale_pitch = T::kWholeLines ? T::kScalePitch : T::kRowPitch;
        static constexpr uint32_t scales_at = T::kWholeLines ? kTileTokens * T::kHeadDim : T::kHeadDim;
        static constexpr uint32_t values_at = T::kRowValuesAt;
        static constexpr uint32_t swizzle = T::kWholeLines ? 7 : 0;  // 16-byte piece i of row r of codes lies at i ^ (r & swizzle)
    };
    static constexpr bool kNeedsMeta = T::kGroups != Groups::k8;  // of every tile, not of the partial ones alone

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
    uint32_t tile_stride;  // tokens from a warp's tile to its next
    bool is_thin;          // one kv head: little of what follows a row in memory is wanted
    uint32_t lane;
    uint8_t* ring;
    uint32_t ring_address;  // shared

    // TOGETHER: the rows that this lane copies, and where to.
    uint32_t code_row, row_step, scale_row;
    uint32_t code_target, scale_target;  // shared

    const int32_t* page_row;
    uint32_t token_end;
    uint32_t position;  // of this lane's token in the tile that `locate` takes next
    int32_t page;       // its page index
    uint32_t code_offset;   // kNowhere if there is nothing to read
    uint32_t scale_offset;  // packed; otherwise the low half
    uint32_t scale_offset_high;
    uint32_t live;  // tokens of the located tile that may be read
    uint32_t partial_stages;  // stages whose tile has tokens that may not be read

    // Two heads in step gain less in long work and lose 4 to 10 % in short work.
    static __device__ __forceinline__ bool serves() { return !TOGETHER || (kCanTogether && blockDim.y == kWarps); }

    __device__ __forceinline__ RowLoader(const PagedCache& cache, uint32_t head_idx, uint32_t lane_idx, uint32_t token_stride, uint8_t* warp_ring)
        : k_copy(cache.k_scales, num_groups(cache.head_dim, cache.k_group_len), cache.scale_type),
          v_copy(cache.v_scales, num_groups(cache.head_dim, cache.v_group_len), cache.scale_type),
          tile_stride(token_stride),
          is_thin(cache.num_kv_heads == 1),
          lane(lane_idx),
          ring(warp_ring),
          ring_address(ptx::shared_address(warp_ring)),
          page(0),
          partial_stages(0) {
        ptx::keep(ring_address);
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
        if constexpr (TOGETHER) {
            const auto move = [](const uint8_t*& base, uint32_t to_head, uint64_t head_stride) {
                base += (static_cast<int32_t>(to_head) - static_cast<int32_t>(threadIdx.y)) * static_cast<int64_t>(head_stride);
            };
            const uint32_t code_head = lane / 8 % blockDim.y;
            const uint32_t scale_head = lane / 2 % blockDim.y;
            move(k_codes, code_head, cache.k_codes.head_stride);
            move(v_codes, code_head, cache.v_codes.head_stride);
            move(k_scales, scale_head, cache.k_scales.head_stride * unit);
            move(v_scales, scale_head, cache.v_scales.head_stride * unit);
            const uint32_t own_rows = threadIdx.y * (kTileTokens / blockDim.y);
            const uint32_t head_bytes = blockDim.x / 32 * T::kWarpBytes;  // from the ring of a head to that of the next
            code_row = own_rows + lane / 8 / blockDim.y;
            row_step = kWarps / blockDim.y;
            scale_row = own_rows + lane / 2 / blockDim.y;
            const uint32_t first_ring = ring_address - threadIdx.y * head_bytes;
            code_target = first_ring + code_head * head_bytes;
            scale_target = first_ring + scale_head * head_bytes + scale_row * Shape::scale_pitch + lane % 2 * 16;
        }
        if constexpr (kLaneScalePiece) {
            k_scales += lane % kScalePieces * kScalePiece;
            v_scales += lane % kScalePieces * kScalePiece;
        }
        if constexpr (T::kRuns) {  // the largest variants have no register to spare
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
    }

    // Begins a range: `first` is the position of the warp's first tile. Reads the pages of the first tiles into the stages that
    // they will take.
    __device__ __forceinline__ void begin(const int32_t* row, uint32_t first, uint32_t end) {
        page_row = row;
        position = first + (lane & 15);
        token_end = mutant(1) && end > 0 ? end - 1 : end;
        int32_t pages[T::kNumStages];
#pragma unroll
        for (int i = 0; i < T::kNumStages; ++i) pages[i] = read_page(position + i * tile_stride);
#pragma unroll
        for (int i = 0; i < T::kNumStages; ++i) {
            if (lane < kTileTokens) reinterpret_cast<int32_t*>(ring + i * T::kStageBytes + T::kPagesAt)[lane] = pages[i];
        }
        __syncwarp();
    }

    __device__ __forceinline__ int32_t read_page(uint32_t at) const {
        return at < token_end ? __ldg(page_row + (at >> page_len_log2)) : 0;
    }

    // The page of this lane's token in the tile that `stage` receives next.
    __device__ __forceinline__ int32_t stage_page(const uint8_t* stage) const {
        return reinterpret_cast<const int32_t*>(stage + T::kPagesAt)[lane & 15];
    }

    // Page indices travel a whole ring ahead, with the K copies of the tile before them in the same stage: under load a plain
    // load would wait behind all the copies in flight. Call after `locate` of the tile that the stage receives.
    __device__ __forceinline__ void copy_pages(uint32_t stage) const {
        const uint32_t at = position + (T::kNumStages - 1) * tile_stride;
        if (lane < kTileTokens && at < token_end) {
            ptx::cp_async<4>(stage + T::kPagesAt + lane * 4, page_row + (at >> page_len_log2), 0);
        }
    }

    // Turns `page` into offsets. True for a lane whose page index is out of range.
    __device__ __forceinline__ bool locate() {
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
        position += tile_stride;
        return inside && !readable;
    }

    // Asks for the first tiles of a range from number `from` on, the next to be filled, ahead of time: their bytes come into the
    // L2, nothing is waited for.
    __device__ __forceinline__ void prefetch_first_tiles(uint32_t from, uint32_t num_tiles) {
        const uint32_t first = position;
#pragma unroll 1
        for (uint32_t i = from; i < T::kNumStages && i < num_tiles; ++i) {
            page = stage_page(ring + i * T::kStageBytes);
            locate();
            if constexpr (TOGETHER) {
                prefetch_together(k_codes, k_scales, 0);
                prefetch_together(v_codes, v_scales, 16);
                continue;
            }
            if (code_offset == ptx::kNowhere) continue;
            const uint8_t* codes = lane < 16 ? k_codes : v_codes;
            const uint8_t* scales = lane < 16 ? k_scales : v_scales;
            if constexpr (kLaneCodePiece) codes -= lane % kCodePieces * 16;
            ptx::prefetch_l2(codes + static_cast<uint64_t>(code_offset) * 16, T::kHeadDim);
            if constexpr (kPacked && kScalePiece == 16) {
                if constexpr (kLaneScalePiece) scales -= lane % kScalePieces * kScalePiece;
                ptx::prefetch_l2(scales + static_cast<uint64_t>(scale_offset) * kScalePiece, T::kRawRowBytes);
            }
        }
        position = first;
    }

    // Tokens of the located tile whose scale row starts in the middle of a word: K in bits 0..15, V in bits 16..31.
    __device__ __forceinline__ uint32_t misaligned_rows() const {
        if constexpr (kPacked) return 0;
        const uint32_t base = static_cast<uint32_t>(reinterpret_cast<uint64_t>(lane < 16 ? k_scales : v_scales));
        return __ballot_sync(kFullWarp, ((base + scale_offset) & 2) != 0);
    }

    // Fills a stage with the next tile. All reads of the stage must have been ordered by a warp barrier. `bad(position, page)` is
    // called by lanes whose page is out of range.
    template <class Bad>
    __device__ __forceinline__ void fill(uint32_t slot, uint32_t offset, Bad&& bad) {
        page = stage_page(ring + offset);
        __syncwarp();
        const uint32_t at = position;
        if (locate() && lane < kTileTokens) bad(at, page);
        const bool partial = live != kFullWarp;
        partial_stages = partial_stages & ~(1u << slot) | static_cast<uint32_t>(partial) << slot;
        if (partial || kNeedsMeta) {
            const uint32_t misaligned = misaligned_rows();
            if (lane == 0) *reinterpret_cast<uint2*>(ring + offset + T::kMetaAt) = make_uint2(live, misaligned);
        }
        const uint32_t stage = ring_address + offset;
        if (T::kRuns && is_thin) {
            copy_tile<ptx::Fetch::kSectors>(stage);
        } else {
            copy_tile<ptx::Fetch::k128>(stage);
        }
        copy_pages(stage);
    }

    __device__ __forceinline__ void commit() const { ptx::cp_async_commit(); }
    __device__ __forceinline__ void wait(uint32_t) const {
        ptx::cp_async_wait<T::kNumStages - 1 - TOGETHER>();
        if (TOGETHER) ptx::meet(1 + threadIdx.x / 32, 32 * blockDim.y);
    }
    __device__ __forceinline__ void done(uint32_t) {}
    __device__ __forceinline__ Shape shape() const { return {}; }

    // Of the tile in a stage that has come.
    __device__ __forceinline__ bool is_partial(uint32_t slot, uint32_t) const { return partial_stages >> slot & 1; }
    __device__ __forceinline__ uint32_t live_tokens(uint32_t, uint32_t offset, uint32_t) const { return meta(offset).x & 0xffffu; }
    __device__ __forceinline__ uint32_t misaligned_rows_of(uint32_t offset) const { return kNeedsMeta ? meta(offset).y : 0; }
    __device__ __forceinline__ void clear_dead(uint32_t, uint32_t) const {}  // they came as zeros

  private:
    __device__ __forceinline__ uint2 meta(uint32_t offset) const { return *reinterpret_cast<const uint2*>(ring + offset + T::kMetaAt); }

    template <ptx::Fetch FETCH>
    __device__ __forceinline__ void copy_tile(uint32_t stage) const {
        if constexpr (TOGETHER) {
            copy_together<FETCH>(stage - ring_address, k_codes, k_scales, 0);
            copy_together<FETCH>(stage - ring_address + Shape::values_at, v_codes, v_scales, 16);
        } else {
            copy_codes<FETCH>(stage, k_codes, 0);
            copy_scales<FETCH>(stage + Shape::scales_at, k_scales, k_copy, 0);
            copy_codes<FETCH>(stage + Shape::values_at, v_codes, 16);
            copy_scales<FETCH>(stage + Shape::values_at + Shape::scales_at, v_scales, v_copy, 16);
        }
    }

    __device__ __forceinline__ void prefetch_together(const uint8_t* codes, const uint8_t* scales, uint32_t owner) const {
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t offset = __shfl_sync(kFullWarp, code_offset, owner + code_row + i * row_step);
            if (lane % 8 == 0 && offset != ptx::kNowhere) ptx::prefetch_l2(codes + static_cast<uint64_t>(offset) * 16, T::kHeadDim);
        }
        const uint32_t offset = __shfl_sync(kFullWarp, scale_offset, owner + scale_row);
        if (lane % 2 == 0 && offset != ptx::kNowhere) {
            ptx::prefetch_l2(scales + static_cast<uint64_t>(offset) * kScalePiece, T::kRawRowBytes);
        }
    }

    // This warp's share of the tokens, for all heads of the CTA.
    template <ptx::Fetch FETCH>
    __device__ __forceinline__ void copy_together(uint32_t at, const uint8_t* codes, const uint8_t* scales, uint32_t owner) const {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t row = code_row + i * row_step;
            const uint32_t offset = __shfl_sync(kFullWarp, code_offset, owner + row);
            ptx::cp_async<16, FETCH>(code_target + at + row * T::kHeadDim + (lane ^ row) % 8 * 16,
                                     codes + static_cast<uint64_t>(offset) * 16, offset);
        }
        const uint32_t offset = __shfl_sync(kFullWarp, scale_offset, owner + scale_row);
        ptx::cp_async<kScalePiece, FETCH>(scale_target + at + Shape::scales_at, scales + static_cast<uint64_t>(offset) * kScalePiece, offset);
    }

    // Neighbouring lanes take neighbouring pieces, so that the copies of eight lanes cover whole sectors.
    template <ptx::Fetch FETCH>
    __device__ __forceinline__ void copy_codes(uint32_t dst, const uint8_t* plane, uint32_t owner) const {
        if constexpr (kLaneCodePiece) {
            constexpr uint32_t kRowStep = 32 / kCodePieces;
            const uint32_t first_row = lane / kCodePieces;
#pragma unroll
            for (uint32_t i = 0; i < kTileTokens / kRowStep; ++i) {
                const uint32_t row = first_row + kRowStep * i;
                const uint32_t piece = lane % kCodePieces ^ (row & Shape::swizzle);
                const uint32_t offset = __shfl_sync(kFullWarp, code_offset, owner + row);
                ptx::cp_async<16, FETCH>(dst + row * Shape::pitch + piece * 16, plane + static_cast<uint64_t>(offset) * 16, offset);
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kCodePieces * kTileTokens / 32; ++i) {
                const uint32_t row = (lane + 32 * i) / kCodePieces;
                const uint32_t piece = (lane + 32 * i) % kCodePieces;
                const uint32_t offset = __shfl_sync(kFullWarp, code_offset, owner + row);
                ptx::cp_async<16, FETCH>(dst + row * Shape::pitch + piece * 16, plane + piece * 16 + static_cast<uint64_t>(offset) * 16, offset);
            }
        }
    }

    template <ptx::Fetch FETCH>
    __device__ __forceinline__ void copy_scales(uint32_t dst, const uint8_t* plane, const ScaleCopy& copy, uint32_t owner) const {
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
                    ptx::cp_async<kScalePiece, FETCH>(dst + row * Shape::scale_pitch + piece * kScalePiece, src, offset);
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
                const uint32_t to = dst + row * Shape::scale_pitch + at;
                if (copy.piece_log2 == 4) {
                    ptx::cp_async<16, FETCH>(to, src + at, high);
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
