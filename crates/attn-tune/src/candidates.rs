//! The choices that a search looks at.

use crate::choice::{Choice, HEADS_PER_BLOCK, TILE_LEN};
use crate::model::{CLUSTER_ROOM, LINE_BYTES, USUAL_WARPS};
use crate::{PolicyClass, RunKey, Shape, StaticKey};
use attn_plan::MAX_SHARES;

/// What starting and merging an item costs, in tiles, for a block of one head: measured best on ragged batches, and no worse on uniform
/// ones. A block of four heads does a tile in the time of four.
pub(crate) const ITEM_OVERHEAD: u32 = 4;

/// Shares of a full device that are worth trying, in eighths.
const FILLS: [u32; 8] = [8, ONE_FEWER, 4, 2, 3, 1, 5, 16];
/// Of them, those that are told apart step by step.
const NUM_FEW: usize = 4;
/// A block a multiprocessor fewer than it can hold, where that leaves two at least: launched so that all hold equally many.
const ONE_FEWER: u32 = 6;
/// Of what a worker of a full device would have, the longest item where each has a worker of its own.
const ITEM_SHARE: f64 = 0.65;
/// And those that are tried.
const ITEM_SHARES: [f64; 3] = [1.0, ITEM_SHARE, 0.4];
/// Such items are for batches of so many requests for each worker: with fewer, dealt items were 1 to 6 % faster (H100, 64 requests and
/// less on eight heads), with more 2 to 6 % slower.
const ITEM_REQUESTS: f64 = 2.0;
/// And for items of so many tiles: shorter ones lost 3 to 20 %.
const LEAST_ITEM: f64 = 48.0;

/// The choices that a search looks at, the full device first.
#[derive(Clone, Debug)]
pub struct Candidates {
    full: u32,
    one_fewer: u32,
    heads_per_block: &'static [u32],
    min_split_tiles: &'static [u32],
    fills: &'static [u32],
    next: usize,
    /// Tiles of an item at most, where each has a worker of its own; 0 where none should.
    item_tiles: [u32; 3],
    /// Bit `n - 1`: requests in `n` shares.
    shares: u32,
    share_heads_per_block: &'static [u32],
    share_heads: usize,
}

impl Candidates {
    /// All of them: what `cargo xtask tune` measures from.
    pub fn all(num_sms: u32, key: &StaticKey, shape: &Shape, run: &RunKey) -> Self {
        let few = Self::few(num_sms, key, shape, run);
        // Several waves too, but not the crumbs of many.
        let pairs = run.batch.saturating_mul(run.num_kv_heads).saturating_mul(shape.row_blocks);
        let most = (8 * few.full / pairs.max(1)).clamp(1, MAX_SHARES).min(shape.most_shares);
        let shares = if key.policy == PolicyClass::Throughput { (1 << most) - 1 } else { 0 };
        let heads_per_block =
            if few.heads_per_block.len() > 1 { &HEADS_PER_BLOCK } else { few.heads_per_block };
        let share_heads_per_block = heads_per_block;
        let item_tiles = match key.policy {
            PolicyClass::Throughput => ITEM_SHARES.map(|share| item_tiles_of(few.full, share, shape, run)),
            PolicyClass::BatchInvariant { .. } => few.item_tiles,
        };
        Self {
            item_tiles,
            min_split_tiles: &[1, 2, 4, 8],
            heads_per_block,
            fills: &FILLS,
            shares,
            share_heads_per_block,
            ..few
        }
    }

    /// Those that the model tells apart: what is decided from, step by step.
    pub fn few(num_sms: u32, key: &StaticKey, shape: &Shape, run: &RunKey) -> Self {
        let num_kv_heads = run.num_kv_heads;
        // The shape of a block changes bits, and neighbours change what is chosen: batch invariance wants one shape. Only
        // where rows are scattered do neighbouring heads share lines.
        let together = key.policy == PolicyClass::Throughput
            && key.layout.is_scattered()
            && shape.max_heads_per_block >= 4
            && num_kv_heads.is_multiple_of(4);
        // Four heads pay where the kernel takes them in step, or where a row is less than a line of memory; else two are the
        // better. Shares are short work, for which four are slow.
        let (heads_per_block, share_heads_per_block): (&[u32], &[u32]) =
            match (together, key.goes_in_step() || key.head_dim < LINE_BYTES) {
                (false, _) => (&[1], &[1]),
                (true, false) => (&[1, 2, 4], &[1, 2]),
                (true, true) => (&[1, 4], &[1, 2]),
            };
        let full = (num_sms * shape.blocks_per_sm).max(1);
        let has_one_fewer = shape.blocks_per_sm >= 3;
        Self {
            full,
            one_fewer: if has_one_fewer { full - num_sms } else { full * ONE_FEWER / 8 },
            item_tiles: match key.policy {
                PolicyClass::BatchInvariant { .. } => [1, 0, 0],
                PolicyClass::Throughput if has_one_fewer && own_items_pay(full, key, shape, run) => {
                    [item_tiles_of(full, ITEM_SHARE, shape, run), 0, 0]
                }
                PolicyClass::Throughput => [0; 3],
            },
            heads_per_block,
            // Twice the heads, fewer lengths: all are told apart step by step.
            min_split_tiles: if together { &[4, 1] } else { &[4, 1, 8] },
            fills: FILLS.get(..NUM_FEW).unwrap_or(&FILLS),
            next: 0,
            shares: shares_of(num_sms, key, shape, run),
            share_heads_per_block,
            share_heads: 0,
        }
    }
}

/// Tiles that a worker of a full device has, at least.
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

/// Whether ragged batches of long rows are best balanced by the device itself.
fn own_items_pay(full: u32, key: &StaticKey, shape: &Shape, run: &RunKey) -> bool {
    let is_ragged = u64::from(run.longest) * u64::from(run.batch) > 2 * run.kv_tokens;
    let (tiles, workers) = tiles_of_a_worker(full, shape, run);
    let is_many = f64::from(run.batch) >= ITEM_REQUESTS * workers;
    !key.layout.is_scattered() && is_ragged && is_many && ITEM_SHARE * tiles >= LEAST_ITEM
}

/// Tiles of a share at most: in long ones the blocks' luck with the memory differs, and nobody takes over from the unlucky.
const LONGEST_SHARE: u32 = 32;
/// The same of blocks of eight warps, of several shares and of one: 1 x 131072 in 16 took 136 us against 118.
const LONGEST_WIDE_SHARE: u32 = 64;
const LONGEST_WIDE_WHOLE: u32 = 128;
/// The same of scattered rows of half a line each. Of whole lines, where four heads are read together it is [`LONGEST_SHARE`]: LightLLM's buffers,
/// 32 to 128 requests of 8192 whole, took 7 to 9 % longer on an H100 than four heads a block.
const LONGEST_THIN_SHARE: u32 = 16;
/// Shares of a request where blocks of eight warps are more than multiprocessors.
const MOST_EVEN_SHARES: u32 = 10;
/// Shares of a request at most, but for steps of a tile each: in the benchmark larger clusters lost to workers (one kv head,
/// 16 x 1024 in 8 shares 8.0 us against 7.5; 8 x 8192 on eight heads in 5 shares 75 against 71).
const MOST_USUAL_SHARES: u32 = 4;

/// Numbers of shares that may be best: one wave of blocks, two a multiprocessor or as many as fit, and no share so long that
/// workers would do better.
fn shares_of(num_sms: u32, key: &StaticKey, shape: &Shape, run: &RunKey) -> u32 {
    let pairs = run.batch.saturating_mul(run.num_kv_heads).saturating_mul(shape.row_blocks);
    if key.policy != PolicyClass::Throughput || pairs == 0 {
        return 0;
    }
    let tiles = run.longest.div_ceil(TILE_LEN);
    let (blocks_per_sm, warps) = shape.share_blocks(1);
    if warps > USUAL_WARPS {
        let longest = match (key.layout.is_scattered(), key.head_dim < LINE_BYTES) {
            (true, true) => LONGEST_THIN_SHARE,
            (true, false) if run.num_kv_heads.is_multiple_of(4) => LONGEST_SHARE,
            _ => LONGEST_WIDE_WHOLE,
        };
        return wide_shares_of(num_sms, num_sms * blocks_per_sm / pairs, pairs, tiles, shape, longest);
    }
    let room = num_sms * shape.blocks_per_sm;
    let crowded = (f64::from(room) * CLUSTER_ROOM) as u32 / pairs;
    let mut candidates = 0;
    for shares in [(2 * num_sms).min(room) / pairs, num_sms / pairs, crowded.min(8), 1] {
        // Of two a multiprocessor a power of two: others fill them less evenly.
        let shares = if shares == crowded { shares } else { (1 << shares.max(1).ilog2()).min(MAX_SHARES) };
        let shares = shares.min(shape.most_shares);
        let blocks = shares * pairs;
        let len = if shares > 0 { tiles.div_ceil(shares) } else { u32::MAX };
        let is_filled = len <= 2 || 4 * blocks >= 3 * num_sms;
        // Two large clusters a multiprocessor find no room side by side.
        let is_packed = shares > MOST_USUAL_SHARES && blocks > num_sms;
        let is_usual = shares <= MOST_USUAL_SHARES && (shares == 1 || len <= LONGEST_SHARE / 2);
        if shares > 0
            && blocks <= room
            && len <= LONGEST_SHARE
            && is_filled
            && !is_packed
            && (is_usual || len <= 1)
        {
            candidates |= 1 << (shares - 1);
        }
    }
    candidates
}

/// The same for blocks of eight warps, which a device holds two of a multiprocessor: one a multiprocessor, or half a one, leaves room for
/// the next step; one and a half; two in pairs or alone. A tile of 16 tokens a warp is the least. Shares of 4096 tokens were still best on eight heads
/// (8 x 8192 in 2), whole requests of 8192 too (32 x 8192).
fn wide_shares_of(num_sms: u32, crowded: u32, pairs: u32, tiles: u32, shape: &Shape, longest: u32) -> u32 {
    let mut candidates = 0;
    let most = tiles.div_ceil(2).clamp(1, MAX_SHARES).min(shape.most_shares);
    // More blocks than multiprocessors: larger clusters leave gaps, and long shares end unevenly (8 x 8192 in 3: an H200 lost 12 %, an
    // H100 gained 5).
    let more = Some(3 * num_sms / 2 / pairs)
        .filter(|shares| *shares <= MOST_EVEN_SHARES && tiles <= shares * LONGEST_SHARE / 2)
        .unwrap_or(1);
    for shares in [num_sms / pairs, num_sms / 2 / pairs, more, crowded.min(2), 1] {
        let shares = shares.min(most);
        // Of shares so short, half as many are done as soon, and leave room.
        let is_crumb = tiles.div_ceil(shares.max(1)) <= 2 && 2 * shares * pairs > num_sms && shares > 1;
        let longest = if shares > 1 { longest.min(LONGEST_WIDE_SHARE) } else { longest };
        if shares > 0 && !is_crumb && tiles.div_ceil(shares) <= longest {
            candidates |= 1 << (shares - 1);
        }
    }
    candidates
}

impl Iterator for Candidates {
    type Item = Choice;

    fn next(&mut self) -> Option<Choice> {
        let (heads, mins) = (self.heads_per_block.len(), self.min_split_tiles.len());
        let index = self.next;
        if let Some(fill) = self.fills.get(index / (heads * mins)) {
            self.next += 1;
            let heads_per_block = *self.heads_per_block.get(index / mins % heads)?;
            let blocks = if *fill == ONE_FEWER { self.one_fewer } else { self.full * fill / 8 };
            return Some(Choice {
                num_blocks: blocks.clamp(1, 1 << 16),
                heads_per_block,
                min_split_tiles: *self.min_split_tiles.get(index % mins)?,
                item_overhead: ITEM_OVERHEAD / heads_per_block,
                num_shares: 0,
                item_tiles: 0,
            });
        }
        if let Some(item_tiles) = self.item_tiles.iter_mut().find(|item_tiles| **item_tiles > 0) {
            let item_tiles = std::mem::take(item_tiles);
            return Some(Choice {
                num_blocks: self.full.min(1 << 16),
                heads_per_block: 1,
                min_split_tiles: 1,
                item_overhead: ITEM_OVERHEAD,
                num_shares: 0,
                item_tiles,
            });
        }
        if self.shares == 0 {
            return None;
        }
        let num_shares = self.shares.trailing_zeros() + 1;
        let heads_per_block = *self.share_heads_per_block.get(self.share_heads)?;
        self.share_heads += 1;
        if self.share_heads == self.share_heads_per_block.len() {
            (self.shares, self.share_heads) = (self.shares & (self.shares - 1), 0);
        }
        let num_blocks = self.full.min(1 << 16);
        Some(Choice {
            num_blocks,
            heads_per_block,
            min_split_tiles: 1,
            item_overhead: ITEM_OVERHEAD,
            num_shares,
            item_tiles: 0,
        })
    }
}
