//! How long a step takes, from a few constants: what decides where nothing was measured.
//!
//! ```text
//! time   = launch + stream + items + merge
//! stream = bytes / (read bandwidth, joined with blocks x what one block can stream) x imbalance
//! items  = requests of a worker x cost of an item
//! merge  = nothing where no request is cut; else a fixed cost, and one for each partial of a request
//! ```
//!
//! Two bandwidths are joined as 1 / hypot(1/a, 1/b): near their crossing neither is reached.

use crate::choice::{Choice, HEADS_PER_BLOCK, TILE_LEN};
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
}

impl Shape {
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
        }
    }
}

/// Bytes that the memory gives at a time.
const LINE_BYTES: u32 = 128;
/// Of the blocks that [`CostModel::block_gb_per_s`] is of.
const USUAL_BLOCKS_PER_SM: f64 = 3.0;

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
    /// What is left of it where a row's codes are shorter than a line of memory, and a block takes one head or two.
    pub thin: f64,
    /// Stage 2: launch and first loads.
    pub merge_us: f64,
    /// Stage 2: each further partial of a request.
    pub merge_partial_us: f64,
}

impl Default for CostModel {
    fn default() -> Self {
        Self {
            launch_us: 1.50,
            item_us: 4.02,
            block_gb_per_s: 18.2,
            paged: 1.0,
            scattered: 0.905,
            scattered_together: 0.908,
            scattered_alone: 0.773,
            thin: 0.561,
            merge_us: 1.21,
            merge_partial_us: 0.026,
        }
    }
}

impl CostModel {
    /// The constants by name, for who fits them anew (`cargo xtask tune --fit`).
    pub fn constants(&mut self) -> [(&'static str, &mut f64); 10] {
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
        let heads_per_block = f64::from(choice.heads_per_block);
        let heads = f64::from(run.num_kv_heads.max(1));
        let (batch, tokens) = (f64::from(run.batch), run.kv_tokens as f64);
        let tiles = (tokens / f64::from(TILE_LEN)).max(1.0);
        let workers = f64::from(choice.num_workers(run.num_kv_heads, shape.row_blocks));
        let overhead = f64::from(choice.item_overhead);
        // Batch-invariant cuts do not look at the smallest split.
        let least = match key.policy {
            PolicyClass::Throughput => f64::from(choice.min_split_tiles),
            PolicyClass::BatchInvariant => 1.0,
        };
        let work = tiles + batch * overhead;
        let load = (work / workers).ceil().max(least.min(tiles));
        // No request is long enough for two of the smallest splits: each is one worker's.
        let longest = f64::from(run.longest.div_ceil(TILE_LEN));
        let is_uncut = key.policy == PolicyClass::Throughput && longest < 2.0 * least;
        let (load, most) = if is_uncut { (load.max(longest + overhead), batch) } else { (load, workers) };
        let used = (work / load).ceil().min(most).clamp(1.0, workers).min(tiles.ceil());
        let blocks_per_worker = heads / heads_per_block * f64::from(shape.row_blocks);
        let resident = f64::from(num_sms * shape.blocks_per_sm);
        let waves = (used * blocks_per_worker / resident).max(1.0);
        let blocks = (used * blocks_per_worker).min(resident);

        let reach = match (key.layout.is_scattered(), choice.heads_per_block) {
            (false, _) => self.paged,
            (true, _) if run.num_kv_heads <= 1 => self.scattered_alone,
            (true, 1) => self.scattered,
            (true, _) => self.scattered_together,
        };
        // Rows of half a line each: a neighbour's half comes along, and is of use only to a block that takes it too.
        let halves = match (key.layout.is_scattered() && key.head_dim < LINE_BYTES, choice.heads_per_block) {
            (false, _) => 1.0,
            (true, 1 | 2) => self.thin,
            (true, _) => self.thin.sqrt(),
        };
        // The rings of a multiprocessor's blocks share its memory, however many they are.
        let block_gb_per_s =
            self.block_gb_per_s * USUAL_BLOCKS_PER_SM / f64::from(shape.blocks_per_sm.max(1));
        let bandwidth = joined(read_gb_per_s * reach * halves, blocks * block_gb_per_s);
        let bytes = tokens * heads * f64::from(shape.row_bytes);
        let imbalance = (load * used / work).max(1.0);
        let stream = bytes / bandwidth / 1e3 * imbalance;

        let items = (batch / used).max(1.0) * waves;
        let is_dealt = batch >= used && batch % used == 0.0 && self.is_uniform(run);
        let is_whole = used <= 1.0 || is_uncut || is_dealt;
        let merge = if is_whole && key.policy == PolicyClass::Throughput {
            0.0
        } else {
            let deepest = 1.0 + used * f64::from(run.longest) / tokens.max(1.0);
            self.merge_us + self.merge_partial_us * deepest
        };
        self.launch_us + stream + items * self.item_us + merge
    }

    fn is_uniform(&self, run: &RunKey) -> bool {
        u64::from(run.longest) * u64::from(run.batch) == run.kv_tokens
    }
}

/// `1 / hypot(1 / a, 1 / b)`, without its care for overflow.
fn joined(a: f64, b: f64) -> f64 {
    a * b / (a * a + b * b).sqrt()
}

/// What starting and merging an item costs, in tiles: measured best on ragged batches, and no worse on uniform ones.
pub(crate) const ITEM_OVERHEAD: u32 = 4;

/// Shares of a full device that are worth trying, in eighths.
const FILLS: [u32; 8] = [8, 6, 4, 2, 3, 1, 5, 16];
/// Of them, those that are told apart step by step.
const NUM_FEW: usize = 4;

/// The choices that a search looks at, the full device first.
#[derive(Clone, Debug)]
pub struct Candidates {
    full: u32,
    heads_per_block: &'static [u32],
    min_split_tiles: &'static [u32],
    fills: &'static [u32],
    next: usize,
}

impl Candidates {
    /// All of them: what `cargo xtask tune` measures from.
    pub fn all(num_sms: u32, key: &StaticKey, shape: &Shape, num_kv_heads: u32) -> Self {
        let few = Self::few(num_sms, key, shape, num_kv_heads);
        let heads_per_block =
            if few.heads_per_block.len() > 1 { &HEADS_PER_BLOCK } else { few.heads_per_block };
        Self { min_split_tiles: &[1, 2, 4, 8], heads_per_block, fills: &FILLS, ..few }
    }

    /// Those that the model tells apart: what is decided from, step by step.
    pub fn few(num_sms: u32, key: &StaticKey, shape: &Shape, num_kv_heads: u32) -> Self {
        // The shape of a block changes bits, and neighbours change what is chosen: batch invariance wants one shape. Only
        // where rows are scattered do neighbouring heads share lines.
        let together = key.policy == PolicyClass::Throughput
            && key.layout.is_scattered()
            && shape.max_heads_per_block >= 4
            && num_kv_heads.is_multiple_of(4);
        let heads_per_block: &[u32] = match (together, key.head_dim < LINE_BYTES) {
            (false, _) => &[1],
            (true, false) => &[1, 2],
            (true, true) => &[1, 4],
        };
        Self {
            full: (num_sms * shape.blocks_per_sm).max(1),
            heads_per_block,
            min_split_tiles: &[4, 1, 8],
            fills: FILLS.get(..NUM_FEW).unwrap_or(&FILLS),
            next: 0,
        }
    }
}

impl Iterator for Candidates {
    type Item = Choice;

    fn next(&mut self) -> Option<Choice> {
        let index = self.next;
        self.next += 1;
        let (heads, mins) = (self.heads_per_block.len(), self.min_split_tiles.len());
        let fill = *self.fills.get(index / (heads * mins))?;
        Some(Choice {
            num_blocks: (self.full * fill / 8).clamp(1, 1 << 16),
            heads_per_block: *self.heads_per_block.get(index / mins % heads)?,
            min_split_tiles: *self.min_split_tiles.get(index % mins)?,
            item_overhead: ITEM_OVERHEAD,
        })
    }
}
