//! How long a step takes, from a few constants: what decides where nothing was measured.
//!
//! ```text
//! time   = launch + crowd + stream + items + merge
//! stream = bytes / (read bandwidth, joined with blocks x what one block can stream) x imbalance
//! items  = requests of a worker x cost of an item
//! merge  = nothing where no request is cut; else a fixed cost, and one for each partial of a request
//! crowd  = blocks beyond one a multiprocessor, which find no room while the step before still runs
//! ```
//!
//! A request in shares has no items and no merge of its own:
//!
//! ```text
//! time   = shares + crowd + stream + further waves
//! stream = (bytes / read bandwidth / overlap + bytes / what its blocks can stream together) x imbalance
//! crowd  = blocks beyond half a one a multiprocessor
//! ```
//!
//! A block a multiprocessor fewer than it can hold, all equally many, stream as much as when it is full, and an item costs as little.
//! Where every item has a worker of its own, the others go on while one begins, and the device keeps them balanced.
//!
//! Otherwise two bandwidths are joined as 1 / hypot(1/a, 1/b): near their crossing neither is reached.

use crate::choice::{Choice, TILE_LEN};
use crate::{PolicyClass, RunKey, StaticKey};
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

/// Warps of the blocks that [`CostModel::shares_gb_per_s`] is of.
pub const USUAL_WARPS: u32 = 4;
/// Bytes that the memory gives at a time.
pub(crate) const LINE_BYTES: u32 = 128;
/// Of the blocks that [`CostModel::block_gb_per_s`] is of.
const USUAL_BLOCKS_PER_SM: f64 = 3.0;
/// Of a block a multiprocessor fewer than fit, how many there are at least where all are to hold equally many.
const EVEN_FILL: f64 = 0.9;
/// And how many requests each takes at most: with four an H200 lost up to a fifth, as with unequal ones.
const MOST_EVEN_REQUESTS: f64 = 2.0;
/// What the rings of four warps give where two blocks have room, as a share of three.
const TWO_BLOCKS: f64 = 2.0;
/// Share of a full device that clusters fill before some must wait.
pub(crate) const CLUSTER_ROOM: f64 = 0.85;

/// The constants. [`Self::default`] was fitted to measurements; `docs/tuning.md` says to which and how well.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// From the launch until the first bytes arrive, and from the last byte until the result is written, microseconds.
    pub launch_us: f64,
    /// One work item: its prologue, its cold pipeline, its epilogue.
    pub item_us: f64,
    /// What one block of three on a multiprocessor streams at most, GB/s: its ring of tiles over the latency of the memory.
    pub block_gb_per_s: f64,
    /// Share of the read bandwidth within reach on rows of paged heads.
    pub paged: f64,
    /// The same on scattered rows, one head a block.
    pub scattered: f64,
    /// The same on scattered rows with several heads a block.
    pub scattered_together: f64,
    /// The same on scattered rows of a cache with a single kv head.
    pub scattered_alone: f64,
    /// What is left of it, and of what a block streams, where a scattered row's codes are shorter than a line of memory and a
    /// block takes one head or two.
    pub thin: f64,
    /// Stage 2: launch and first loads.
    pub merge_us: f64,
    /// Stage 2: each further partial of a request.
    pub merge_partial_us: f64,
    /// For each block of a multiprocessor beyond its first.
    pub crowd_us: f64,
    /// As `launch_us` with what every item costs, for a request in shares: their merge is in it.
    pub shares_us: f64,
    /// As `block_gb_per_s`, where what a block does beside waiting for its bytes is not hidden.
    pub shares_gb_per_s: f64,
    /// How much of the bytes' time passes while blocks do something else.
    pub shares_overlap: f64,
    /// Each further wave of blocks.
    pub shares_wave_us: f64,
    /// For each block of a multiprocessor beyond half a one: two steps no longer fit side by side.
    pub shares_crowd_us: f64,
}

/// What two heads a block cost beside, microseconds: fewer warps share a head's tokens.
const TWO_HEADS_US: f64 = 2.0;
/// What four heads a block cost beside: one warp a head, and heads in step wait for each other. Read off LightLLM's buffers on an
/// H200: 7 us more than one head at 168 MB, none at 671, 40 less at 1342.
const FOUR_HEADS_US: f64 = 10.0;
/// Four heads' share of the bandwidth beside two heads'.
const FOUR_HEADS: f64 = 1.02;
/// Of an item's cost, what it costs with a worker of its own.
const OWN_ITEM: f64 = 0.45;
/// Such items that a request adds to those that its tokens make, in the mean.
const REQUEST_ITEMS: f64 = 0.75;

impl Default for CostModel {
    fn default() -> Self {
        Self {
            launch_us: 3.0,
            item_us: 4.05,
            block_gb_per_s: 21.2,
            paged: 1.0,
            scattered: 0.83,
            scattered_together: 0.881,
            scattered_alone: 0.754,
            thin: 0.68,
            merge_us: 4.64,
            merge_partial_us: 0.00934,
            crowd_us: 0.168,
            shares_us: 3.31,
            shares_gb_per_s: 11.9,
            shares_overlap: 2.5,
            shares_wave_us: 3.86,
            shares_crowd_us: 2.18,
        }
    }
}

impl CostModel {
    /// The constants by name, for who fits them anew (`cargo xtask tune --fit`).
    pub fn constants(&mut self) -> [(&'static str, &mut f64); 16] {
        let Self {
            launch_us,
            item_us,
            block_gb_per_s,
            paged,
            scattered,
            scattered_together,
            scattered_alone,
            thin,
            merge_us,
            merge_partial_us,
            crowd_us,
            shares_us,
            shares_gb_per_s,
            shares_overlap,
            shares_wave_us,
            shares_crowd_us,
        } = self;
        [
            ("launch_us", launch_us),
            ("item_us", item_us),
            ("block_gb_per_s", block_gb_per_s),
            ("paged", paged),
            ("scattered", scattered),
            ("scattered_together", scattered_together),
            ("scattered_alone", scattered_alone),
            ("thin", thin),
            ("merge_us", merge_us),
            ("merge_partial_us", merge_partial_us),
            ("crowd_us", crowd_us),
            ("shares_us", shares_us),
            ("shares_gb_per_s", shares_gb_per_s),
            ("shares_overlap", shares_overlap),
            ("shares_wave_us", shares_wave_us),
            ("shares_crowd_us", shares_crowd_us),
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
        self.predict_on(machine.num_sms, machine.read_gb_per_s, key, shape, run, choice)
    }

    pub(crate) fn predict_on(
        &self,
        num_sms: u32,
        read_gb_per_s: f64,
        key: &StaticKey,
        shape: &Shape,
        run: &RunKey,
        choice: &Choice,
    ) -> f64 {
        if choice.num_shares > 0 && key.policy == PolicyClass::Throughput {
            return self.predict_shares(num_sms, read_gb_per_s, key, shape, run, choice);
        }
        let heads_per_block = f64::from(choice.heads_per_block);
        let heads = f64::from(run.num_kv_heads.max(1));
        let (batch, tokens) = (f64::from(run.batch), run.kv_tokens as f64);
        let tiles = (tokens / f64::from(TILE_LEN)).max(1.0);
        let workers = f64::from(choice.num_workers(run.num_kv_heads, shape.row_blocks));
        let overhead = f64::from(choice.item_overhead);
        let least = f64::from(choice.min_split_tiles);
        let longest = f64::from(run.longest.div_ceil(TILE_LEN));
        // Pieces of fixed cuts, and their tiles.
        let fixed = match key.policy {
            PolicyClass::Throughput => None,
            PolicyClass::BatchInvariant { split_len } => Some(self.pieces(run, f64::from(split_len))),
        };
        let num_items = fixed.map_or(batch, |(pieces, _)| pieces);
        let work = tiles + num_items * overhead;
        let load = match fixed {
            Some((pieces, len)) => (pieces / workers).ceil() * (len + overhead),
            None => (work / workers).ceil().max(least.min(tiles)),
        };
        // No request is long enough for two of the smallest splits: each is one worker's.
        let is_uncut = match fixed {
            Some((pieces, _)) => pieces <= batch,
            None => longest < 2.0 * least,
        };
        // Nor where the whole requests of a worker are little more than its load, see `attn_plan`.
        let each = (batch / workers).ceil();
        let is_dealt =
            self.is_uniform(run) && fixed.is_none() && each * (longest + overhead) <= load + 2.0 * overhead;
        let (load, most) = if is_dealt {
            (each * (longest + overhead), (batch / each).ceil())
        } else if is_uncut && fixed.is_none() {
            (load.max(longest + overhead), batch)
        } else {
            (load, workers)
        };
        let used = (work / load).ceil().min(most).clamp(1.0, workers).min(tiles.ceil());
        let blocks_per_worker = heads / heads_per_block * f64::from(shape.row_blocks);
        let resident = f64::from(num_sms * shape.blocks_per_sm);
        let waves = (used * blocks_per_worker / resident).max(1.0);
        let blocks = (used * blocks_per_worker).min(resident);

        let own_items = choice.item_tiles > 0;
        let one_fewer = f64::from(num_sms * (shape.blocks_per_sm.max(1) - 1));
        let is_even = shape.blocks_per_sm >= 3
            && is_dealt
            && each <= MOST_EVEN_REQUESTS
            && !key.layout.is_scattered()
            && (EVEN_FILL * one_fewer..=one_fewer).contains(&(used * blocks_per_worker));
        let relief = if is_even { resident / one_fewer } else { 1.0 };
        // The rings of a multiprocessor's blocks share its memory, however many they are.
        let block_gb_per_s = relief * self.thinness(key, choice) * self.block_gb_per_s * USUAL_BLOCKS_PER_SM
            / f64::from(shape.blocks_per_sm.max(1));
        let bandwidth = joined(read_gb_per_s * self.reach(key, run, choice), blocks * block_gb_per_s);
        let bytes = tokens * heads * f64::from(shape.row_bytes);
        let imbalance = if own_items { 1.0 } else { (load * used / work).max(1.0) };
        let stream = bytes / bandwidth / 1e3 * imbalance;

        let items = match (own_items, fixed) {
            (true, Some((pieces, _))) => OWN_ITEM * (pieces / workers).max(1.0),
            (true, None) => {
                OWN_ITEM * (tiles / f64::from(choice.item_tiles) + REQUEST_ITEMS * batch) / workers
            }
            (false, _) => num_items / used * waves / relief,
        };
        let is_whole = is_uncut || is_dealt || fixed.is_none() && used <= 1.0;
        let merge = if is_whole {
            0.0
        } else {
            let deepest = 1.0 + used * f64::from(run.longest) / tokens.max(1.0);
            self.merge_us + self.merge_partial_us * deepest
        };
        let together = match choice.heads_per_block {
            1 => 0.0,
            2 => TWO_HEADS_US,
            _ => FOUR_HEADS_US,
        };
        self.launch_us + self.crowd(num_sms, blocks) + stream + items * self.item_us + merge + together
    }

    fn predict_shares(
        &self,
        num_sms: u32,
        read_gb_per_s: f64,
        key: &StaticKey,
        shape: &Shape,
        run: &RunKey,
        choice: &Choice,
    ) -> f64 {
        let shares = f64::from(choice.num_shares);
        let (batch, tokens) = (f64::from(run.batch), (run.kv_tokens as f64).max(1.0));
        let heads = f64::from(run.num_kv_heads.max(1));
        let all = batch * shares * heads / f64::from(choice.heads_per_block) * f64::from(shape.row_blocks);
        let (blocks_per_sm, warps) = shape.share_blocks(choice.heads_per_block);
        let room = f64::from(num_sms * blocks_per_sm);
        // Whole clusters leave gaps, but for pairs.
        let room = if choice.num_shares > 2 { room * CLUSTER_ROOM } else { room };
        let (waves, blocks) = ((all / room).max(1.0), all.min(room));
        // The longest share ends last, and its last tile counts whole; of a few waves the last counts whole too.
        let share_len = run.longest.div_ceil(TILE_LEN).div_ceil(choice.num_shares).max(1) * TILE_LEN;
        let uneven = (f64::from(share_len) * shares * batch / tokens).max(1.0);
        let uneven = if waves < 4.0 { uneven * waves.ceil() / waves } else { uneven };
        let bytes = tokens * heads * f64::from(shape.row_bytes);
        let read = read_gb_per_s * self.reach(key, run, choice) * self.shares_overlap;
        let thin = self.thinness(key, choice);
        // Eight warps have twice the rings, two at a time where four warps have three.
        let wide = f64::from(warps) / f64::from(USUAL_WARPS);
        let rings = match (warps > USUAL_WARPS, blocks_per_sm) {
            (true, _) => wide,
            (false, ..3) => TWO_BLOCKS,
            (false, _) => 1.0,
        };
        let block_gb_per_s = thin * self.shares_gb_per_s * rings;
        let stream = bytes * (1.0 / read + 1.0 / (blocks * block_gb_per_s)) / 1e3 * uneven;
        let beside = (blocks / f64::from(num_sms.max(1)) - 0.5).clamp(0.0, 1.5);
        self.shares_us + self.shares_crowd_us * beside + stream + self.shares_wave_us * (waves - 1.0)
    }

    /// Share of the read bandwidth that rows of this layout reach.
    fn reach(&self, key: &StaticKey, run: &RunKey, choice: &Choice) -> f64 {
        let reach = match (key.layout.is_scattered(), choice.heads_per_block) {
            (false, _) => self.paged,
            (true, _) if run.num_kv_heads <= 1 => self.scattered_alone,
            (true, 1) => self.scattered,
            (true, 2) => self.scattered_together,
            (true, _) => (FOUR_HEADS * self.scattered_together).min(1.0),
        };
        reach * self.thinness(key, choice)
    }

    /// Of rows of half a line each a neighbour's half comes along, and is of use only to a block that takes it too. A block alone asks
    /// for as many lines as for whole ones.
    fn thinness(&self, key: &StaticKey, choice: &Choice) -> f64 {
        match (key.layout.is_scattered() && key.head_dim < LINE_BYTES, choice.heads_per_block) {
            (false, _) => 1.0,
            (true, 1 | 2) => self.thin,
            (true, _) => self.thin.sqrt(),
        }
    }

    /// A device that is full of the step before has no room to make this one ready beside it.
    fn crowd(&self, num_sms: u32, blocks: f64) -> f64 {
        self.crowd_us * (blocks / f64::from(num_sms.max(1)) - 1.0).clamp(0.0, 2.0)
    }

    /// How many pieces fixed cuts make of a batch, and the tiles of a whole one.
    fn pieces(&self, run: &RunKey, split_len: f64) -> (f64, f64) {
        let (batch, tokens, longest) = (f64::from(run.batch), run.kv_tokens as f64, f64::from(run.longest));
        let pieces = if self.is_uniform(run) {
            batch * (longest / split_len).ceil()
        } else {
            // A request's last piece is half a one in the mean.
            (tokens / split_len + 0.5 * batch).max(batch)
        };
        (pieces.max(1.0), (split_len.min(longest) / f64::from(TILE_LEN)).ceil().max(1.0))
    }

    fn is_uniform(&self, run: &RunKey) -> bool {
        u64::from(run.longest) * u64::from(run.batch) == run.kv_tokens
    }
}

/// `1 / hypot(1 / a, 1 / b)`, without its care for overflow.
fn joined(a: f64, b: f64) -> f64 {
    a * b / (a * a + b * b).sqrt()
}
