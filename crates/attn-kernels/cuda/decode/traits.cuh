// What one variant of stage 1 is: head_dim, group class, scale class, row tiles, arithmetic; and the shared memory that follows.
#pragma once
#include <cstdint>

namespace kv8 {

enum class Groups {
    k8,     // K and V groups are 8; scale rows aligned to min(16, their length)
    k16Up,  // K and V groups are 16 or more, alike or not, up to the whole head; scales aligned to 2 bytes or more
    kAny,   // any two groups of 8 or more
    kWhole,  // K and V groups are the whole head: one scale a row, which is a factor of the logit and of the weight
};
enum class Scales { kF16, kBf16, kF32, kAny };
enum class Arithmetic { kMma, kF32 };

constexpr int kWarps = 4;          // a CTA of stage 1: blockDim.x / 32 along tokens, blockDim.y kv heads
constexpr int kTileTokens = 16;    // tokens a warp takes at a time: the rows of one mma
constexpr int kNumThreads = kWarps * 32;

constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

template <int HEAD_DIM, Groups GROUPS, Scales SCALES, int ROW_TILES, Arithmetic ARITHMETIC, int NUM_STAGES, int MIN_CTAS,
          bool QUERY_IN_SHARED = false>
struct Traits {
    static_assert(HEAD_DIM == 64 || HEAD_DIM == 96 || HEAD_DIM == 128 || HEAD_DIM == 192 || HEAD_DIM == 256);
    static constexpr int kHeadDim = HEAD_DIM;
    static constexpr Groups kGroups = GROUPS;
    static constexpr Scales kScales = SCALES;
    static constexpr Arithmetic kArithmetic = ARITHMETIC;
    static constexpr int kRowTiles = ROW_TILES;
    static constexpr int kRows = 8 * ROW_TILES;  // query rows of a CTA
    static constexpr int kNumStages = NUM_STAGES;
    static constexpr int kMinCtas = MIN_CTAS;

    // Scales other than f16 have a wider range than the operands of the mma: each token's scales are brought into range by a
    // power of two before use ("normalized"). f16 scales take that path only when a tile holds one of 256 or more.
    static constexpr bool kWhole = GROUPS == Groups::kWhole;
    static constexpr bool kAlwaysNormalize = (SCALES != Scales::kF16 || kWhole) && ARITHMETIC == Arithmetic::kMma;

    // Whether tiles may come as runs: larger variants have no registers for both ways.
    static constexpr bool kRuns = ROW_TILES == 1 || (ROW_TILES == 2 && HEAD_DIM == 128);
    // Whether a wide scale is looked for before each tile, not after an item that is then done again: also where there is no register
    // left for the difference.
    static constexpr bool kLooksFirst = !kRuns || (HEAD_DIM < 128 && GROUPS == Groups::k16Up);

    // Whether tiles may come as blocks of rows that lie side by side.
    static constexpr bool kBlocks = kRuns && HEAD_DIM % 128 == 0 && GROUPS != Groups::kAny;

    // A lane's share of a K row: units of consecutive channels. See k_channel.
    static constexpr int kKUnitBytes = HEAD_DIM == 96 ? 8 : 16;
    static constexpr int kKUnits = HEAD_DIM / 4 / kKUnitBytes;
    static constexpr int kKWordsPerUnit = kKUnitBytes / 4;
    static constexpr int kKSteps = HEAD_DIM / 16;
    static constexpr int kVWords = HEAD_DIM / 32;  // words (4 channels) of a lane in a V row
    static constexpr int kVTiles = HEAD_DIM / 16;  // 16-channel tiles of the output
    static constexpr bool kQueryInShared =
        (QUERY_IN_SHARED || ROW_TILES * kKSteps * 2 > 32 || ROW_TILES == 4) && ARITHMETIC == Arithmetic::kMma && !kWhole;

    // K or V of a tile in shared memory. Copied row by row, with a head_dim of whole 128-byte lines: rows of codes aligned like
    // their source, the 16-byte pieces of row r at piece ^ (r % 8), so that the fragment reads touch every bank once; then rows
    // of scales. With another head_dim a row holds codes, then scales as they lie in memory, and the pitch is an odd number of
    // 16-byte units (one pass more on K at 64 and 192). As a run of records by bulk copy: as it lies in memory (two passes).
    static constexpr bool kWholeLines = HEAD_DIM % 128 == 0;
    static constexpr int kMinGroup = GROUPS == Groups::kWhole ? HEAD_DIM : GROUPS == Groups::k16Up ? 16 : 8;
    static constexpr int kMaxGroups = HEAD_DIM / kMinGroup;
    static constexpr int kRawScaleBytes = SCALES == Scales::kF32 || SCALES == Scales::kAny ? 4 : 2;
    static constexpr int kRawRowBytes = kMaxGroups * kRawScaleBytes;
    static constexpr int kRowSlack = GROUPS == Groups::k8 ? 0 : 4;  // scale rows that start in the middle of a word
    static constexpr int kOddPitch = round_up(HEAD_DIM + kRawRowBytes + kRowSlack, 16) / 16 * 16 +
                                  (round_up(HEAD_DIM + kRawRowBytes + kRowSlack, 16) / 16 % 2 == 0 ? 16 : 0);
    static constexpr int kScalePitch = round_up(kRawRowBytes + kRowSlack, kWhole ? 8 : 16);  // of whole lines
    static constexpr int kRowPitch = kWholeLines ? HEAD_DIM : kOddPitch;
    static constexpr int kRowPlaneBytes = kTileTokens * (kWholeLines ? HEAD_DIM + kScalePitch : kOddPitch);
    static constexpr int kRowValuesAt = round_up(kRowPlaneBytes, 128);
    static constexpr int kRecordBytes = round_up(HEAD_DIM + kRawRowBytes, 16);  // of packed rows
    static constexpr int kNormalPitch = round_up(kMaxGroups * 2, 16) + 16;

    // A stage: one tile of K, then V; meta = {valid tokens, rows that start in the middle of a word, -, -}; the page indices of
    // the tile that will take the stage next.
    static constexpr int kMetaAt = kRowValuesAt + kRowPlaneBytes;
    static constexpr int kPagesAt = kMetaAt + 16;
    static constexpr int kRunBytes = 2 * kTileTokens * kRecordBytes;  // runs need neither meta nor pages
    static constexpr int kUsedBytes = kPagesAt + kTileTokens * 4;
    static constexpr int kStageBytes = round_up(kUsedBytes > kRunBytes ? kUsedBytes : kRunBytes, 128);  // bulk copies like whole lines

    // Per warp: the ring, the normalized scales of one plane of one tile and their exponents.
    static constexpr int kNormalAt = kNumStages * kStageBytes;
    static constexpr int kExponentsAt = kNormalAt + (kWhole ? 0 : kTileTokens * kNormalPitch);
    static constexpr int kWarpBytes = round_up(kExponentsAt + (kWhole ? 0 : kTileTokens * 4), 128);

    // The merge of the warps reuses the rings: nothing that outlives an item, such as the barriers, lies in them.
    static constexpr int kMergePitch = HEAD_DIM + 4;  // floats
    static constexpr int kMergeBytes = kWarps * kRows * kMergePitch * 4;

    static constexpr int kStatesAt = kWarps * kWarpBytes > kMergeBytes ? kWarps * kWarpBytes : kMergeBytes;  // float4 [kWarps][kRows]
    static constexpr int kQueryAt = kStatesAt + kWarps * kRows * 16;         // uint2 [kKSteps][kRowTiles][32]
    static constexpr int kQueryBytes = kQueryInShared ? kKSteps * kRowTiles * 32 * 8 : 0;
    static constexpr int kBarriersAt = kQueryAt + kQueryBytes;  // of bulk copies: u64 [kWarps][kNumStages]
    static constexpr int kSharedBytes = kBarriersAt + kWarps * kNumStages * 8;

    // First channel of unit `unit` of lane column `column` (lane % 4) in a K row.
    static __device__ __forceinline__ constexpr int k_channel(int unit, int column) {
        if constexpr (HEAD_DIM % 128 == 0) return ((unit / 2) * 8 + 2 * column + unit % 2) * 16;
        return (column + 4 * unit) * kKUnitBytes;
    }

    // First channel of word `word` of lane row `row` (lane / 4) in a V row.
    static __device__ __forceinline__ constexpr int v_channel(int word, int row) {
        if constexpr (HEAD_DIM == 64) return 8 * row + 4 * word;
        if constexpr (HEAD_DIM == 96) return word < 2 ? 8 * row + 4 * word : 64 + 4 * row;
        if constexpr (HEAD_DIM == 192) return word < 4 ? 16 * row + 4 * word : 128 + 8 * row + 4 * (word - 4);
        return (word / 4) * 128 + 16 * row + 4 * (word % 4);
    }
};

}  // namespace kv8
