//! What the cost model expects of one step, choice by choice.

use crate::choice::{Choice, HEADS_PER_BLOCK, TILE_LEN};
use crate::model::{CostModel, USUAL_WARPS, cluster_room, stands_side_by_side};
use crate::{PolicyClass, RunKey, Shape, StaticKey};

/// Tokens that a warp takes at a time.
const STEP_TOKENS: u32 = 16;
/// Waves beyond which the last one's gaps do not count.
const FEW_WAVES: f64 = 4.0;
/// Partials of a request beyond which stage 2 shows how many there are.
const FEW_PARTIALS: f64 = 64.0;
/// Blocks of eight warps that a multiprocessor holds at once, and waves of them up to which items with workers of their own are theirs: `Decoder::takes_wide_blocks`.
const WIDE_BLOCKS_PER_SM: f64 = 2.0;
const WIDE_WAVES: f64 = 3.0;
/// Of a request with unequal neighbours, the part of an item that its end makes.
const LAST_ITEM: f64 = 0.5;

/// How fast a warp goes through its steps, microseconds each.
pub(crate) struct Pace {
    pub alone_us: f64,
    pub issue_us: f64,
}

/// A step, and what all choices for it have in common.
pub(crate) struct Expect<'a> {
    pub model: &'a CostModel,
    pub key: &'a StaticKey,
    pub shape: &'a Shape,
    pub run: &'a RunKey,
    pub num_sms: f64,
    /// Its inverse.
    pub per_sm: f64,
    /// Of all requests, and of the longest.
    pub tiles: f64,
    pub longest: f64,
    pub is_uniform: bool,
    /// That a worker of one head needs.
    pub blocks: f64,
    /// The cubes of bytes over the bandwidth and of what scattered rows cost, for one, two and four heads a block.
    pub cubes: [f64; HEADS_PER_BLOCK.len()],
    pub pace: Pace,
    /// In blocks of eight warps.
    pub wide: Pace,
    /// Outputs of a kv head beyond the usual, in 512: what is written, merged and divided at the end.
    pub outputs: f64,
    /// Channels of a head beyond the usual, in 128.
    pub channels: f64,
}

impl Expect<'_> {
    /// Microseconds with a choice.
    pub(crate) fn us(&self, choice: &Choice) -> f64 {
        let at = match choice.heads_per_block {
            1 => 0,
            2 => 1,
            _ => 2,
        };
        let cubes = self.cubes[at];
        let blocks_per_worker = self.blocks / [1.0, 2.0, 4.0][at];
        match (choice.num_shares, self.key.policy) {
            (1.., PolicyClass::Throughput) => self.shared_out(cubes, blocks_per_worker, choice),
            (_, PolicyClass::BatchInvariant { split_len }) if self.has_wide_items() => {
                self.cut_wide(split_len)
            }
            _ => self.dealt_out(cubes, blocks_per_worker, choice),
        }
    }

    /// Whether items have a kernel of eight warps: where shares have, but for fewer variants.
    fn has_wide_items(&self) -> bool {
        self.shape.share_blocks(1).1 > USUAL_WARPS && self.key.has_wide_items()
    }

    fn dealt_out(&self, cubes: f64, blocks_per_worker: f64, choice: &Choice) -> f64 {
        let Self { shape, tiles, .. } = *self;
        let deal = self.deal(choice);
        let own = self.own_items(choice);
        let count = own.map_or(deal.used, |(count, _)| count);
        let num_blocks = count * blocks_per_worker;
        let wide_room = self.num_sms * WIDE_BLOCKS_PER_SM;
        let is_wide = own.is_some()
            && choice.heads_per_block == 1
            && num_blocks <= WIDE_WAVES * wide_room
            && self.has_wide_items();
        let resident = if is_wide { wide_room } else { self.num_sms * f64::from(shape.blocks_per_sm) };
        let (waves, blocks) = ((num_blocks / resident).max(1.0), num_blocks.min(resident));
        // Of four warps each takes a quarter of a tile, of each head; eight take two tiles at a time.
        let steps_of =
            |tiles: f64| if is_wide { ceil(tiles / 2.0) } else { tiles * f64::from(choice.heads_per_block) };
        let mean = tiles * waves / count;
        let steps = match own {
            // The longest come first, so that short ones fill the gaps at the end.
            Some((_, len)) if !self.is_uniform => steps_of(mean.max(len)),
            Some((_, len)) => steps_of(len) * whole_waves(waves),
            None => steps_of(deal.tiles) * whole_waves(waves),
        };
        let items = if own.is_some() { waves * self.model.own_item } else { deal.items * waves };
        let partials = if deal.is_whole { 0.0 } else { ceil(deal.used * self.longest / tiles).max(2.0) };
        let together = self.model.head_us * f64::from(choice.heads_per_block - 1);
        let pace = if is_wide { &self.wide } else { &self.pace };
        together + self.in_items(cubes, pace, blocks, steps, items, partials)
    }

    /// Fixed cuts where items have a kernel of eight warps: dealt to as many workers as find room, whatever a choice says (`Decoder::deal`). One piece
    /// goes into the next without a pause.
    fn cut_wide(&self, split_len: u32) -> f64 {
        let (pieces, len) = pieces(self.run, split_len);
        let workers = ((self.num_sms * WIDE_BLOCKS_PER_SM / self.blocks) as u64).max(1) as f64;
        let items = ceil(pieces / workers);
        let blocks = ceil(pieces / items) * self.blocks;
        let partials = if pieces <= f64::from(self.run.batch) { 0.0 } else { 2.0 };
        self.in_items(self.cubes[0], &self.wide, blocks, items * ceil(len / 2.0), 1.0, partials)
    }

    /// So many blocks at once, and steps and items of the one that has most; 0 partials where no request is cut.
    fn in_items(&self, cubes: f64, pace: &Pace, blocks: f64, steps: f64, items: f64, partials: f64) -> f64 {
        let Self { model, outputs, .. } = *self;
        let stream = joined(cubes, pace, steps, ceil(blocks * self.per_sm).max(1.0));
        let many = (partials - FEW_PARTIALS).max(0.0);
        let merge = if partials > 0.0 { model.merge_us + model.merge_partial_us * many } else { 0.0 };
        let crowd = model.crowd_us * (blocks * self.per_sm - 1.0).clamp(0.0, 3.0);
        let item_us = model.item_us + model.item_outputs_us * outputs + model.item_dim_us * self.channels;
        model.launch_us + crowd + stream + items * item_us + merge
    }

    /// Items that have workers of their own, and the tiles of the longest; `None` where items are dealt.
    fn own_items(&self, choice: &Choice) -> Option<(f64, f64)> {
        let Self { run, tiles, longest, .. } = *self;
        if choice.item_tiles == 0 {
            return None;
        }
        if let PolicyClass::BatchInvariant { split_len } = self.key.policy {
            return Some(pieces(run, split_len));
        }
        let (batch, most) = (f64::from(run.batch), f64::from(choice.item_tiles));
        let each = ceil(longest / most).max(1.0);
        let count =
            if self.is_uniform { batch * each } else { (tiles / most + LAST_ITEM * batch).max(batch) };
        Some((count.max(1.0), ceil(longest / each).max(1.0)))
    }

    fn shared_out(&self, cubes: f64, blocks_per_worker: f64, choice: &Choice) -> f64 {
        let Self { model, shape, run, outputs, .. } = *self;
        let shares = f64::from(choice.num_shares);
        let all = f64::from(run.batch) * shares * blocks_per_worker;
        let (blocks_per_sm, warps) = shape.share_blocks(choice.heads_per_block);
        let is_wide = warps > USUAL_WARPS;
        // Whole clusters leave gaps, but for pairs.
        let room = self.num_sms * f64::from(blocks_per_sm) * cluster_room(choice.num_shares);
        let (waves, blocks) = ((all / room).max(1.0), all.min(room));
        // The longest share ends last, and its last step counts whole; so does the last wave.
        let share_tiles = run.longest.div_ceil(TILE_LEN).div_ceil(choice.num_shares).max(1);
        let steps = (share_tiles * TILE_LEN).div_ceil(warps * STEP_TOKENS) * choice.heads_per_block;
        let fill = (self.tiles / (f64::from(run.batch) * self.longest).max(1.0)).min(1.0);
        let is_slow = !self.is_uniform && self.key.layout.is_scattered();
        let steps = f64::from(steps)
            * if self.is_uniform { ceil(waves).min(waves + 1.0) } else { 1.0 + fill * (waves - 1.0) }
            * if is_slow { 1.0 + model.ragged_shares } else { 1.0 };
        let stand = if stands_side_by_side(choice.num_shares) { 2.0 } else { 1.0 };
        let pace = if is_wide { &self.wide } else { &self.pace };
        let stream = joined(cubes, pace, steps, ceil(blocks * self.per_sm).max(stand));
        let (fixed, for_outputs) = match is_wide {
            true => (model.shares_us, model.shares_outputs_us),
            false => (model.cluster_us, model.cluster_outputs_us),
        };
        let crowd = model.shares_crowd_us * (blocks * fill.sqrt() * self.per_sm - 0.5).clamp(0.0, 1.5);
        fixed
            + for_outputs * outputs
            + model.share_us * (shares - 1.0)
            + crowd
            + stream
            + model.shares_wave_us * (waves - 1.0)
            + model.head_us * f64::from(choice.heads_per_block - 1)
    }
}

/// How many pieces fixed cuts make of a batch, and the tiles of a whole one.
pub(crate) fn pieces(run: &RunKey, split_len: u32) -> (f64, f64) {
    let (batch, tokens) = (f64::from(run.batch), run.kv_tokens as f64);
    let pieces = if is_uniform(run) {
        batch * f64::from(run.longest.div_ceil(split_len.max(1)))
    } else {
        tokens / f64::from(split_len.max(1)) + LAST_ITEM * batch
    };
    (pieces.max(batch).max(1.0), f64::from(split_len.min(run.longest).div_ceil(TILE_LEN).max(1)))
}

/// Of a few waves the last counts whole.
fn whole_waves(waves: f64) -> f64 {
    if waves < FEW_WAVES { ceil(waves) } else { waves }
}

/// [`f64::ceil`] of what is not negative, without the call that processors without SSE 4.1 need.
pub(crate) fn ceil(x: f64) -> f64 {
    let whole = (x as u64) as f64;
    if whole < x { whole + 1.0 } else { whole }
}

pub(crate) fn is_uniform(run: &RunKey) -> bool {
    u64::from(run.longest) * u64::from(run.batch) == run.kv_tokens
}

pub(crate) fn cube(x: f64) -> f64 {
    x * x * x
}

/// What has the cubes given, steps one after the other, and steps of warps that share a scheduler: the root of their cubes.
fn joined(cubes: f64, pace: &Pace, steps: f64, warps: f64) -> f64 {
    (cubes + cube(steps * pace.alone_us) + cube(steps * warps * pace.issue_us)).cbrt()
}
