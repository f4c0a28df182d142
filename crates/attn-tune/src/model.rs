//! How long a step takes, from a few constants: what decides where nothing was measured.
//!
//! ```text
//! time   = launch + crowd + stream + items + merge
//! stream = cube root of the cubes of: bytes / read bandwidth; scattered rows x a row's cost; steps x a lone warp's step;
//!          steps x warps of a scheduler x a step's issue
//! items  = items of a worker x cost of an item
//! merge  = nothing where no request is cut; else a fixed cost, and one for each partial of the longest request
//! crowd  = blocks beyond one a multiprocessor, which find no room while the step before still runs
//! ```
//!
//! A step of a warp is 16 tokens of one head: a wait for their bytes and a chain of instructions, both longer for a longer head. The
//! steps that count are those of the block that has most. Near the crossing of the four none of them is reached.
//!
//! Scattered rows cost as much whatever the bandwidth is: a head of 64 channels takes equally long on an H100 and an H200. They cost more in a large
//! cache, where blocks of other heads come to a token's rows at other times, and less so for several heads a block.
//!
//! A request in shares has no items and no merge of its own:
//!
//! ```text
//! time   = shares + crowd + stream + further waves
//! crowd  = blocks beyond half a one a multiprocessor
//! ```
//!
//! Where every item has a worker of its own, the others go on while one begins, and the device keeps them balanced.

use crate::choice::{Choice, HEADS_PER_BLOCK, TILE_LEN};
use crate::expect::{Expect, Pace, cube, is_uniform};
use crate::{RunKey, StaticKey};
use kv_quant::CacheLayout;
use serde::{Deserialize, Serialize};

/// The GPU, as far as the model looks at it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The device's name.
    pub device: String,
    /// Its architecture, e.g. "sm_90".
    pub arch: String,
    /// The kernels' source hash, shortened.
    pub build: String,
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// L2 cache, bytes.
    pub l2_bytes: u64,
    /// Read bandwidth: measured where there is a profile, else the memory's clock and width.
    pub read_gb_per_s: f64,
}

/// What the kernel for a key looks like, as far as the model looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Blocks of stage 1 that one multiprocessor holds at once.
    pub blocks_per_sm: u32,
    /// The most kv heads that a block of the variant takes.
    pub max_heads_per_block: u32,
    /// Blocks of query rows of one kv head.
    pub row_blocks: u32,
    /// Bytes of one token's K and V, codes and scales, of one kv head.
    pub row_bytes: u32,
    /// The most shares of a request that a launch can have: blocks of a cluster; 0 where the kernel has none.
    pub most_shares: u32,
    /// Blocks of shares, of one head each, that one multiprocessor holds at once; 0: as [`Self::blocks_per_sm`].
    #[serde(default)]
    pub share_blocks_per_sm: u32,
    /// Warps of such a block; 0: [`USUAL_WARPS`].
    #[serde(default)]
    pub share_warps: u32,
}

impl Shape {
    /// The same kernel with clusters of so many blocks.
    pub fn with_shares(self, most_shares: u32) -> Self {
        Self { most_shares, ..self }
    }

    /// The same where shares of one head a block have a kernel of their own: so many blocks on a multiprocessor, of so many
    /// warps.
    pub fn with_share_blocks(self, (share_blocks_per_sm, share_warps): (u32, u32)) -> Self {
        Self { share_blocks_per_sm, share_warps, ..self }
    }

    /// Blocks of shares on a multiprocessor, and their warps, for so many heads a block.
    pub(crate) fn share_blocks(&self, heads_per_block: u32) -> (u32, u32) {
        if heads_per_block == 1 && self.share_blocks_per_sm > 0 {
            (self.share_blocks_per_sm, self.share_warps.max(USUAL_WARPS))
        } else {
            (self.blocks_per_sm, USUAL_WARPS)
        }
    }

    /// The shape for a layout and a key.
    pub fn new(
        layout: &CacheLayout,
        key: &StaticKey,
        blocks_per_sm: u32,
        max_heads_per_block: u32,
        rows: u32,
    ) -> Self {
        let num_rows = key.gqa_group * key.q_len;
        // As they lie: records are padded.
        let rows_per_page = u64::from(layout.format().num_kv_heads() * layout.page_len()).max(1);
        let row_bytes = layout.bytes_per_page() / rows_per_page;
        Self {
            blocks_per_sm: blocks_per_sm.max(1),
            max_heads_per_block: max_heads_per_block.max(1),
            row_blocks: num_rows.div_ceil(rows.max(1)).max(1),
            row_bytes: u32::try_from(row_bytes).unwrap_or(u32::MAX),
            most_shares: 0,
            share_blocks_per_sm: 0,
            share_warps: 0,
        }
    }
}

/// Warps of a block, but for shares that have kernels of their own.
pub const USUAL_WARPS: u32 = 4;
/// Query rows that a warp's product has room for.
const TILE_ROWS: u32 = 8;
/// A cache past which it matters that heads are read at different times (`docs/kernel-log.md`, section 17).
const DRIFT_BYTES: f64 = 7e8;
/// The head that the constants are of.
const USUAL_DIM: f64 = 128.0;
/// And the outputs of a kv head: four query heads of it.
const USUAL_OUTPUTS: f64 = 512.0;
/// Whether the blocks of clusters of so many stand side by side, two on a multiprocessor while others have none of this step: pairs spread, and
/// those of four are placed where most room is.
pub(crate) fn stands_side_by_side(num_shares: u32) -> bool {
    !matches!(num_shares, 0..=2 | 4)
}

/// Share of a full device that clusters of so many blocks fill before some must wait: those that stand side by side leave gaps.
pub(crate) fn cluster_room(num_shares: u32) -> f64 {
    if stands_side_by_side(num_shares) { 0.85 } else { 1.0 }
}

/// The constants. [`Self::default`] was fitted to measurements; `docs/tuning.md` says to which and how well.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// From the launch until the first bytes arrive, and from the last byte until the result is written, microseconds.
    pub launch_us: f64,
    /// One work item: its prologue, its cold pipeline, its epilogue.
    pub item_us: f64,
    /// Of that, what grows with the outputs, for each 512 more of them.
    pub item_outputs_us: f64,
    /// Of that, what grows with the head, for 128 more channels.
    pub item_dim_us: f64,
    /// Of an item's cost, what it costs with a worker of its own.
    pub own_item: f64,
    /// A step of a lone warp: the part that every step has.
    pub step_us: f64,
    /// And the part that grows with the head, for 128 channels.
    pub step_dim_us: f64,
    /// How much of a scheduler's time a step takes.
    pub issue_us: f64,
    /// How much longer a step is on scattered rows.
    pub scattered_step: f64,
    /// How much longer with capped logits.
    pub soft_cap: f64,
    /// What is left of a step where the group is the whole head of 128.
    pub whole_group: f64,
    /// How much longer for each further eight query rows.
    pub row_tile: f64,
    /// Stage 2: launch and first loads.
    pub merge_us: f64,
    /// Stage 2: each partial of a request beyond 64.
    pub merge_partial_us: f64,
    /// For each block of a multiprocessor beyond its first.
    pub crowd_us: f64,
    /// Each further head of a block.
    pub head_us: f64,
    /// As `launch_us` with what every item costs, for a request in shares of eight warps: their merge is in it.
    pub shares_us: f64,
    /// For each 512 more outputs.
    pub shares_outputs_us: f64,
    /// The same in blocks of four warps.
    pub cluster_us: f64,
    /// For each 512 more outputs.
    pub cluster_outputs_us: f64,
    /// For each further share.
    pub share_us: f64,
    /// As `step_us`, for one of eight warps.
    pub shares_step_us: f64,
    /// As `step_dim_us`, for one of eight warps.
    pub shares_step_dim_us: f64,
    /// Each further wave of blocks.
    pub shares_wave_us: f64,
    /// For each block of a multiprocessor beyond half a one: two steps no longer fit side by side.
    pub shares_crowd_us: f64,
    /// How much more scattered rows cost one head a block, for each doubling of a large cache.
    pub drift: f64,
    /// A scattered row of one head, nanoseconds of a multiprocessor.
    pub row_ns: f64,
    /// How much longer the longest of unequal requests in shares takes its steps on scattered rows.
    pub ragged_shares: f64,
    /// As `issue_us`, for one of eight warps and 128 channels.
    pub shares_issue_us: f64,
}

impl Default for CostModel {
    fn default() -> Self {
        Self {
            launch_us: 1.8247,
            item_us: 4.2577,
            item_outputs_us: 0.79979,
            item_dim_us: 2.2613,
            own_item: 0.72805,
            step_us: 0.6237,
            step_dim_us: 0.31937,
            issue_us: 0.34034,
            scattered_step: 0.2578,
            soft_cap: 0.34787,
            whole_group: 1.0266,
            row_tile: 0.15457,
            merge_us: 1.1668,
            merge_partial_us: 0.031593,
            crowd_us: 0.88652,
            head_us: 1.9571,
            shares_us: 2.1851,
            shares_outputs_us: 0.20276,
            cluster_us: 2.2423,
            cluster_outputs_us: 1.5709,
            share_us: 0.1429,
            shares_step_us: 1.0799,
            shares_step_dim_us: 0.15658,
            shares_wave_us: 3.559,
            shares_crowd_us: 2.3093,
            drift: 0.53813,
            row_ns: 5.9171,
            ragged_shares: 0.2014,
            shares_issue_us: 0.21541,
        }
    }
}

impl CostModel {
    /// The constants by name, for who fits them anew (`cargo xtask tune --fit`).
    pub fn constants(&mut self) -> [(&'static str, &mut f64); 29] {
        let Self {
            launch_us,
            item_us,
            item_outputs_us,
            item_dim_us,
            own_item,
            step_us,
            step_dim_us,
            issue_us,
            scattered_step,
            soft_cap,
            whole_group,
            row_tile,
            merge_us,
            merge_partial_us,
            crowd_us,
            head_us,
            shares_us,
            shares_outputs_us,
            cluster_us,
            cluster_outputs_us,
            share_us,
            shares_step_us,
            shares_step_dim_us,
            shares_wave_us,
            shares_crowd_us,
            drift,
            row_ns,
            ragged_shares,
            shares_issue_us,
        } = self;
        [
            ("launch_us", launch_us),
            ("item_us", item_us),
            ("item_outputs_us", item_outputs_us),
            ("item_dim_us", item_dim_us),
            ("own_item", own_item),
            ("step_us", step_us),
            ("step_dim_us", step_dim_us),
            ("issue_us", issue_us),
            ("scattered_step", scattered_step),
            ("soft_cap", soft_cap),
            ("whole_group", whole_group),
            ("row_tile", row_tile),
            ("merge_us", merge_us),
            ("merge_partial_us", merge_partial_us),
            ("crowd_us", crowd_us),
            ("head_us", head_us),
            ("shares_us", shares_us),
            ("shares_outputs_us", shares_outputs_us),
            ("cluster_us", cluster_us),
            ("cluster_outputs_us", cluster_outputs_us),
            ("share_us", share_us),
            ("shares_step_us", shares_step_us),
            ("shares_step_dim_us", shares_step_dim_us),
            ("shares_wave_us", shares_wave_us),
            ("shares_crowd_us", shares_crowd_us),
            ("drift", drift),
            ("row_ns", row_ns),
            ("ragged_shares", ragged_shares),
            ("shares_issue_us", shares_issue_us),
        ]
    }

    /// Microseconds that a step is expected to take.
    pub fn predict(
        &self,
        machine: &Machine,
        key: &StaticKey,
        shape: &Shape,
        run: &RunKey,
        choice: &Choice,
    ) -> f64 {
        self.step(machine, key, shape, run)(choice)
    }

    /// The same for many choices.
    pub fn step<'a>(
        &'a self,
        machine: &Machine,
        key: &'a StaticKey,
        shape: &'a Shape,
        run: &'a RunKey,
    ) -> impl Fn(&Choice) -> f64 + use<'a> {
        let expect = self.expect(machine.num_sms, machine.read_gb_per_s, key, shape, run);
        move |choice| expect.us(choice)
    }

    /// What all choices for a step have in common.
    pub(crate) fn expect<'a>(
        &'a self,
        num_sms: u32,
        read_gb_per_s: f64,
        key: &'a StaticKey,
        shape: &'a Shape,
        run: &'a RunKey,
    ) -> Expect<'a> {
        let heads = f64::from(run.num_kv_heads.max(1));
        let rows = run.kv_tokens as f64 * heads;
        let bytes = rows * f64::from(shape.row_bytes);
        let bytes_us = bytes / read_gb_per_s / 1e3;
        let rows_us = if key.layout.is_scattered() {
            rows * self.row_ns / f64::from(num_sms.max(1)) / 1e3
        } else {
            0.0
        };
        let octaves = (bytes / DRIFT_BYTES).max(1.0).log2();
        let stream = |heads_per_block: u32| {
            let apart = if heads_per_block == 4 && key.goes_in_step() { 0.0 } else { octaves };
            cube(bytes_us) + cube(rows_us * (1.0 + self.drift * apart / f64::from(heads_per_block)))
        };
        Expect {
            model: self,
            key,
            shape,
            run,
            num_sms: f64::from(num_sms.max(1)),
            per_sm: 1.0 / f64::from(num_sms.max(1)),
            tiles: (run.kv_tokens as f64 / f64::from(TILE_LEN)).max(1.0),
            longest: f64::from(run.longest.div_ceil(TILE_LEN)),
            is_uniform: is_uniform(run),
            blocks: heads * f64::from(shape.row_blocks),
            cubes: HEADS_PER_BLOCK.map(stream),
            pace: self.pace(key, shape, false),
            wide: self.pace(key, shape, true),
            outputs: f64::from(key.gqa_group * key.q_len * key.head_dim) / USUAL_OUTPUTS - 1.0,
            channels: f64::from(key.head_dim) / USUAL_DIM - 1.0,
        }
    }

    fn pace(&self, key: &StaticKey, shape: &Shape, is_wide: bool) -> Pace {
        let dim = f64::from(key.head_dim) / USUAL_DIM;
        let rows = (key.gqa_group * key.q_len).div_ceil(shape.row_blocks.max(1)).div_ceil(TILE_ROWS);
        let is_whole = (key.k_group_len, key.v_group_len) == (128, 128) && key.head_dim == 128;
        let more = (1.0 + self.row_tile * f64::from(rows.saturating_sub(1)))
            * if is_whole { self.whole_group } else { 1.0 }
            * if key.soft_cap { 1.0 + self.soft_cap } else { 1.0 };
        let scattered = if key.layout.is_scattered() { 1.0 + self.scattered_step } else { 1.0 };
        let (alone, issue) = match is_wide {
            true => (self.shares_step_us + self.shares_step_dim_us * dim, self.shares_issue_us * dim),
            false => (self.step_us + self.step_dim_us * dim, self.issue_us),
        };
        Pace { alone_us: more * scattered * alone, issue_us: more * issue }
    }
}
