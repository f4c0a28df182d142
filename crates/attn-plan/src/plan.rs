//! The split schedule: a batch's tokens cut into work items and dealt to workers.
//!
//! The token axes of all requests are laid end to end. Under [`crate::SplitPolicy::Throughput`] they are cut into one
//! contiguous stretch a worker, all of equal cost, wherever that falls ("stream-K"): a ragged batch is balanced by
//! construction and there are no waves. Under [`crate::SplitPolicy::BatchInvariant`] each request is cut at fixed positions
//! and the pieces are dealt out whole. Every worker index stands for one worker of each kv head.

use crate::schedule::{Extent, Schedule};
use crate::{DecodeSpec, Error, SplitConfig};

/// A plan has at most this many items: more than any batch needs, and few enough to hold (256 MiB).
pub const MAX_ITEMS: u64 = 1 << 24;

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
/// ```
/// use attn_plan::{DecodeSpec, NO_PARTIAL, SplitConfig, SplitPlan};
/// let spec = DecodeSpec::new(32, 8, 128);
/// let plan = SplitPlan::new(&spec, &[2000, 64], &SplitConfig::throughput(2))?;
/// for worker in 0..2 {
///     for item in plan.worker_items(worker) {
///         println!("worker {worker}: request {} {}..{}", item.request_idx, item.token_start, item.token_end);
///     }
/// }
/// assert_eq!(plan.num_partials(), 2); // the long request is cut once
/// assert_eq!(plan.items().last().map(|item| item.partial_idx), Some(NO_PARTIAL));
/// # Ok::<(), attn_plan::Error>(())
/// ```
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
    /// Scratch: each request's visible tokens, in tiles.
    extents: Vec<Extent>,
}

impl SplitPlan {
    /// Plans one step; see [`Self::update`].
    pub fn new(spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig) -> Result<Self, Error> {
        let mut plan = Self::default();
        plan.update(spec, kv_lens, config)?;
        Ok(plan)
    }

    /// Plans another step in place. `spec` gives the mask, which bounds the tokens that are visible at all.
    ///
    /// # Errors
    /// Those of [`SplitConfig::check`]; [`Error::TooManyItems`] above [`MAX_ITEMS`]. The plan stays as it was.
    pub fn update(&mut self, spec: &DecodeSpec, kv_lens: &[u32], config: &SplitConfig) -> Result<(), Error> {
        config.check()?;
        let batch = kv_lens.len() as u64;
        if batch > MAX_ITEMS {
            return Err(Error::TooManyItems(batch));
        }
        let mut extents = std::mem::take(&mut self.extents);
        extents.clear();
        let (tile_len, split_tiles) = (config.tile_len, config.split_tiles());
        let extent = |&kv_len: &u32| Extent::new(spec.visible_any(kv_len), tile_len, split_tiles);
        extents.extend(kv_lens.iter().map(extent));
        let schedule = Schedule::new(&extents, config);
        let num_own = schedule.num_items_of(config.item_tiles);
        let is_own = config.num_shares == 0 && config.gives_own_workers(num_own);
        let num_items = match config.num_shares {
            0 if is_own => num_own,
            0 => schedule.max_items(),
            shares => batch * u64::from(shares),
        };
        let result = if num_items > MAX_ITEMS {
            Err(Error::TooManyItems(num_items))
        } else {
            match config.num_shares {
                0 if is_own => self.cut_up(&schedule, config),
                0 => self.deal(schedule, config),
                _ => self.share_out(&extents, config),
            }
            self.number_partials(kv_lens.len());
            if is_own {
                self.longest_first(config.tile_len);
            }
            self.config = Some(*config);
            Ok(())
        };
        self.extents = extents;
        result
    }

    fn deal(&mut self, schedule: Schedule<'_>, config: &SplitConfig) {
        let (schedule, budget) = schedule.with_budget();
        let Self { items, worker_starts, makespan, total, .. } = self;
        items.clear();
        worker_starts.clear();
        worker_starts.push(0);
        (*makespan, *total) = (0, 0);
        let mut load = 0u64;
        schedule.deal(budget, &mut |item, cost, is_new_worker| {
            if is_new_worker {
                worker_starts.push(items.len() as u32);
                load = 0;
            }
            load += cost;
            *total += cost;
            *makespan = (*makespan).max(load);
            items.push(item);
        });
        worker_starts.resize(config.num_workers as usize + 1, items.len() as u32);
    }

    /// One worker an item, in order.
    fn cut_up(&mut self, schedule: &Schedule<'_>, config: &SplitConfig) {
        let Self { items, worker_starts, makespan, total, .. } = self;
        items.clear();
        worker_starts.clear();
        worker_starts.push(0);
        (*makespan, *total) = (0, 0);
        schedule.cut_up(config.item_tiles, &mut |item, cost| {
            *total += cost;
            *makespan = (*makespan).max(cost);
            items.push(item);
            worker_starts.push(items.len() as u32);
        });
    }

    /// Partials are numbered before: stage 2 goes by them alone.
    fn longest_first(&mut self, tile_len: u32) {
        let tiles = |item: &WorkItem| Extent::new(item.token_start..item.token_end, tile_len, 0).tiles();
        self.items.sort_unstable_by_key(|item| {
            (std::cmp::Reverse(tiles(item)), item.request_idx, item.token_start)
        });
    }

    /// One worker a share, request by request.
    fn share_out(&mut self, extents: &[Extent], config: &SplitConfig) {
        let Self { items, worker_starts, makespan, total, .. } = self;
        items.clear();
        worker_starts.clear();
        worker_starts.push(0);
        (*makespan, *total) = (0, 0);
        for (request, extent) in extents.iter().enumerate() {
            for rank in 0..config.num_shares {
                if let Some(item) = extent.share(request, rank, config.num_shares, config.tile_len) {
                    let range = item.token_start..item.token_end;
                    let cost =
                        Extent::new(range, config.tile_len, 0).tiles() + u64::from(config.item_overhead);
                    *total += cost;
                    *makespan = (*makespan).max(cost);
                    items.push(item);
                }
                worker_starts.push(items.len() as u32);
            }
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

    /// All items, worker by worker, each request's in token order; the longest first where each has a worker of its own.
    pub fn items(&self) -> &[WorkItem] {
        &self.items
    }

    /// `[num_workers + 1]`, or one more than there are shares in all, or items with a worker each: worker `w` does items `worker_starts[w]..worker_starts[w + 1]`.
    pub fn worker_starts(&self) -> &[u32] {
        &self.worker_starts
    }

    /// Workers up to the last that has items, at least one; work is dealt from the first worker on. A device need not start the others: their
    /// blocks would take room for a moment, and those of the others would spread unevenly.
    pub fn num_busy_workers(&self) -> u32 {
        let end = self.items.len() as u32;
        self.worker_starts.partition_point(|start| *start < end).max(1) as u32
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
        if self.makespan == 0 { 1.0 } else { self.total as f64 / (self.makespan as f64 * workers) }
    }

    /// Cost of one worker's items, in tiles.
    pub fn load(&self, worker: usize) -> u64 {
        let Some(config) = &self.config else { return 0 };
        let cost = |item: &WorkItem| {
            Extent::new(item.token_start..item.token_end, config.tile_len, 0).tiles()
                + u64::from(config.item_overhead)
        };
        self.worker_items(worker).iter().map(cost).sum()
    }

    /// Cost of the most loaded worker, in tiles.
    pub fn makespan(&self) -> u64 {
        self.makespan
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
            self.worker_starts.len().saturating_sub(1),
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
