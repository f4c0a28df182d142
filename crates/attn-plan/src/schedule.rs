//! The greedy deal behind [`crate::SplitPlan`], and the smallest budget with which it suffices.

use crate::SplitConfig;
use crate::plan::{NO_PARTIAL, WorkItem};

/// A request's visible tokens, and the tiles that they touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    start: u32,
    end: u32,
    first_tile: u32,
    end_tile: u32,
    num_splits: u32,
}

impl Extent {
    /// `split_tiles` is 0 where only workers' ends cut.
    pub fn new(visible: std::ops::Range<u32>, tile_len: u32, split_tiles: u32) -> Self {
        let first_tile = visible.start / tile_len;
        let end_tile = if visible.is_empty() { first_tile } else { visible.end.div_ceil(tile_len) };
        let num_splits = match split_tiles {
            0 => 1,
            split => (end_tile.div_ceil(split) - first_tile / split).max(1),
        };
        Self { start: visible.start, end: visible.end, first_tile, end_tile, num_splits }
    }

    pub fn tiles(&self) -> u64 {
        u64::from(self.end_tile - self.first_tile)
    }

    /// Share `rank` of the request in `num_shares` equal ones: whole tiles, as equal as they go. `None` where there are more
    /// shares than tiles and nothing is left for this one; a request without tokens is its last share. `share_of` in
    /// `cuda/decode/stage1.cuh` is the same.
    pub fn share(&self, request: usize, rank: u32, num_shares: u32, tile_len: u32) -> Option<WorkItem> {
        let (tiles, shares) = (self.tiles(), u64::from(num_shares.max(1)));
        let cut = |rank: u32| u64::from(self.first_tile) + tiles * u64::from(rank) / shares;
        let (from, to) = (cut(rank), cut(rank + 1));
        if from == to && !(tiles == 0 && rank + 1 == num_shares) {
            return None;
        }
        let end = u64::from(self.end);
        let start = (from * u64::from(tile_len)).clamp(u64::from(self.start), end);
        Some(WorkItem {
            request_idx: request as u32,
            token_start: start as u32,
            token_end: (to * u64::from(tile_len)).clamp(start, end) as u32,
            partial_idx: NO_PARTIAL,
        })
    }

    /// Items of the request as long as no worker's end cuts it; an empty request has one.
    fn num_splits(&self) -> u64 {
        u64::from(self.num_splits)
    }
}

/// Tiles between the cuts of requests that are not to be cut: more than any has.
const UNCUT: u64 = 1 << 40;

/// A batch in tiles and the rule by which it is cut.
#[derive(Clone, Copy)]
pub(crate) struct Schedule<'a> {
    extents: &'a [Extent],
    tile_len: u64,
    num_workers: u64,
    /// Cost of an item beside its tiles.
    overhead: u64,
    /// The fewest tiles worth an item of their own.
    piece: u64,
    /// Tiles between the cuts of [`crate::SplitPolicy::BatchInvariant`].
    split_tiles: Option<u64>,
}

impl<'a> Schedule<'a> {
    /// `config` has passed its check.
    pub fn new(extents: &'a [Extent], config: &SplitConfig) -> Self {
        Self {
            extents,
            tile_len: u64::from(config.tile_len),
            num_workers: u64::from(config.num_workers),
            overhead: u64::from(config.item_overhead),
            piece: u64::from(config.min_split_tiles.max(1)),
            split_tiles: Some(u64::from(config.split_tiles())).filter(|split| *split > 0),
        }
    }

    /// The same requests, cut nowhere.
    fn uncut(&self) -> Self {
        Self { split_tiles: Some(UNCUT), ..*self }
    }

    /// The schedule to deal by, and its budget: without any cut where that costs no worker more than two items' overheads, for then there
    /// is nothing to merge.
    pub fn with_budget(self) -> (Self, u64) {
        let budget = self.smallest_budget();
        if self.split_tiles.is_none() {
            let uncut = self.uncut();
            let most = budget + 2 * self.overhead;
            let longest = self.extents.iter().map(Extent::tiles).max().unwrap_or(0);
            if longest + self.overhead <= most && uncut.workers_needed(most) <= self.num_workers {
                let least = uncut.smallest_budget();
                return (uncut, least);
            }
        }
        (self, budget)
    }

    /// Items of the invariant cut; an upper bound of those of the other, where each worker begins at most one more.
    pub fn max_items(&self) -> u64 {
        match self.split_tiles {
            None => self.extents.len() as u64 + self.num_workers,
            Some(_) => self.extents.iter().map(|extent| extent.num_splits()).sum(),
        }
    }

    /// Items of [`Self::cut_up`].
    pub fn num_items_of(&self, item_tiles: u32) -> u64 {
        let pieces = |extent: &Extent| match self.split_tiles {
            None => extent.tiles().div_ceil(u64::from(item_tiles.max(1))).max(1),
            Some(_) => extent.num_splits(),
        };
        self.extents.iter().map(pieces).sum()
    }

    /// Calls `take(item, cost in tiles)` in order: under the throughput policy equal items of at most so many tiles.
    pub fn cut_up(&self, item_tiles: u32, take: &mut impl FnMut(WorkItem, u64)) {
        if self.split_tiles.is_some() {
            return self.deal(u64::MAX >> 1, &mut |item, cost, _| take(item, cost));
        }
        for (request, extent) in self.extents.iter().enumerate() {
            // Fewer than MAX_ITEMS.
            let count = extent.tiles().div_ceil(u64::from(item_tiles.max(1))).max(1) as u32;
            for piece in 0..count {
                if let Some(item) = extent.share(request, piece, count, self.tile_len as u32) {
                    let tiles =
                        Extent::new(item.token_start..item.token_end, self.tile_len as u32, 0).tiles();
                    take(item, tiles + self.overhead);
                }
            }
        }
    }

    /// The smallest load a worker must bear so that the greedy deal gets by with `num_workers`.
    ///
    /// A worker is closed with less room than `waste` left, and each cut costs one more overhead, so a budget of
    /// `ceil(total / num_workers) + waste + overhead` always suffices (`docs/split-schedule.md`): the bisection is
    /// over a handful of values, whatever the batch.
    fn smallest_budget(&self) -> u64 {
        let longest = self.extents.iter().map(Extent::tiles).max().unwrap_or(0);
        let (total, least, waste) = match self.split_tiles {
            None => {
                let total = self.extents.iter().map(|extent| extent.tiles() + self.overhead).sum::<u64>();
                (total, self.piece + self.overhead, 2 * self.piece + 2 * self.overhead)
            }
            Some(split) => {
                let cost = |extent: &Extent| extent.tiles() + extent.num_splits() * self.overhead;
                let largest = split.min(longest) + self.overhead;
                (self.extents.iter().map(cost).sum(), largest, largest)
            }
        };
        let mut low = total.div_ceil(self.num_workers).max(least);
        let mut high = low + waste;
        while low < high {
            let middle = low + (high - low) / 2;
            if self.workers_needed(middle) <= self.num_workers { high = middle } else { low = middle + 1 }
        }
        high
    }

    fn workers_needed(&self, budget: u64) -> u64 {
        let (mut workers, mut room) = (1, budget);
        for (request, extent) in self.extents.iter().enumerate() {
            // Most requests fit whole; only those at a worker's end are cut to see.
            let whole = extent.tiles() + extent.num_splits() * self.overhead;
            if whole <= room {
                room -= whole;
            } else {
                self.walk(request, extent, budget, &mut room, &mut |_, _, _, is_new_worker| {
                    workers += u64::from(is_new_worker);
                });
            }
        }
        workers
    }

    /// Calls `take(item, cost in tiles, whether it starts a new worker)` in order.
    pub fn deal(&self, budget: u64, take: &mut impl FnMut(WorkItem, u64, bool)) {
        let mut to_item = |request: usize, tile: u64, tiles: u64, is_new_worker| {
            let Some(extent) = self.extents.get(request) else { return };
            let start = (tile * self.tile_len).max(u64::from(extent.start));
            let end = ((tile + tiles) * self.tile_len).min(u64::from(extent.end)).max(start);
            let item = WorkItem {
                request_idx: request as u32,
                token_start: start as u32,
                token_end: end as u32,
                partial_idx: NO_PARTIAL,
            };
            take(item, tiles + self.overhead, is_new_worker);
        };
        let mut room = budget;
        for (request, extent) in self.extents.iter().enumerate() {
            self.walk(request, extent, budget, &mut room, &mut to_item);
        }
    }

    /// The greedy deal of one request: `take(request, first tile, tiles, whether a new worker starts)`.
    #[inline]
    fn walk(
        &self,
        request: usize,
        extent: &Extent,
        budget: u64,
        room: &mut u64,
        take: &mut impl FnMut(usize, u64, u64, bool),
    ) {
        let (mut tile, end) = (u64::from(extent.first_tile), u64::from(extent.end_tile));
        let mut next_cut = self.split_tiles.map(|split| (tile / split + 1) * split);
        loop {
            let left = end - tile;
            let mut is_new_worker = false;
            let tiles = match &mut next_cut {
                Some(cut) => {
                    let tiles = left.min(*cut - tile);
                    *cut += self.split_tiles.unwrap_or(left);
                    is_new_worker = tiles + self.overhead > *room && *room < budget;
                    tiles
                }
                None => self.bite(left, *room).unwrap_or_else(|| {
                    is_new_worker = *room < budget;
                    // On a worker of its own an item may leave a sliver behind, so that every budget gets ahead.
                    left.min(budget.saturating_sub(self.overhead).max(1))
                }),
            };
            if is_new_worker {
                *room = budget;
            }
            *room = room.saturating_sub(tiles + self.overhead);
            take(request, tile, tiles, is_new_worker);
            tile += tiles;
            if tile >= end {
                break;
            }
        }
    }

    /// How many of the `left` tiles go into this worker's room: all, or what fits if at least a piece is done and at
    /// least a piece remains, or none.
    #[inline]
    fn bite(&self, left: u64, room: u64) -> Option<u64> {
        let fits = room.checked_sub(self.overhead)?;
        if left <= fits {
            return Some(left);
        }
        let bite = fits.min(left.saturating_sub(self.piece));
        (bite >= self.piece).then_some(bite)
    }
}
