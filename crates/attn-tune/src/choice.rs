//! What is chosen: the numbers of a schedule.

use attn_plan::{MAX_SHARES, SplitConfig, SplitPolicy};
use serde::{Deserialize, Serialize};

/// Tokens of a tile: what the warps of a block take at a time.
pub const TILE_LEN: u32 = 64;
/// The kv heads that a block can take.
pub const HEADS_PER_BLOCK: [u32; 3] = [1, 2, 4];

/// How one step is cut and launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Choice {
    /// Blocks of stage 1 over all heads; a multiple of the blocks that one worker needs is used.
    pub num_blocks: u32,
    /// kv heads of a block; one of [`HEADS_PER_BLOCK`].
    pub heads_per_block: u32,
    /// The fewest tiles worth a split of their own.
    pub min_split_tiles: u32,
    /// What starting and merging one work item costs, in tiles.
    pub item_overhead: u32,
    /// Equal shares of each request, merged by a cluster of blocks; 0: by workers, and the numbers above count.
    pub num_shares: u32,
    /// Tiles of an item at most, each of which has a worker of its own, the longest first; 0: workers take several. Counts where
    /// there are no shares.
    pub item_tiles: u32,
}

impl Choice {
    /// Work dealt to blocks of one head, cut wherever a tile ends, an item's start costing a tile.
    #[must_use]
    pub const fn dealt(num_blocks: u32) -> Self {
        Self {
            num_blocks,
            heads_per_block: 1,
            min_split_tiles: 1,
            item_overhead: 1,
            num_shares: 0,
            item_tiles: 0,
        }
    }

    /// The split schedule of this choice for a cache of `num_kv_heads` and `row_blocks` blocks of query rows.
    pub fn split(&self, policy: SplitPolicy, num_kv_heads: u32, row_blocks: u32) -> SplitConfig {
        let tile_len = match policy {
            SplitPolicy::BatchInvariant { split_len } => TILE_LEN.min(1 << split_len.trailing_zeros().min(6)),
            SplitPolicy::Throughput => TILE_LEN,
        };
        SplitConfig {
            policy,
            num_workers: self.num_workers(num_kv_heads, row_blocks),
            tile_len,
            item_overhead: self.item_overhead,
            min_split_tiles: self.min_split_tiles,
            heads_per_block: self.heads_per_block,
            // That policy has fixed the cuts, and leaves open only whether each item has a worker of its own.
            num_shares: if policy == SplitPolicy::Throughput { self.num_shares } else { 0 },
            item_tiles: if policy == SplitPolicy::Throughput {
                self.item_tiles
            } else {
                self.item_tiles.min(1)
            },
        }
    }

    /// Workers along the tokens, at least one.
    pub fn num_workers(&self, num_kv_heads: u32, row_blocks: u32) -> u32 {
        let blocks_per_worker = num_kv_heads.div_ceil(self.heads_per_block.max(1)) * row_blocks;
        (self.num_blocks / blocks_per_worker.max(1)).max(1)
    }

    /// What is wrong with it, if anything, for a cache of `num_kv_heads`.
    pub(crate) fn fault(&self, num_kv_heads: u32) -> Option<&'static str> {
        if !(1..=1 << 16).contains(&self.num_blocks) {
            Some("blocks must be 1 to 65536")
        } else if !HEADS_PER_BLOCK.contains(&self.heads_per_block) {
            Some("heads must be 1, 2 or 4")
        } else if !num_kv_heads.is_multiple_of(self.heads_per_block) {
            Some("heads must divide kv_heads")
        } else if !(1..=4096).contains(&self.min_split_tiles) {
            Some("min_tiles must be 1 to 4096")
        } else if self.item_overhead > 64 {
            Some("overhead must be 0 to 64")
        } else if self.num_shares > MAX_SHARES {
            Some("shares must be 0 to 16")
        } else if self.item_tiles > 1 << 20 {
            Some("item_tiles must be 0 to 1048576")
        } else {
            None
        }
    }
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { num_blocks, heads_per_block, min_split_tiles, item_overhead, num_shares, item_tiles } =
            self;
        if *num_shares > 0 {
            return write!(f, "each request in {num_shares} shares, {heads_per_block} heads a block");
        }
        if *item_tiles > 0 {
            return write!(
                f,
                "a block of {heads_per_block} heads for each item of at most {item_tiles} tiles"
            );
        }
        write!(
            f,
            "{num_blocks} blocks of {heads_per_block} heads, splits of {min_split_tiles} tiles and more, overhead {item_overhead}"
        )
    }
}
