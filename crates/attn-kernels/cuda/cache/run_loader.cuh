// Copies tiles of 16 tokens into a warp's ring by bulk copy (sm_90), where a tile of K, and of V, is one run of bytes: records of
// codes and scales that follow each other inside a page of 16 slots or more.
//
// One lane asks for a tile; the stage's barrier counts its bytes. Lane i of the warp holds the page of tile i of a window of 32,
// read a window ahead. Tokens past the end of a page's live part are copied as they lie: `clear_dead` takes their scales away.
#pragma once
#include "../common/mutant.cuh"
#include "../common/ptx.cuh"
#include "../common/warp.cuh"
#include "../decode/traits.cuh"
#include "paged_cache.cuh"

namespace kv8 {

template <class T>
struct RunLoader {
    static constexpr bool kInStep = false;
    static constexpr uint32_t kLead = 1;  // tiles; see Stage1::do_share
    static constexpr bool kPacked = T::kGroups == Groups::k8;

    // Where the rows of a tile lie in a stage: as in memory, V behind K.
    struct Shape {
        uint32_t record;
        static constexpr uint32_t scales_at = T::kHeadDim;
        static constexpr uint32_t swizzle = 0;
        uint32_t pitch, scale_pitch, values_at;

        __device__ __forceinline__ explicit Shape(uint32_t record_bytes)
            : record(kPacked ? T::kRecordBytes : record_bytes), pitch(record), scale_pitch(record), values_at(kTileTokens * record) {}
    };

    const uint8_t* k;  // of this kv head
    const uint8_t* v;
    uint32_t page_stride;  // in units of 16 bytes
    uint32_t record;       // bytes
    bool together;         // V of a tile follows its K in memory
    uint32_t page_len_log2;
    uint32_t num_pages;
    uint32_t tile_stride;  // tokens from a warp's tile to its next
    uint32_t lane;
    uint8_t* ring;
    uint32_t ring_address;  // shared
    uint32_t barriers;      // shared, one a stage
    uint32_t phases;        // parity of each

    const int32_t* page_row;
    uint32_t first;      // position of the warp's first tile
    uint32_t token_end;
    uint32_t position;   // of the tile that is filled next
    uint32_t tile;       // its number
    int32_t pages;       // of tile (tile / 32 * 32 + lane)
    int32_t next_pages;  // and of the window after it
    uint32_t bad_stages;  // stages whose tile is on a page out of range

    static __device__ __forceinline__ bool serves(const PagedCache& cache) {
        if (!T::kRuns || !ptx::kBulkCopies || cache.record_bytes == 0 || cache.page_len < kTileTokens) return false;
        if (cache.k_codes.page_stride != cache.v_codes.page_stride) return false;
        return kPacked ? cache.record_bytes == T::kRecordBytes : 2 * kTileTokens * cache.record_bytes <= T::kStageBytes;
    }

    __device__ __forceinline__ RunLoader(const PagedCache& cache, uint32_t head_idx, uint32_t lane_idx, uint32_t token_stride,
                                         uint8_t* warp_ring, uint32_t warp_barriers, uint32_t barrier_phases)
        : k(reinterpret_cast<const uint8_t*>(cache.k_codes.base) + head_idx * cache.k_codes.head_stride),
          v(reinterpret_cast<const uint8_t*>(cache.v_codes.base) + head_idx * cache.v_codes.head_stride),
          page_stride(static_cast<uint32_t>(cache.k_codes.page_stride >> 4)),
          record(kPacked ? T::kRecordBytes : cache.record_bytes),
          together(v - k == static_cast<int64_t>(kTileTokens * record)),
          page_len_log2(page_shift(cache)),
          num_pages(cache.num_pages),
          tile_stride(token_stride),
          lane(lane_idx),
          ring(warp_ring),
          ring_address(ptx::shared_address(warp_ring)),
          barriers(warp_barriers),
          phases(barrier_phases),
          bad_stages(0) {
        ptx::keep(ring_address);
        ptx::keep(k);
        ptx::keep(v);
        ptx::keep(page_stride);
    }

    // Once, by the warp, before the first tile.
    static __device__ __forceinline__ void open_barriers(uint32_t barriers, uint32_t lane) {
        if (lane < T::kNumStages) ptx::barrier_init(barriers + 8 * lane);
        ptx::fence_before_bulk_copies();
        __syncwarp();
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
            const uint64_t offset = offset_of(pages, first + lane * tile_stride);
            ptx::prefetch_l2(k + offset, kTileTokens * record);
            ptx::prefetch_l2(v + offset, kTileTokens * record);
        }
    }

    // Fills a stage with the next tile, as RowLoader::fill.
    template <class Bad>
    __device__ __forceinline__ void fill(uint32_t slot, uint32_t offset, Bad&& bad) {
        int32_t page = __shfl_sync(kFullWarp, pages, tile & 31);
        if (mutant(23) && static_cast<uint32_t>(page) >= num_pages) page = num_pages - 1;
        const bool readable = static_cast<uint32_t>(page) < num_pages;
        bad_stages = bad_stages & ~(1u << slot) | static_cast<uint32_t>(!readable) << slot;
        if (lane == 0) {
            const uint32_t barrier = barriers + 8 * slot;
            const uint32_t run = kTileTokens * record;
            const uint32_t to = ring_address + offset;
            if (readable) {
                const uint64_t from = offset_of(page, position);
                ptx::barrier_expect(barrier, 2 * run);
                ptx::bulk_copy(to, k + from, together ? 2 * run : run, barrier);
                if (!together) ptx::bulk_copy(to + run, v + from, run, barrier);
            } else {
                ptx::barrier_expect(barrier, 0);
                bad(position, page);
            }
        }
        position += tile_stride;
        if ((++tile & 31) == 0) {
            pages = next_pages;
            next_pages = read_page(tile + 32 + lane);
        }
    }

    __device__ __forceinline__ void commit() const {}
    __device__ __forceinline__ void wait(uint32_t slot) const { ptx::barrier_wait(barriers + 8 * slot, phases >> slot & 1); }
    __device__ __forceinline__ void done(uint32_t slot) { phases ^= 1u << slot; }
    __device__ __forceinline__ Shape shape() const { return Shape(record); }

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
            uint8_t* row = ring + offset + (lane >> 4) * kTileTokens * record + (lane & 15) * record;
            for (uint32_t at = T::kHeadDim; at < record; at += 4) *reinterpret_cast<uint32_t*>(row + at) = 0;
        }
        __syncwarp();
    }

  private:
    __device__ __forceinline__ uint64_t offset_of(int32_t page, uint32_t at) const {
        const uint32_t slot = at & ((1u << page_len_log2) - 1);
        return static_cast<uint64_t>(static_cast<uint32_t>(page) * page_stride + slot * (record >> 4)) * 16;
    }
};

}  // namespace kv8
