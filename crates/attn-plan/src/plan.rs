//! The split schedule: a batch's tokens cut into work items and dealt to workers.
//!
//! The token axes of all requests are laid end to end. Under [`SplitPolicy::Throughput`] they are cut into one
//! contiguous stretch a worker, all of equal cost, wherever that falls ("stream-K"): a ragged batch is balanced by
//! construction and there are no waves. Under [`SplitPolicy::BatchInvariant`] each request is cut at fixed positions
//! and the pieces are dealt out whole. Every worker index stands for one worker of each kv head.

use crate::{DecodeSpec, Error, SplitConfig, SplitPolicy};

/// `partial_idx` of an item that covers its whole request and writes the output itself.
pub const NO_PARTIAL: u32 = u32::MAX;

/// A half-open range of one request's tokens, for every kv head. Twin of `cuda/params/work_item.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct WorkItem {
    /// Which request.
    pub request_idx: u32,
    /// First token.
    pub token_start: u32,
    /// One past the last token.
    pub token_end: u32,
    /// Where the partial state goes, or [`NO_PARTIAL`].
    pub partial_idx: u32,
}

impl WorkItem {
    /// Tokens of the item.
    pub fn num_tokens(&self) -> u32 {
        self.token_end - self.token_start
    }
}

/// A schedule, as a value. [`Self::update`] reuses its memory, so that planning allocates only while it grows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SplitPlan {
    config: Option<SplitConfig>,
    items: Vec<WorkItem>,
    worker_starts: Vec<u32>,
    request_partials: Vec<u32>,
    /// Cost of the most loaded worker, in tiles.
    makespan: u64,
    /// Sum of all costs, in tiles.
    total: u64,
}

/// Hands items to workers in order.
struct Dealer<'a> {
    plan: &'a mut SplitPlan,
    budget: u64,
    room: u64,
}

impl SplitPlan {
    /// Plans one step; see [`Self::update`].
    pub fn new(spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig) -> Result<Self, Error> {
        let mut plan = Self::default();
        plan.update(spec, kv_lens, config)?;
        Ok(plan)
    }

    /// Plans another step in place. `spec` gives the mask, which bounds the tokens that are visible at all.
    pub fn update(&mut self, spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig) -> Result<(), Error> {
        config.check()?;
        let num_items = Self::max_items(spec, kv_lens, config)?;
        if num_items >= u64::from(NO_PARTIAL) {
            return Err(Error::TooManyItems(num_items));
        }
        let budget = self.smallest_budget(spec, kv_lens, config);
        self.deal(spec, kv_lens, config, budget);
        self.number_partials(kv_lens.len());
        self.config = Some(*config);
        Ok(())
    }

    /// An upper bound of the items of any plan of these requests.
    fn max_items(spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig) -> Result<u64, Error> {
        Ok(match config.policy {
            SplitPolicy::Throughput => kv_lens.len() as u64 + u64::from(config.num_workers),
            SplitPolicy::BatchInvariant { split_len } => kv_lens
                .iter()
                .map(|&kv_len| {
                    let range = spec.visible_any(kv_len);
                    u64::from(range.end.div_ceil(split_len) - range.start / split_len).max(1)
                })
                .sum(),
        })
    }

    /// The smallest load a worker must bear so that `num_workers` suffice: bisection over the greedy deal.
    fn smallest_budget(&self, spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig) -> u64 {
        let overhead = u64::from(config.item_overhead);
        let piece = u64::from(config.min_split_tiles.max(1));
        let tiles = |kv_len: &u32| tiles_of(spec.visible_any(*kv_len), config.tile_len) + overhead;
        let total: u64 = kv_lens.iter().map(tiles).sum();
        let workers = u64::from(config.num_workers);
        let mut low = (total / workers).max(piece + overhead);
        // With this much nearly every worker is at least half full even if each cut wastes a whole item.
        let largest = match config.policy {
            SplitPolicy::Throughput => piece + overhead,
            SplitPolicy::BatchInvariant { split_len } => u64::from(split_len / config.tile_len) + overhead,
        };
        let mut high = low.max(2 * (total / workers + 1) + 2 * (largest + overhead));
        while workers_needed(spec, kv_lens, config, high) > workers {
            high *= 2;
        }
        while low < high {
            let middle = low + (high - low) / 2;
            if workers_needed(spec, kv_lens, config, middle) <= workers {
                high = middle
            } else {
                low = middle + 1
            }
        }
        high
    }

    fn deal(&mut self, spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig, budget: u64) {
        self.items.clear();
        self.worker_starts.clear();
        self.worker_starts.push(0);
        self.total = 0;
        self.makespan = 0;
        let mut dealer = Dealer { plan: self, budget, room: budget };
        cut(spec, kv_lens, config, budget, &mut |item, cost, new_worker| dealer.take(item, cost, new_worker));
        self.makespan = self.makespan.max(budget.min(self.total));
        while self.worker_starts.len() <= config.num_workers as usize {
            self.worker_starts.push(self.items.len() as u32);
        }
    }

    /// Gives partial indices to the items of split requests, in token order (items are in order already).
    fn number_partials(&mut self, batch: usize) {
        self.request_partials.clear();
        self.request_partials.push(0);
        let (mut next, mut first) = (0u32, 0usize);
        for request_idx in 0..batch as u32 {
            let rest = self.items.get_mut(first..).unwrap_or_default();
            let count = rest.iter().take_while(|item| item.request_idx == request_idx).count();
            if count > 1 {
                for item in rest.iter_mut().take(count) {
                    item.partial_idx = next;
                    next += 1;
                }
            }
            first += count;
            self.request_partials.push(next);
        }
    }

    /// The config the plan was made from; `None` before the first update.
    pub fn config(&self) -> Option<&SplitConfig> {
        self.config.as_ref()
    }

    /// All items, worker by worker, each request's in token order.
    pub fn items(&self) -> &[WorkItem] {
        &self.items
    }

    /// `[num_workers + 1]`: worker `w` does items `worker_starts[w]..worker_starts[w + 1]`.
    pub fn worker_starts(&self) -> &[u32] {
        &self.worker_starts
    }

    /// `[batch + 1]`: request `r`'s partials are `request_partials[r]..request_partials[r + 1]`, in token order.
    pub fn request_partials(&self) -> &[u32] {
        &self.request_partials
    }

    /// Requests planned.
    pub fn batch(&self) -> usize {
        self.request_partials.len().saturating_sub(1)
    }

    /// Partial states that stage 1 writes for each query row.
    pub fn num_partials(&self) -> u32 {
        self.request_partials.last().copied().unwrap_or(0)
    }

    /// Items of one worker.
    pub fn worker_items(&self, worker: usize) -> &[WorkItem] {
        match (self.worker_starts.get(worker), self.worker_starts.get(worker + 1)) {
            (Some(&start), Some(&end)) => self.items.get(start as usize..end as usize).unwrap_or(&[]),
            _ => &[],
        }
    }

    /// Share of the workers' time that is spent on items if all tiles take equal time, 0 to 1.
    pub fn efficiency(&self) -> f64 {
        let workers = self.worker_starts.len().saturating_sub(1) as f64;
        let span = (0..self.worker_starts.len().saturating_sub(1)).map(|w| self.load(w)).max().unwrap_or(0);
        if span == 0 { 1.0 } else { self.total as f64 / (span as f64 * workers) }
    }

    /// Cost of one worker's items, in tiles.
    pub fn load(&self, worker: usize) -> u64 {
        let Some(config) = &self.config else { return 0 };
        let cost = |item: &WorkItem| {
            tiles_of(item.token_start..item.token_end, config.tile_len) + u64::from(config.item_overhead)
        };
        self.worker_items(worker).iter().map(cost).sum()
    }
}

impl Dealer<'_> {
    fn take(&mut self, item: WorkItem, cost: u64, new_worker: bool) {
        if new_worker {
            self.plan.worker_starts.push(self.plan.items.len() as u32);
            self.room = self.budget;
        }
        self.room = self.room.saturating_sub(cost);
        self.plan.items.push(item);
        self.plan.total += cost;
        self.plan.makespan = self.plan.makespan.max(cost);
    }
}

/// Tiles that a range of tokens touches.
fn tiles_of(range: std::ops::Range<u32>, tile_len: u32) -> u64 {
    if range.is_empty() { 0 } else { u64::from(range.end.div_ceil(tile_len) - range.start / tile_len) }
}

fn workers_needed(spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig, budget: u64) -> u64 {
    let mut workers = 1;
    cut(spec, kv_lens, config, budget, &mut |_, _, new_worker| workers += u64::from(new_worker));
    workers
}

/// The greedy deal: walks the requests in order and calls `take(item, cost in tiles, starts a new worker)`.
fn cut(
    spec: &DecodeSpec,
    kv_lens: &[u32],
    config: &SplitConfig,
    budget: u64,
    take: &mut impl FnMut(WorkItem, u64, bool),
) {
    let overhead = u64::from(config.item_overhead);
    let piece = u64::from(config.min_split_tiles.max(1));
    let mut room = budget;
    for (request, &kv_len) in kv_lens.iter().enumerate() {
        let visible = spec.visible_any(kv_len);
        let mut start = visible.start;
        loop {
            let left = tiles_of(start..visible.end, config.tile_len);
            let tiles = match config.policy {
                SplitPolicy::BatchInvariant { split_len } => {
                    let end = visible.end.min((start / split_len + 1).saturating_mul(split_len));
                    tiles_of(start..end, config.tile_len)
                }
                SplitPolicy::Throughput => {
                    // All that is left, or as much as fits here; a sliver goes to the next worker whole.
                    let fits = room.saturating_sub(overhead);
                    if left <= fits {
                        left
                    } else if fits >= piece && left - fits >= piece.min(left) {
                        fits
                    } else {
                        left.min(budget.saturating_sub(overhead).max(1))
                    }
                }
            };
            let cost = tiles + overhead;
            let new_worker = cost > room && room < budget;
            if new_worker {
                room = budget;
            }
            room = room.saturating_sub(cost);
            let first_tile = u64::from(start / config.tile_len);
            let end = ((first_tile + tiles) * u64::from(config.tile_len)).min(u64::from(visible.end)) as u32;
            let end = end.max(start);
            take(
                WorkItem {
                    request_idx: request as u32,
                    token_start: start,
                    token_end: end,
                    partial_idx: NO_PARTIAL,
                },
                cost,
                new_worker,
            );
            start = end;
            if start >= visible.end {
                break;
            }
        }
    }
}

impl std::fmt::Display for SplitPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(config) = &self.config else { return f.write_str("no plan yet") };
        writeln!(
            f,
            "{}: {} requests, {} items on {} workers, {} partials, tile {}, {:.1} % busy",
            config.policy,
            self.batch(),
            self.items.len(),
            config.num_workers,
            self.num_partials(),
            config.tile_len,
            100.0 * self.efficiency()
        )?;
        for worker in 0..self.worker_starts.len().saturating_sub(1) {
            let items = self.worker_items(worker);
            if items.is_empty() {
                continue;
            }
            write!(f, "  worker {worker:3} load {:5}:", self.load(worker))?;
            for item in items {
                write!(f, " r{}[{}..{})", item.request_idx, item.token_start, item.token_end)?;
                if item.partial_idx != NO_PARTIAL {
                    write!(f, "->p{}", item.partial_idx)?;
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
