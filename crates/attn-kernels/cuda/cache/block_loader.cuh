// Copies tiles of 16 tokens into a warp's ring with cp.async where the rows of a tile lie side by side in each of the four planes:
// pages of 16 slots or more, slots of a head next to each other. The tile is then four blocks, of which every lane knows its
// pieces beforehand; the rows of codes come out swizzled as row_loader.cuh leaves them, the scales as they lie in memory.
//
// Lane i of the warp holds the page of tile i of a window of 32, read a window ahead. Tokens past the end are copied as they lie (a
// page is memory as a whole): `clear_dead` takes their scales away.
#pragma once
#include "../common/mutant.cuh"
#include "../common/ptx.cuh"
#include "../common/warp.cuh"
#include "../decode/traits.cuh"
#include "../quant/scale.cuh"
#include "paged_cache.cuh"

namespace kv8 {

template <class T>
struct BlockLoader {
    static constexpr bool kInStep = false;
    static constexpr uint32_t kLead = 1;  // tiles; see Stage1::do_share
    static constexpr uint32_t kCodePieces = T::kHeadDim / 16;  // 16-byte pieces of a code row
    static constexpr uint32_t kCopies = kCodePieces / 2;       // of a plane of codes, each of 32 pieces
    static constexpr uint32_t kRowStep = 32 / kCodePieces;     // rows from one copy to the next

    // Blocks of packed scales are whole copies of a plane each; others are at most 32 pieces in all, one a lane.
    static constexpr bool kPacked = T::kGroups == Groups::k8;
    static constexpr uint32_t kScaleCopies = kPacked ? T::kRawRowBytes / 32 : 0;

    struct Shape {
        static constexpr uint32_t pitch = T::kRowPitch;
        static constexpr uint32_t scales_at = kTileTokens * T::kRowPitch;
        static constexpr uint32_t values_at = T::kRowValuesAt;
        static constexpr uint32_t swizzle = 7;
        uint32_t scale_pitch;

        __device__ __forceinline__ explicit Shape(uint32_t row_bytes) : scale_pitch(kPacked ? T::kRawRowBytes : row_bytes) {}
    };

    const uint8_t* k;  // of this kv head, at the piece that this lane copies first
    const uint8_t* v;
    const uint8_t* scales;      // the same, K's, or V's for lanes that copy those
    const uint8_t* v_scales;    // packed
    uint32_t code_page_stride;  // in units of 16 bytes
    uint32_t scale_page_stride;
    uint32_t scale_row_bytes;
    uint32_t scale_target;  // in a stage; kNowhere: this lane copies none
    uint32_t code_target;
    uint32_t page_len_log2;
    uint32_t num_pages;
    uint32_t tile_stride;  // tokens from a warp's tile to its next
    uint32_t lane;
    uint8_t* ring;
    uint32_t ring_address;  // shared

    const int32_t* page_row;
    uint32_t first;      // position of the warp's first tile
    uint32_t token_end;
    uint32_t position;   // of the tile that is filled next
    uint32_t tile;       // its number
    int32_t pages;       // of tile (tile / 32 * 32 + lane)
    int32_t next_pages;  // and of the window after it
    uint32_t bad_stages;  // stages whose tile is on a page out of range

    static __device__ __forceinline__ bool serves(const PagedCache& cache) {
        if (!T::kBlocks || cache.page_len < kTileTokens) return false;
        const uint32_t unit = scale_bytes(cache.scale_type);
        const uint32_t groups = num_groups(T::kHeadDim, cache.k_group_len);
        const auto alike = [](const Plane& a, const Plane& b, uint32_t row) {
            return a.slot_stride == row && b.slot_stride == row && a.page_stride == b.page_stride;
        };
        // Blocks of scales start at whole pieces, all lanes' pieces are of one copy, and products of 32 bits reach.
        const uint64_t starts = cache.k_scales.base | cache.v_scales.base |
                                (cache.k_scales.page_stride | cache.k_scales.head_stride | cache.v_scales.head_stride) * unit;
        return cache.k_group_len == cache.v_group_len && (kPacked || 2 * groups * unit <= 32) && starts % 16 == 0 &&
               alike(cache.k_codes, cache.v_codes, T::kHeadDim) && alike(cache.k_scales, cache.v_scales, groups) &&
               cache.k_scales.page_stride * unit >> 32 == 0;
    }

    __device__ __forceinline__ BlockLoader(const PagedCache& cache, uint32_t head_idx, uint32_t lane_idx, uint32_t token_stride,
                                           uint8_t* warp_ring)
        : k(reinterpret_cast<const uint8_t*>(cache.k_codes.base) + head_idx * cache.k_codes.head_stride + lane_idx * 16),
          v(reinterpret_cast<const uint8_t*>(cache.v_codes.base) + head_idx * cache.v_codes.head_stride + lane_idx * 16),
          code_page_stride(static_cast<uint32_t>(cache.k_codes.page_stride >> 4)),
          page_len_log2(page_shift(cache)),
          num_pages(cache.num_pages),
          tile_stride(token_stride),
          lane(lane_idx),
          ring(warp_ring),
          ring_address(ptx::shared_address(warp_ring)),
          bad_stages(0) {
        const uint32_t unit = scale_bytes(cache.scale_type);
        scale_row_bytes = kPacked ? T::kRawRowBytes : num_groups(T::kHeadDim, cache.k_group_len) * unit;
        scale_page_stride = static_cast<uint32_t>(cache.k_scales.page_stride) * unit;
        const bool is_v = !kPacked && lane >= scale_row_bytes;  // a block is 16 rows: as many pieces as a row has bytes
        const uint32_t piece = (is_v ? lane - scale_row_bytes : lane) * 16;
        const Plane& plane = is_v ? cache.v_scales : cache.k_scales;
        scales = reinterpret_cast<const uint8_t*>(plane.base) + head_idx * plane.head_stride * unit + piece;
        scale_target = lane < 2 * scale_row_bytes ? (is_v ? Shape::values_at : 0u) + Shape::scales_at + piece : ptx::kNowhere;
        v_scales = reinterpret_cast<const uint8_t*>(cache.v_scales.base) + head_idx * cache.v_scales.head_stride * unit + lane * 16;
        const uint32_t row = lane / kCodePieces;
        code_target = row * Shape::pitch + (lane % kCodePieces ^ row & Shape::swizzle) * 16;
        ptx::keep(ring_address);
        ptx::keep(k);
        ptx::keep(v);
        ptx::keep(scales);
        ptx::keep(code_page_stride);
        if constexpr (kPacked) {
            ptx::keep(v_scales);
        } else {
            ptx::keep(scale_target);
        }
        ptx::keep(code_target);
    }

    __device__ __forceinline__ int32_t read_page(uint32_t tile_idx) const {
        const uint32_t at = first + tile_idx * tile_stride;
        return at < token_end ? __ldg(page_row + (at >> page_len_log2)) : 0;
    }

    // Begins a range; `first_position`, the position of the warp's first tile, is a multiple of 16.
    __device__ __forceinline__ void begin(const int32_t* row, uint32_t first_position, uint32_t end) {
        page_row = row;
        first = position = first_position;
        token_end = mutant(1) && end > 0 ? end - 1 : end;
        tile = 0;
        pages = read_page(lane);
        next_pages = read_page(32 + lane);
    }

    // Asks for the first tiles of a range from number `from` on ahead of time: their bytes come into the L2, nothing is waited for.
    __device__ __forceinline__ void prefetch_first_tiles(uint32_t from, uint32_t num_tiles) const {
        if (lane >= from && lane < T::kNumStages && lane < num_tiles && static_cast<uint32_t>(pages) < num_pages) {
            const uint64_t offset = code_offset(pages, first + lane * tile_stride) - lane * 16;
            ptx::prefetch_l2(k + offset, kTileTokens * T::kHeadDim);
            ptx::prefetch_l2(v + offset, kTileTokens * T::kHeadDim);
        }
    }

    // Fills a stage with the next tile, as RowLoader::fill.
    template <class Bad>
    __device__ __forceinline__ void fill(uint32_t slot, uint32_t offset, Bad&& bad) {
        int32_t page = __shfl_sync(kFullWarp, pages, tile & 31);
        if (mutant(23) && static_cast<uint32_t>(page) >= num_pages) page = num_pages - 1;
        const bool readable = static_cast<uint32_t>(page) < num_pages;
        bad_stages = bad_stages & ~(1u << slot) | static_cast<uint32_t>(!readable) << slot;
        if (readable) {
            const uint32_t stage = ring_address + offset;
            const uint64_t from = code_offset(page, position);
            const uint64_t at = static_cast<uint64_t>(static_cast<uint32_t>(page)) * scale_page_stride + slot_of(position) * scale_row_bytes;
            copy_codes(stage + code_target, k + from);
            if constexpr (kPacked) {
                copy_scales(stage + Shape::scales_at, scales + at);
            } else if (scale_target != ptx::kNowhere) {
                ptx::cp_async<16>(stage + scale_target, scales + at, 0);
            }
            copy_codes(stage + Shape::values_at + code_target, v + from);
            if constexpr (kPacked) copy_scales(stage + Shape::values_at + Shape::scales_at, v_scales + at);
        } else if (lane == 0) {
            bad(position, page);
        }
        position += tile_stride;
        if ((++tile & 31) == 0) {
            pages = next_pages;
            next_pages = read_page(tile + 32 + lane);
        }
    }

    __device__ __forceinline__ void commit() const { ptx::cp_async_commit(); }
    __device__ __forceinline__ void wait(uint32_t) const { ptx::cp_async_wait<T::kNumStages - 1>(); }
    __device__ __forceinline__ void done(uint32_t) {}
    __device__ __forceinline__ Shape shape() const { return Shape{scale_row_bytes}; }

    // Of the tile in a stage that has come; its first token is at `token`.
    __device__ __forceinline__ bool is_partial(uint32_t slot, uint32_t token) const {
        return (bad_stages >> slot & 1) != 0 || token + kTileTokens > token_end;
    }
    __device__ __forceinline__ uint32_t live_tokens(uint32_t slot, uint32_t, uint32_t token) const {
        return bad_stages >> slot & 1 ? 0u : (1u << min(token_end - token, static_cast<uint32_t>(kTileTokens))) - 1;
    }
    __device__ __forceinline__ uint32_t misaligned_rows_of(uint32_t) const { return 0; }

    // Zeroes the scales of tokens that do not count: whatever lies there must not reach a product.
    __device__ __forceinline__ void clear_dead(uint32_t offset, uint32_t live) const {
        if (!(live >> (lane & 15) & 1)) {
            uint8_t* row = ring + offset + (lane < 16 ? 0u : Shape::values_at) + Shape::scales_at + (lane & 15) * scale_row_bytes;
            for (uint32_t at = 0; at < scale_row_bytes; at += 2) *reinterpret_cast<uint16_t*>(row + at) = 0;
        }
        __syncwarp();
    }

  private:
    __device__ __forceinline__ uint32_t slot_of(uint32_t at) const { return at & ((1u << page_len_log2) - 1); }

    __device__ __forceinline__ uint64_t code_offset(int32_t page, uint32_t at) const {
        return static_cast<uint64_t>(static_cast<uint32_t>(page) * code_page_stride + slot_of(at) * kCodePieces) * 16;
    }

    __device__ __forceinline__ void copy_scales(uint32_t to, const uint8_t* from) const {
#pragma unroll
        for (uint32_t i = 0; i < kScaleCopies; ++i) ptx::cp_async<16, ptx::Fetch::k128>(to + lane * 16 + i * 512, from + i * 512, 0);
    }

    // A row that lies kRowStep further is swizzled differently by that much.
    __device__ __forceinline__ void copy_codes(uint32_t to, const uint8_t* from) const {
#pragma unroll
        for (uint32_t i = 0; i < kCopies; ++i) {
            const uint32_t turn = (kRowStep * i & Shape::swizzle) * 16;
            ptx::cp_async<16, ptx::Fetch::k128>((to ^ turn) + kRowStep * i * Shape::pitch, from + i * 512, 0);
        }
    }
};

}  // namespace kv8
