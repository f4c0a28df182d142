//! How a batch is to be cut: the policy and its numbers.

use crate::Error;

/// What a split may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SplitPolicy {
    /// Work is cut so that all workers finish together; a request's bits may depend on its neighbours, never on timing.
    Throughput,
    /// A request is cut at multiples of `split_len` tokens whatever its neighbours are, so its bits are its own.
    BatchInvariant {
        /// Tokens of a split; a multiple of the tile.
        split_len: u32,
    },
}

impl std::fmt::Display for SplitPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SplitPolicy::Throughput => f.write_str("throughput"),
            SplitPolicy::BatchInvariant { split_len } => write!(f, "batch-invariant({split_len})"),
        }
    }
}

/// The most shares of a request: a cluster of blocks has room for no more.
pub const MAX_SHARES: u32 = 16;

/// The most items with a worker each: a device's grid has room for no more.
pub const MAX_OWN_ITEMS: u64 = 1 << 15;

/// The facts and numbers from which a [`crate::SplitPlan`] follows.
/// ```
/// use attn_plan::{Error, SplitConfig, SplitPolicy};
/// let config = SplitConfig::throughput(33);
/// assert_eq!((config.tile_len, config.check()), (64, Ok(())));
/// let config = config.with_policy(SplitPolicy::BatchInvariant { split_len: 100 });
/// assert_eq!(config.check(), Err(Error::SplitLen { split_len: 100, tile_len: 64 }));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SplitConfig {
    /// What a split may depend on.
    pub policy: SplitPolicy,
    /// Workers that run at once for each kv head: CPU threads, or resident CTAs over the kv heads.
    pub num_workers: u32,
    /// Splits are cut at multiples of this many tokens.
    pub tile_len: u32,
    /// What starting and merging one work item costs, in tiles.
    pub item_overhead: u32,
    /// The fewest tiles worth a split of their own.
    pub min_split_tiles: u32,
    /// The most kv heads that a block of a device takes together: 1, 2 or 4. It takes fewer where that does not divide the
    /// heads, or its kernel has no room. Another number may change the last bits. A host takes heads as it likes.
    pub heads_per_block: u32,
    /// 0: workers' ends cut, as the policy says. Else every request is cut into this many equal shares, whatever its
    /// neighbours are, each a worker's: a device that has clusters merges them there, without stage 2. `num_workers`,
    /// `item_overhead` and `min_split_tiles` then do not count. At most [`MAX_SHARES`].
    pub num_shares: u32,
    /// 0: work is dealt to `num_workers` as the policy says. Else every item has a worker of its own, the longest first, for a
    /// device to deal out as its blocks come free: as many workers as items, whatever `num_workers` says. Under
    /// [`SplitPolicy::Throughput`] requests are then cut into equal items of at most so many tiles. Under
    /// [`SplitPolicy::BatchInvariant`] the cuts stay. More than
    /// [`MAX_OWN_ITEMS`] items are always dealt. A captured graph, which has a fixed number of workers, cannot follow such plans. Does not count
    /// where requests are shared out.
    pub item_tiles: u32,
}

impl SplitConfig {
    /// Throughput policy with tiles of 64 tokens.
    pub fn throughput(num_workers: u32) -> Self {
        Self {
            policy: SplitPolicy::Throughput,
            num_workers,
            tile_len: 64,
            item_overhead: 1,
            min_split_tiles: 1,
            heads_per_block: 1,
            num_shares: 0,
            item_tiles: 0,
        }
    }

    /// Every request in this many equal shares, with tiles of 64 tokens.
    pub fn shares(num_shares: u32) -> Self {
        Self { num_shares, ..Self::throughput(1) }
    }

    /// The same numbers under another policy.
    pub fn with_policy(self, policy: SplitPolicy) -> Self {
        Self { policy, ..self }
    }

    /// Tiles between the cuts of [`SplitPolicy::BatchInvariant`]; 0 for the other policy.
    pub(crate) fn split_tiles(&self) -> u32 {
        match self.policy {
            SplitPolicy::Throughput => 0,
            SplitPolicy::BatchInvariant { split_len } => split_len / self.tile_len.max(1),
        }
    }

    /// Whether each of so many items gets a worker of its own.
    pub(crate) fn gives_own_workers(&self, num_items: u64) -> bool {
        self.item_tiles > 0 && num_items <= MAX_OWN_ITEMS
    }

    /// Refuses numbers that no plan can follow.
    pub fn check(&self) -> Result<(), Error> {
        if self.num_workers == 0 || self.num_workers > 1 << 20 {
            return Err(Error::NumWorkers(self.num_workers));
        }
        if self.tile_len == 0 || self.tile_len > 65536 {
            return Err(Error::TileLen(self.tile_len));
        }
        if ![1, 2, 4].contains(&self.heads_per_block) {
            return Err(Error::HeadsPerBlock(self.heads_per_block));
        }
        if self.num_shares > MAX_SHARES || self.num_shares > 0 && self.policy != SplitPolicy::Throughput {
            return Err(Error::NumShares(self.num_shares));
        }
        match self.policy {
            SplitPolicy::BatchInvariant { split_len } if split_len == 0 || split_len % self.tile_len != 0 => {
                Err(Error::SplitLen { split_len, tile_len: self.tile_len })
            }
            _ => Ok(()),
        }
    }
}
