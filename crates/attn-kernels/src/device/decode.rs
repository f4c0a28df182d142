//! Decode: stage 1 over the work items of a plan, stage 2 over its partials.

use attn_plan::{DecodeSpec, MAX_SHARES, SplitConfig, SplitPolicy};

use super::cache::{CacheArgs, array_bytes, need};
use super::error::DeviceError;
use super::launch::{LaunchShape, Order};
use super::memory::DeviceView;
use super::module::{CLUSTER_VERSION, Kernel, Kernels};
use super::stream::Stream;
use crate::abi::{DecodeParams, PagedCache, Ready, WorkItem};
use crate::key::{self, Arithmetic, Instance, KernelKind, KeyQuery, STAGE1_THREADS, WIDE_THREADS};
use crate::residency;

/// Threads along y of a block of stage 2; `kMergeLanes` in `cuda/decode/stage2.cuh`.
const MERGE_LANES: u32 = 8;
/// Blocks of stage 2 at most that share out the rows of a request.
const STAGE2_ROW_BLOCKS: u32 = 32;
/// Channels of a thread of stage 2.
const MERGE_CHANNELS: u32 = 4;

/// Tokens of a tile at which shares are cut; `kShareTile` in `cuda/decode/inbox.cuh`.
const SHARE_TILE: u32 = 64;

/// Shares of a request at most whose blocks are spread evenly.
const MOST_EVENED_SHARES: u32 = 2;

/// Waves of wide blocks up to which equal items are for them: more are short ones, of which narrower blocks get more under way.
const WIDE_WAVES: u64 = 3;

/// Shared memory of a block, behind the variant's own, in which the shares of a request meet: `Inbox` in
/// `cuda/decode/inbox.cuh`.
fn inbox_bytes(instance: &Instance, spec: &DecodeSpec, num_shares: u32, heads_per_block: u32) -> u32 {
    if num_shares < 2 {
        return 0;
    }
    let num_rows = (spec.gqa_group() * spec.q_len).min(instance.key.rows());
    let elements = num_rows * spec.head_dim / MERGE_CHANNELS;
    16 + heads_per_block * elements.next_multiple_of(num_shares) * 24
}

/// What one decode reads and writes. All lengths are checked against the shapes; what stands in `kv_lens`, the plan and
/// the page table is the caller's word (page indices out of range are reported, not followed).
#[derive(Clone, Copy, Debug)]
pub struct DecodeArgs<'a> {
    /// Shapes, scale, mask, types. Slopes and sinks are read from the device, not from here.
    pub spec: &'a DecodeSpec,
    /// The cache, with its page table.
    pub cache: CacheArgs<'a>,
    /// Requests.
    pub batch: u32,
    /// `[batch, q_len, num_q_heads, head_dim]` of `spec.q_type`.
    pub q: DeviceView,
    /// The same shape of `spec.out_type`.
    pub out: DeviceView,
    /// f32 `[batch, q_len, num_q_heads]`, natural log.
    pub lse: Option<DeviceView>,
    /// u32 `[batch]`, counts the new tokens.
    pub kv_lens: DeviceView,
    /// The plan, copied to the device.
    pub plan: PlanArgs,
    /// What was complete before the kernel that was queued before this decode could begin. It is read, and the cache asked
    /// for, while that kernel still runs.
    pub ready: Ready,
    /// f32 `[num_partials, num_q_heads, q_len, head_dim]`.
    pub partial_o: DeviceView,
    /// f32 `[num_partials, num_q_heads, q_len, 2]`.
    pub partial_ml: DeviceView,
    /// f32 `[num_q_heads]`.
    pub alibi_slopes: Option<DeviceView>,
    /// f32 `[num_q_heads]`.
    pub sinks: Option<DeviceView>,
    /// [`ErrorRecord`](crate::abi::ErrorRecord).
    pub error: DeviceView,
}

/// A [`SplitPlan`](attn_plan::SplitPlan) on the device. The arrays may be longer than the plan: a captured graph replays with a new plan of
/// as many workers in the same memory.
#[derive(Clone, Copy, Debug)]
pub struct PlanArgs {
    /// [`WorkItem`]s.
    pub items: DeviceView,
    /// u32 `[num_workers + 1]`.
    pub worker_starts: DeviceView,
    /// u32 `[batch + 1]`.
    pub request_partials: DeviceView,
    /// Workers of the plan.
    pub num_workers: u32,
    /// kv heads of a block: 1, 2 or 4, dividing the kv heads, at most the variant's `max_heads`. The four warps of a block
    /// are shared out among them.
    pub heads_per_block: u32,
    /// Whether the items are for blocks of eight warps, where the variant has a kernel of such: [`Decoder::takes_wide_blocks`]. The warps of a
    /// block change the last bits of a result. One head a block, and no shares, which have blocks of their own.
    pub wide: bool,
    /// 0: by the items. Else the blocks of a cluster, which share out one request and merge it: the arrays above are not read
    /// then, and lengths may change under a captured graph without a new plan. See [`Decoder::num_shares`].
    pub num_shares: u32,
    /// Whether some request has partials. False saves the launch of stage 2; a graph that is to serve any plan says true.
    pub has_partials: bool,
}

/// The kernels chosen for one cache and one spec, ready to run.
#[derive(Clone, Debug)]
pub struct Decoder {
    stage1: Kernel,
    stage2: Kernel,
    instance: &'static Instance,
    row_blocks: u32,
    blocks_per_sm: u32,
    /// 1 where the code has no clusters.
    most_shares: u32,
    shares: Option<Wide>,
    items: Option<Wide>,
}

/// A kernel of eight warps and one head a block: of shares, or of a plan's items.
#[derive(Clone, Debug)]
struct Wide {
    kernel: Kernel,
    instance: &'static Instance,
    blocks_per_sm: u32,
}

impl Wide {
    fn new(kernels: &Kernels, instance: &'static Instance) -> Result<Self, DeviceError> {
        let kernel = kernels.get(&instance.key.to_string())?;
        let blocks_per_sm = kernel.blocks_per_sm(WIDE_THREADS, instance.shared_bytes)?;
        Ok(Self { kernel, instance, blocks_per_sm })
    }
}

impl Kernels {
    /// Chooses and loads the kernels for a cache and a spec.
    ///
    /// # Errors
    /// [`DeviceError::KeyMiss`] if no variant serves; otherwise as [`Kernels::get`].
    pub fn decoder(
        &self,
        cache: &PagedCache,
        spec: &DecodeSpec,
        arithmetic: Arithmetic,
    ) -> Result<Decoder, DeviceError> {
        let num_rows = spec.gqa_group() * spec.q_len;
        let shared_bytes = self.device().facts().shared_mem_optin_bytes;
        let query = KeyQuery { kind: KernelKind::Stage1, num_rows, arithmetic, shared_bytes };
        self.decoder_of(key::select(cache, &query)?, spec)
    }

    /// Loads a variant that the caller has chosen.
    ///
    /// # Errors
    /// As [`Kernels::get`].
    pub fn decoder_of(&self, instance: &'static Instance, spec: &DecodeSpec) -> Result<Decoder, DeviceError> {
        let stage1 = self.get(&instance.key.to_string())?;
        let blocks_per_sm = stage1.blocks_per_sm(STAGE1_THREADS, instance.shared_bytes)?;
        let row_blocks = (spec.gqa_group() * spec.q_len).div_ceil(instance.key.rows());
        let has_clusters = instance.key.kind == KernelKind::Stage1
            && stage1.facts().ptx_version >= CLUSTER_VERSION
            && self.device().facts().sm >= CLUSTER_VERSION;
        let most_in_cluster = |kernel: &Kernel, instance: &Instance, threads: u32| {
            kernel.most_in_cluster(LaunchShape {
                grid: [1, row_blocks, MAX_SHARES],
                block: [threads, 1],
                shared_bytes: instance.shared_bytes
                    + inbox_bytes(instance, spec, MAX_SHARES, instance.max_heads),
                cluster: 1,
                balances: false,
            })
        };
        let mut most_shares = 1;
        let (mut shares, mut items) = (None, None);
        if has_clusters {
            let wide = |row: Option<&'static Instance>| row.map(|row| Wide::new(self, row)).transpose();
            shares = wide(key::shares_of(&instance.key))?;
            items = wide(key::items_of(&instance.key))?;
            most_shares = most_in_cluster(&stage1, instance, STAGE1_THREADS).min(MAX_SHARES);
            if let Some(Wide { kernel, instance, .. }) = &shares {
                most_shares = most_shares.min(most_in_cluster(kernel, instance, WIDE_THREADS));
            }
        }
        Ok(Decoder {
            stage1,
            stage2: self.get("kv8_stage2")?,
            instance,
            row_blocks,
            blocks_per_sm,
            most_shares,
            shares,
            items,
        })
    }
}

impl Decoder {
    /// The variant.
    #[must_use]
    pub fn instance(&self) -> &'static Instance {
        self.instance
    }

    /// The kernel of stage 1.
    #[must_use]
    pub fn stage1(&self) -> &Kernel {
        &self.stage1
    }

    /// Blocks of stage 1 that one multiprocessor holds at once.
    #[must_use]
    pub fn blocks_per_sm(&self) -> u32 {
        self.blocks_per_sm
    }

    /// The kv heads of a block for a plan that wants `at_most`: as many as the variant has room for and divide the heads.
    #[must_use]
    pub fn heads_per_block(&self, at_most: u32, num_kv_heads: u32) -> u32 {
        let room = at_most.min(self.instance.max_heads);
        [4, 2].into_iter().find(|heads| *heads <= room && num_kv_heads.is_multiple_of(*heads)).unwrap_or(1)
    }

    /// The most shares of a request that a launch can have; 0 where the code has no clusters, and every plan runs by its items.
    #[must_use]
    pub fn most_shares(&self) -> u32 {
        if self.most_shares > 1 { self.most_shares } else { 0 }
    }

    /// How a plan of this config is launched: its shares, or 0, by its items, where the device has no such clusters or the
    /// plan's tiles are not the kernel's. The result is the same but for the last bits.
    #[must_use]
    pub fn num_shares(&self, split: &SplitConfig) -> u32 {
        let fits = split.num_shares <= self.most_shares() && split.tile_len == SHARE_TILE;
        if fits { split.num_shares } else { 0 }
    }

    /// Queues stage 1 and, if there are partials, stage 2. Neither allocates nor waits; can be captured.
    ///
    /// # Errors
    /// [`DeviceError::Launch`] if a view is too short for the shapes or the cache is not one for this decoder;
    /// [`DeviceError::Driver`], which may be an error of earlier work.
    pub fn run(&self, args: &DecodeArgs<'_>, stream: &Stream) -> Result<(), DeviceError> {
        if args.batch == 0 {
            return Ok(());
        }
        let mut params = self.params(args)?;
        let (stage1, shape) = self.stage1_launch(&params, args);
        params.fills_device = u32::from(self.fills_device(&shape));
        // SAFETY: `DecodeParams` is the twin of what these kernels take, and every array in it has been checked against
        // the shapes that the kernels derive their accesses from.
        unsafe {
            stage1.launch(
                shape,
                &params,
                // Stage 1 waits for the kernel before it itself, and so does stage 2: their blocks can be in place before.
                Order::Overlapping,
                stream,
            )?;
            if args.plan.has_partials && args.plan.num_shares == 0 {
                self.stage2.launch(self.stage2_shape(&params), &params, Order::Overlapping, stream)?;
            }
        }
        Ok(())
    }

    /// The kernel of stage 1 for a plan, and its grid; the index is taken apart in `cuda/decode/stage1.cuh`.
    fn stage1_launch(&self, params: &DecodeParams, args: &DecodeArgs<'_>) -> (&Kernel, LaunchShape) {
        let PlanArgs { heads_per_block, num_shares, .. } = args.plan;
        let workers =
            if num_shares > 0 { args.batch.saturating_mul(num_shares) } else { args.plan.num_workers };
        let wide = self.wide_kernel(&args.plan);
        let (kernel, instance, blocks_per_sm, threads) = match wide {
            Some(wide) => (&wide.kernel, wide.instance, wide.blocks_per_sm, WIDE_THREADS),
            None => (&self.stage1, self.instance, self.blocks_per_sm, STAGE1_THREADS),
        };
        let needed = instance.shared_bytes + inbox_bytes(instance, args.spec, num_shares, heads_per_block);
        let grid = [params.cache.num_kv_heads / heads_per_block, self.row_blocks, workers];
        let blocks = grid.iter().map(|n| u64::from(*n)).product();
        let num_sms = self.stage1.device().facts().num_sms;
        let shape = LaunchShape {
            grid,
            block: [threads / heads_per_block, heads_per_block],
            shared_bytes: if wide.is_some() { needed } else { self.evened_bytes(blocks, num_shares, needed) },
            cluster: num_shares.max(1),
            balances: residency::balances_clusters(num_shares, blocks, num_sms, self.room(blocks_per_sm)),
        };
        (kernel, shape)
    }

    fn wide_kernel(&self, plan: &PlanArgs) -> Option<&Wide> {
        let wide = match plan.num_shares {
            0 => self.items.as_ref().filter(|_| plan.wide),
            _ => self.shares.as_ref(),
        };
        wide.filter(|_| plan.heads_per_block == 1)
    }

    /// The symbol of the kernel that a plan is run by.
    #[must_use]
    pub fn symbol_for(&self, plan: &PlanArgs) -> &str {
        self.wide_kernel(plan).map_or(&self.stage1, |wide| &wide.kernel).symbol()
    }

    /// Whether a plan of this config, with so many workers that have items, is for blocks of eight warps ([`PlanArgs::wide`]). Fixed cuts always
    /// are, for the bits of a request must not depend on the others; equal items with a worker each are as long as they are few.
    #[must_use]
    pub fn takes_wide_blocks(&self, split: &SplitConfig, num_workers: u32, num_kv_heads: u32) -> bool {
        let Some(wide) = &self.items else { return false };
        match split.policy {
            SplitPolicy::BatchInvariant { .. } => true,
            SplitPolicy::Throughput => {
                let blocks = u64::from(num_workers) * u64::from(num_kv_heads) * u64::from(self.row_blocks);
                split.num_shares == 0
                    && split.item_tiles > 0
                    && split.heads_per_block == 1
                    && blocks <= WIDE_WAVES * self.room(wide.blocks_per_sm)
            }
        }
    }

    /// How plans of this config are dealt here. Fixed cuts: to as many workers as the device holds wide blocks of at once, where it has them;
    /// those go from one piece of a request to the next without a pause, so no item has a worker of its own. Else: to fewer workers where these
    /// would just fill the device.
    #[must_use]
    pub fn deal(&self, split: SplitConfig, num_kv_heads: u32) -> SplitConfig {
        let blocks_of = |heads: u32| (num_kv_heads / heads * self.row_blocks).max(1);
        match (&self.items, split.policy) {
            (Some(wide), SplitPolicy::BatchInvariant { .. }) => {
                let num_workers = self.room(wide.blocks_per_sm) / u64::from(blocks_of(1));
                SplitConfig {
                    num_workers: u32::try_from(num_workers).unwrap_or(u32::MAX).max(1),
                    heads_per_block: 1,
                    item_overhead: 1,
                    item_tiles: 0,
                    ..split
                }
            }
            (_, SplitPolicy::Throughput) if split.num_shares == 0 && split.item_tiles == 0 => {
                let blocks_per_worker = blocks_of(self.heads_per_block(split.heads_per_block, num_kv_heads));
                let room = self.room(self.blocks_per_sm);
                let num_workers =
                    residency::workers_to_leave_room(split.num_workers, blocks_per_worker, room);
                SplitConfig { num_workers, ..split }
            }
            _ => split,
        }
    }

    /// Blocks that the device holds at once.
    fn room(&self, blocks_per_sm: u32) -> u64 {
        u64::from(blocks_per_sm) * u64::from(self.stage1.device().facts().num_sms)
    }

    /// Whether a launch of narrow blocks fills the device ([`residency::fills`]); wide ones were not seen to suffer.
    fn fills_device(&self, shape: &LaunchShape) -> bool {
        let blocks = shape.grid.iter().map(|n| u64::from(*n)).product();
        let is_narrow = shape.block.iter().product::<u32>() == STAGE1_THREADS;
        is_narrow && residency::fills(blocks, self.room(self.blocks_per_sm))
    }

    /// Blocks of shares, of one head each, that one multiprocessor holds at once, and how many warps of the stage 1 of plans
    /// each does the work of.
    #[must_use]
    pub fn share_blocks(&self) -> (u32, u32) {
        match &self.shares {
            Some(wide) => (wide.blocks_per_sm, WIDE_THREADS / 32),
            None => (self.blocks_per_sm, STAGE1_THREADS / 32),
        }
    }

    /// Shared memory of a block that needs so much, or more where blocks are to spread evenly.
    fn evened_bytes(&self, blocks: u64, num_shares: u32, needed: u32) -> u32 {
        let facts = self.stage1.device().facts();
        let let_in = residency::blocks_to_let_in(blocks, facts.num_sms, self.blocks_per_sm);
        // Clusters of more would not find room at once in what is left of a part of the device.
        if let_in == self.blocks_per_sm || num_shares > MOST_EVENED_SHARES {
            return needed;
        }
        let evened = residency::shared_bytes_for(let_in, needed, facts.shared_mem_per_sm_bytes);
        if evened <= self.stage1.facts().max_dynamic_shared_bytes { evened } else { needed }
    }

    /// Grid of stage 2: as many blocks as there are rows to share out by eights, two to four a multiprocessor, along x first.
    fn stage2_shape(&self, params: &DecodeParams) -> LaunchShape {
        let rows = params.num_q_heads * params.q_len;
        let num_sms = self.stage1.device().facts().num_sms;
        let wanted = rows.div_ceil(MERGE_LANES).saturating_mul(params.batch).clamp(num_sms * 2, num_sms * 4);
        let along_rows = rows.min(STAGE2_ROW_BLOCKS);
        LaunchShape {
            grid: [along_rows, (wanted / along_rows).clamp(1, params.batch), 1],
            block: [params.cache.head_dim / MERGE_CHANNELS, MERGE_LANES],
            shared_bytes: 0,
            cluster: 1,
            balances: false,
        }
    }

    fn params(&self, args: &DecodeArgs<'_>) -> Result<DecodeParams, DeviceError> {
        let DecodeArgs { spec, plan, .. } = args;
        let cache = args.cache.params()?;
        let refuse = |what: String| Err(DeviceError::Launch { what });
        if cache.head_dim != spec.head_dim || cache.num_kv_heads != spec.num_kv_heads {
            return refuse(format!(
                "the cache has {} kv heads of {}, the spec {} of {}",
                cache.num_kv_heads, cache.head_dim, spec.num_kv_heads, spec.head_dim
            ));
        }
        key::check_instance(self.instance, &cache)?;
        let heads = plan.heads_per_block;
        if ![1, 2, 4].contains(&heads)
            || heads > self.instance.max_heads
            || !cache.num_kv_heads.is_multiple_of(heads)
        {
            return refuse(format!(
                "{heads} heads a block; 1, 2 or 4, at most {}, dividing the {} kv heads",
                self.instance.max_heads, cache.num_kv_heads
            ));
        }
        if plan.num_shares > self.most_shares() {
            return refuse(format!("{} shares; at most {} here", plan.num_shares, self.most_shares()));
        }
        let row_blocks = (spec.gqa_group() * spec.q_len).div_ceil(self.instance.key.rows());
        if row_blocks != self.row_blocks {
            return refuse(format!(
                "{row_blocks} blocks of query rows; the decoder was made for {}",
                self.row_blocks
            ));
        }
        let (batch, q_len, heads) =
            (u64::from(args.batch), u64::from(spec.q_len), u64::from(spec.num_q_heads));
        let dim = u64::from(spec.head_dim);
        need("q", args.q, array_bytes(&[batch, q_len, heads, dim], spec.q_type.bytes() as u64)?)?;
        need("out", args.out, array_bytes(&[batch, q_len, heads, dim], spec.out_type.bytes() as u64)?)?;
        if let Some(lse) = args.lse {
            need("lse", lse, array_bytes(&[batch, q_len, heads], 4)?)?;
        }
        for (what, view) in [("alibi_slopes", args.alibi_slopes), ("sinks", args.sinks)] {
            if let Some(view) = view {
                need(what, view, array_bytes(&[heads], 4)?)?;
            }
        }
        need("kv_lens", args.kv_lens, array_bytes(&[batch], 4)?)?;
        need("worker_starts", plan.worker_starts, (u64::from(plan.num_workers) + 1) * 4)?;
        need("request_partials", plan.request_partials, (batch + 1) * 4)?;
        need("items", plan.items, size_of::<WorkItem>() as u64)?;
        need("error", args.error, size_of::<crate::abi::ErrorRecord>() as u64)?;
        // What the two arrays hold in common; the kernels drop partials beyond it and never write past the end.
        let capacity_of = |view: DeviceView, row_bytes: u64| {
            array_bytes(&[heads, q_len], row_bytes).map(|bytes| view.len_bytes() / bytes.max(1))
        };
        let capacity = capacity_of(args.partial_o, dim * 4)?.min(capacity_of(args.partial_ml, 8)?);
        let address = |view: Option<DeviceView>| view.map_or(0, DeviceView::address);
        Ok(DecodeParams {
            cache,
            q: args.q.address(),
            out: args.out.address(),
            lse: address(args.lse),
            kv_lens: args.kv_lens.address(),
            items: plan.items.address(),
            worker_starts: plan.worker_starts.address(),
            request_partials: plan.request_partials.address(),
            partial_o: args.partial_o.address(),
            partial_ml: args.partial_ml.address(),
            alibi_slopes: address(args.alibi_slopes),
            sinks: address(args.sinks),
            error: args.error.address(),
            batch: args.batch,
            q_len: spec.q_len,
            num_q_heads: spec.num_q_heads,
            gqa_group: spec.num_q_heads / spec.num_kv_heads,
            q_type: spec.q_type as u32,
            out_type: spec.out_type as u32,
            // The kernels count positions in i32: a window beyond that hides nothing.
            window: spec.window.filter(|window| *window <= i32::MAX.cast_unsigned()).unwrap_or(0),
            softmax_scale: spec.softmax_scale,
            soft_cap: spec.soft_cap.unwrap_or(0.0),
            partial_capacity: u32::try_from(capacity).unwrap_or(u32::MAX - 1),
            ready: args.ready as u32,
            num_shares: plan.num_shares,
            fills_device: 0,
            reserved: 0,
        })
    }
}
