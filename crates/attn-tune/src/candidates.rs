//! The choices that a search looks at.

use crate::choice::{Choice, HEADS_PER_BLOCK, TILE_LEN};
use crate::model::{USUAL_WARPS, cluster_room};
use crate::{PolicyClass, RunKey, Shape, StaticKey};
use attn_plan::MAX_SHARES;

/// What starting and merging an item costs, in tiles, for a block of one head: measured best on ragged batches, and no worse on uniform
/// ones. A block of four heads does a tile in the time of four.
pub(crate) const ITEM_OVERHEAD: u32 = 4;

/// Shares of a full device that are worth trying, in eighths.
const FILLS: [u32; 8] = [FULL, ONE_FEWER, 4, 2, 3, 1, 5, 16];
const FULL: u32 = 8;
/// A block a multiprocessor fewer than it can hold, where that leaves two at least: launched so that all hold equally many.
const ONE_FEWER: u32 = 6;
/// Blocks a multiprocessor from which on scattered rows are streamed by one fewer: there the rows are the bound, not the blocks. Elsewhere a
/// full device is never more than 9 % slower, and up to 21 % faster (H100 and H200).
const MANY_BLOCKS: u32 = 4;
/// Heads of a block and smallest split of short work dealt to workers, as far as they are told apart step by step. Left out, since little
/// was lost without them where they were timed (docs/tuning.md): other splits, several heads, a device not full.
const FEW_SHORT: [(u32, u32); 2] = [(1, 1), (1, 4)];
/// Of long work, whose splits are long anyway: one head, four on scattered rows, either where a row has several lines.
const FEW_LONG: [(u32, u32); 2] = [(1, 1), (4, 1)];
/// The longest head whose codes are one line of memory.
const LINE_DIM: u32 = 128;
/// Tiles of a worker of a full device from which on work is long.
const LONG_WORK: f64 = 24.0;
/// The smallest splits that are tried, in tiles.
const LEAST_SPLITS: [u32; 4] = [1, 2, 4, 8];

/// Of what a worker of a full device would have, the longest item where each has a worker of its own.
const ITEM_SHARE: f64 = 0.65;
/// And those that are tried. An item by several heads takes so many times as long, and there are so many times the workers.
const ITEM_SHARES: [f64; 3] = [1.0, ITEM_SHARE, 0.4];
/// Such items are for batches of so many requests for each worker, at least: with a quarter of one, dealt items were up to twice as fast
/// (H100 and H200), with one and more anything from 21 % faster to 19 % slower.
const ITEM_REQUESTS: f64 = 0.75;
/// And for items of so many tiles: of 15 tiles they lost 3 to 25 %.
const LEAST_ITEM: f64 = 32.0;

/// Tiles of a share at most, of several of a request: in long ones the blocks' luck with the memory differs, and nobody takes over from
/// the unlucky. Scattered rows have more of it.
const LONGEST_SHARE: u32 = 64;
const LONGEST_WIDE_SHARE: u32 = 128;
/// Tiles of a request that is left whole.
const LONGEST_WHOLE: u32 = 512;
/// Tiles of the longest request's shares from which on clusters of unequal requests may wait for each other: the short ones make room soon.
/// With 10 tiles eight shares in the place of six took 14 % less time, with 5 they took 13 % more. Not on scattered rows:
/// with 20 tiles they were 7 % ahead of the next on the H100 and 5 % behind the best on the H200, with 5 they took up to 1.4 times the best.
const LEAST_TURN: u32 = 8;
/// Shares of a request where blocks are more than multiprocessors: larger clusters find no room beside the step before.
const MOST_CROWDED_SHARES: u32 = 10;
/// Shares of which a block a multiprocessor would stand two each on half of them: somewhat fewer or more are faster, but for the largest clusters,
/// which have no other.
const SIDE_BY_SIDE: core::ops::RangeInclusive<u32> = 5..=8;
/// Waves of shares of a request, where it has several.
const MOST_WAVES: u32 = 2;

/// The choices that a search looks at, the full device first.
#[derive(Clone, Debug)]
pub struct Candidates {
    full: u32,
    one_fewer: u32,
    /// Share of a full device, heads and splits of workers, where not all combinations are wanted, of `heads_per_block`.
    fill: u32,
    dealt: &'static [(u32, u32)],
    num_dealt: usize,
    heads_per_block: Option<&'static [u32]>,
    next: usize,
    /// Tiles of an item at most, where each has a worker of its own, and heads of a block; 0 tiles where none should.
    own_items: [(u32, u32); ITEM_SHARES.len() * HEADS_PER_BLOCK.len()],
    /// Bit `n - 1`: requests in `n` shares.
    shares: u32,
    /// The same for shares of several heads a block.
    shares_together: u32,
    share_heads_per_block: &'static [u32],
    share_heads: usize,
    /// Whether blocks may take several heads.
    has_several_heads: bool,
}

impl Candidates {
    /// All of them: what `cargo xtask tune` measures from.
    pub fn all(num_sms: u32, key: &StaticKey, shape: &Shape, run: &RunKey) -> Self {
        let few = Self::few(num_sms, key, shape, run);
        // Several waves too, but not the crumbs of many.
        let pairs = run.batch.saturating_mul(run.num_kv_heads).saturating_mul(shape.row_blocks);
        let most = (8 * few.full / pairs.max(1)).clamp(1, MAX_SHARES).min(shape.most_shares);
        let shares = if key.policy == PolicyClass::Throughput { (1 << most) - 1 } else { 0 };
        let heads: &[u32] = if few.has_several_heads { &HEADS_PER_BLOCK } else { &[1] };
        let mut own_items = few.own_items;
        if key.policy == PolicyClass::Throughput {
            let of_heads = |heads: &'static u32| ITEM_SHARES.map(|share| (share, *heads));
            for (place, (share, heads)) in own_items.iter_mut().zip(heads.iter().flat_map(of_heads)) {
                *place = (item_tiles_of(few.full, share / f64::from(heads), shape, run), heads);
            }
        }
        Self {
            own_items,
            heads_per_block: Some(heads),
            num_dealt: FILLS.len() * heads.len() * LEAST_SPLITS.len(),
            shares,
            shares_together: shares,
            share_heads_per_block: heads,
            ..few
        }
    }

    /// Those that the model tells apart: what is decided from, step by step.
    pub fn few(num_sms: u32, key: &StaticKey, shape: &Shape, run: &RunKey) -> Self {
        // The shape of a block changes bits, and neighbours change what is chosen: batch invariance wants one shape. Only
        // where rows are scattered do neighbouring heads share lines.
        let together = key.policy == PolicyClass::Throughput
            && key.layout.is_scattered()
            && shape.max_heads_per_block >= 4
            && run.num_kv_heads.is_multiple_of(4);
        let full = (num_sms * shape.blocks_per_sm).max(1);
        let has_one_fewer = shape.blocks_per_sm >= 3;
        let (tiles, _) = tiles_of_a_worker(full, shape, run);
        let is_long = tiles >= LONG_WORK;
        let (one_head, four_heads) = FEW_LONG.split_at(1);
        let dealt = match (is_long, together) {
            (true, true) if key.head_dim > LINE_DIM => &FEW_LONG,
            (true, true) => four_heads,
            (true, false) => one_head,
            (false, _) => &FEW_SHORT[..],
        };
        let fill =
            if key.layout.is_scattered() && shape.blocks_per_sm >= MANY_BLOCKS { ONE_FEWER } else { FULL };
        // On scattered rows by two heads, which share a line of scales, or not at all; four in step were never more than 7 % behind.
        let (share, heads) = if together { (0.5, 2) } else { (ITEM_SHARE, 1) };
        let has_own_items = has_one_fewer
            && together == key.layout.is_scattered()
            && !key.goes_in_step()
            && own_items_pay(full, share, shape, run);
        let own_item = match key.policy {
            PolicyClass::BatchInvariant { .. } => (1, 1),
            PolicyClass::Throughput if has_own_items => (item_tiles_of(full, share, shape, run), heads),
            PolicyClass::Throughput => (0, 1),
        };
        Self {
            full,
            one_fewer: if has_one_fewer { full - num_sms } else { full * ONE_FEWER / 8 },
            own_items: std::array::from_fn(|at| if at == 0 { own_item } else { (0, 1) }),
            fill,
            dealt,
            num_dealt: dealt.len(),
            heads_per_block: None,
            next: 0,
            shares: shares_of(num_sms, key, shape, run),
            // Several heads are slow for short work, and what is cut is short.
            shares_together: 1,
            share_heads_per_block: if together && is_long { &HEADS_PER_BLOCK } else { &[1] },
            share_heads: 0,
            has_several_heads: together,
        }
    }

    /// Heads of a block, share of a full device and smallest split of the next workers.
    fn next_dealt(&mut self) -> Option<(u32, u32, u32)> {
        let index = self.next;
        if index >= self.num_dealt {
            return None;
        }
        self.next += 1;
        let Some(heads) = self.heads_per_block else {
            return self.dealt.get(index).map(|(heads, least)| (*heads, self.fill, *least));
        };
        let fill = FILLS.get(index / (heads.len() * LEAST_SPLITS.len()))?;
        let least = LEAST_SPLITS.get(index % LEAST_SPLITS.len())?;
        Some((*heads.get(index / LEAST_SPLITS.len() % heads.len())?, *fill, *least))
    }

    fn next_shares(&mut self) -> Option<(u32, u32)> {
        while self.shares != 0 {
            let num_shares = self.shares.trailing_zeros() + 1;
            let heads = self.share_heads_per_block.get(self.share_heads).copied();
            let is_last = self.share_heads + 1 >= self.share_heads_per_block.len();
            self.share_heads = if is_last { 0 } else { self.share_heads + 1 };
            if is_last {
                self.shares &= self.shares - 1;
            }
            let is_offered = |heads: &u32| *heads == 1 || self.shares_together >> (num_shares - 1) & 1 == 1;
            if let Some(heads) = heads.filter(is_offered) {
                return Some((num_shares, heads));
            }
        }
        None
    }
}

/// Tiles that a worker of a full device has, and how many workers there are.
fn tiles_of_a_worker(full: u32, shape: &Shape, run: &RunKey) -> (f64, f64) {
    let blocks = f64::from(run.num_kv_heads) * f64::from(shape.row_blocks);
    let workers = (f64::from(full) / blocks.max(1.0)).max(1.0);
    (run.kv_tokens as f64 / f64::from(TILE_LEN) / workers, workers)
}

/// Tiles of an item at most where each has a worker of its own, for this share of a worker's load.
fn item_tiles_of(full: u32, share: f64, shape: &Shape, run: &RunKey) -> u32 {
    let (tiles, _) = tiles_of_a_worker(full, shape, run);
    (share * tiles).clamp(1.0, f64::from(1 << 20)) as u32
}

/// Whether the longest request is more than twice the mean.
fn is_ragged(run: &RunKey) -> bool {
    u64::from(run.longest) * u64::from(run.batch) > 2 * run.kv_tokens
}

/// Whether ragged batches of long rows may be best balanced by the device itself.
fn own_items_pay(full: u32, share: f64, shape: &Shape, run: &RunKey) -> bool {
    let (tiles, workers) = tiles_of_a_worker(full, shape, run);
    let is_many = f64::from(run.batch) >= ITEM_REQUESTS * workers;
    is_ragged(run) && is_many && share * tiles >= LEAST_ITEM
}

/// Numbers of shares that may be best: half a block a multiprocessor, three quarters, one, one and a half, two, pairs, and the request whole.
fn shares_of(num_sms: u32, key: &StaticKey, shape: &Shape, run: &RunKey) -> u32 {
    let pairs = run.batch.saturating_mul(run.num_kv_heads).saturating_mul(shape.row_blocks);
    if key.policy != PolicyClass::Throughput || pairs == 0 || shape.most_shares == 0 {
        return 0;
    }
    let tiles = run.longest.div_ceil(TILE_LEN);
    let (blocks_per_sm, warps) = shape.share_blocks(1);
    let is_wide = warps > USUAL_WARPS;
    // A step of 16 tokens a warp is the least.
    let most = tiles.div_ceil(warps / USUAL_WARPS).clamp(1, MAX_SHARES).min(shape.most_shares);
    let longest = if is_wide && !key.layout.is_scattered() { LONGEST_WIDE_SHARE } else { LONGEST_SHARE };
    let room = num_sms * blocks_per_sm;
    let takes_turns = !key.layout.is_scattered() && is_ragged(run);
    let power = |blocks: u32| 1 << (blocks / pairs).clamp(1, MAX_SHARES).ilog2();
    // Its bit, or none.
    let offer = |shares: u32| {
        let shares = shares.clamp(1, most);
        let blocks = shares.saturating_mul(pairs);
        let len = tiles.div_ceil(shares);
        let fits = match shares {
            1 => len <= LONGEST_WHOLE,
            2 => len <= longest && blocks <= MOST_WAVES * room,
            // Large clusters leave no room for the next step beside them.
            _ => {
                len <= longest
                    && (f64::from(blocks) <= cluster_room(shares) * f64::from(room)
                        || (takes_turns && len >= LEAST_TURN && blocks <= room))
                    && (shares <= MOST_CROWDED_SHARES || blocks <= num_sms)
                    && !(SIDE_BY_SIDE.contains(&shares) && 8 * blocks > 7 * num_sms && blocks <= num_sms)
            }
        };
        if fits { 1u32 << (shares - 1) } else { 0 }
    };
    let in_place_of = |offered: u32, blocks: u32| if offered == 0 { offer(blocks / pairs) } else { 0 };
    let half = offer(num_sms / 2 / pairs) | offer(power(num_sms / 2));
    let (one, two) = (offer(num_sms / pairs) | offer(power(num_sms)), offer(power(2 * num_sms)));
    let between = in_place_of(one, 3 * num_sms / 4) | in_place_of(two, 3 * num_sms / 2);
    half | one | two | between | offer(2) | offer(1)
}

impl Iterator for Candidates {
    type Item = Choice;

    fn next(&mut self) -> Option<Choice> {
        if let Some((heads_per_block, fill, min_split_tiles)) = self.next_dealt() {
            let blocks = if fill == ONE_FEWER { self.one_fewer } else { self.full * fill / 8 };
            return Some(Choice {
                num_blocks: blocks.clamp(1, 1 << 16),
                heads_per_block,
                min_split_tiles,
                item_overhead: ITEM_OVERHEAD / heads_per_block,
                num_shares: 0,
                item_tiles: 0,
            });
        }
        let full = Choice { item_overhead: ITEM_OVERHEAD, ..Choice::dealt(self.full.min(1 << 16)) };
        if let Some(own) = self.own_items.iter_mut().find(|(item_tiles, _)| *item_tiles > 0) {
            let (item_tiles, heads_per_block) = std::mem::replace(own, (0, 1));
            let item_overhead = ITEM_OVERHEAD / heads_per_block;
            return Some(Choice { item_tiles, heads_per_block, item_overhead, ..full });
        }
        let (num_shares, heads_per_block) = self.next_shares()?;
        Some(Choice { num_shares, heads_per_block, ..full })
    }
}
