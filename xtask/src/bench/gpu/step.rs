//! One case on the device: its arrays, its plans, its launches, and whether its output is right.

use super::measure::Bench;
use super::pool::{Filled, Pool};
use crate::bench::case::Case;
use crate::bench::inputs::Inputs;
use anyhow::{Context, Result};
use attn_backend::cuda_chooser;
use attn_kernels::abi::{Ready, WorkItem};
use attn_kernels::device::{
    CacheArgs, DecodeArgs, Decoder, DeviceBuffer, DeviceError, ErrorReport, Graph, PageRowsArgs,
    PageTableArgs, PlanArgs, Stream,
};
use attn_kernels::key::{self, Arithmetic, KernelKind, KeyQuery};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan, WorkspaceSize};
use attn_tune::{Candidates, Chooser, RunKey};
use cpu_reference::case::Floats;
use cpu_reference::oracle;
use std::time::Duration;

/// A plan in device memory.
pub struct DevicePlan {
    items: DeviceBuffer,
    worker_starts: DeviceBuffer,
    request_partials: DeviceBuffer,
    partial_o: DeviceBuffer,
    partial_ml: DeviceBuffer,
    pub plan: SplitPlan,
    pub heads_per_block: u32,
    pub num_shares: u32,
    pub wide: bool,
}

impl DevicePlan {
    fn args(&self) -> PlanArgs {
        PlanArgs {
            items: self.items.view(),
            worker_starts: self.worker_starts.view(),
            request_partials: self.request_partials.view(),
            num_workers: self.plan.num_busy_workers(),
            heads_per_block: self.heads_per_block,
            wide: self.wide,
            num_shares: self.num_shares,
            has_partials: self.plan.num_partials() > 0,
        }
    }
}

/// Everything that the launches of one case share.
pub struct Step<'a> {
    bench: &'a Bench<'a>,
    pool: &'a Filled,
    pub inputs: Inputs,
    pages: DeviceBuffer,
    starts: DeviceBuffer,
    kv_lens: DeviceBuffer,
    q: DeviceBuffer,
    out: DeviceBuffer,
    sinks: Option<DeviceBuffer>,
    report: ErrorReport,
    pub decoder: Decoder,
}

impl<'a> Step<'a> {
    pub fn new(bench: &'a Bench<'a>, case: &Case, pool: &'a mut Option<Pool>) -> Result<Self> {
        let l2_bytes = u64::from(bench.device.facts().l2_bytes);
        Self::of(bench, Inputs::new(case, &bench.patterns, l2_bytes, bench.read_gb_per_s)?, pool)
    }

    /// Of inputs that were made before.
    pub fn of(bench: &'a Bench<'a>, inputs: Inputs, pool: &'a mut Option<Pool>) -> Result<Self> {
        let Inputs { case, tables, q, pattern, .. } = &inputs;
        let (device, spec) = (bench.device, &case.spec);
        let num_pages = inputs.num_pages();
        let pool = Pool::ensure(pool, case, pattern, num_pages, device, &bench.streams, bench.stream)?;
        let params = CacheArgs { layout: &pool.layout, buffers: &pool.views, pages: None }.params()?;
        Ok(Self {
            bench,
            pool,
            pages: device.upload(&tables.pages)?,
            starts: device.upload(&tables.starts)?,
            kv_lens: device.upload(&case.kv_lens)?,
            q: device.upload(q.as_slice().as_bytes())?,
            out: device.alloc(spec.q_elements(case.kv_lens.len()) * spec.out_type.bytes())?,
            sinks: spec.sinks.as_ref().map(|sinks| device.upload(sinks)).transpose()?,
            report: ErrorReport::new(device)?,
            decoder: bench.kernels.decoder(&params, spec, Arithmetic::Mma)?,
            inputs,
        })
    }

    fn case(&self) -> &Case {
        &self.inputs.case
    }

    /// The look-up for this case.
    pub fn chooser(&self) -> Result<Chooser> {
        let (Self { bench, decoder, .. }, case) = (self, self.case());
        Ok(cuda_chooser(&bench.tuner, &case.layout_of(1)?, &case.spec, case.policy, decoder))
    }

    /// How the library would cut the step.
    pub fn default_split(&self) -> Result<SplitConfig> {
        let case = self.case();
        let chooser = self.chooser()?;
        let choice = chooser.choose(&RunKey::of_step(&case.spec, &case.kv_lens)).choice;
        let num_kv_heads = case.spec.num_kv_heads;
        let split = choice.split(case.policy, num_kv_heads, chooser.shape().row_blocks);
        Ok(self.decoder.deal(split, num_kv_heads))
    }

    /// A plan of this split on the device.
    pub fn plan(&self, split: &SplitConfig) -> Result<DevicePlan> {
        let spec = &self.case().spec;
        self.plan_for(&self.decoder, spec, &self.decoder.deal(*split, spec.num_kv_heads))
    }

    fn plan_for(&self, decoder: &Decoder, spec: &DecodeSpec, split: &SplitConfig) -> Result<DevicePlan> {
        let device = self.bench.device;
        let plan = SplitPlan::new(spec, &self.case().kv_lens, split)?;
        let workspace = WorkspaceSize::of(spec, &plan)?;
        let flat = |item: &WorkItem| [item.request_idx, item.token_start, item.token_end, item.partial_idx];
        let items: Vec<u32> = plan.items().iter().flat_map(flat).collect();
        Ok(DevicePlan {
            items: device.upload(&items)?,
            worker_starts: device.upload(plan.worker_starts())?,
            request_partials: device.upload(plan.request_partials())?,
            partial_o: device.alloc(workspace.o_elements * 4)?,
            partial_ml: device.alloc(workspace.ml_elements * 4)?,
            wide: decoder.takes_wide_blocks(split, plan.num_busy_workers(), spec.num_kv_heads),
            plan,
            heads_per_block: decoder.heads_per_block(split.heads_per_block, spec.num_kv_heads),
            num_shares: decoder.num_shares(split),
        })
    }

    /// The kernel of stage 1 that runs by a plan.
    pub fn symbol(&self, plan: &DevicePlan) -> &str {
        self.decoder.symbol_for(&plan.args())
    }

    /// Microseconds of a launch by a plan, one for each replay.
    pub fn time(&mut self, plan: &DevicePlan, num_samples: usize) -> Result<Vec<f64>> {
        let graph = self.capture(plan)?;
        let launches = self.inputs.launches;
        let samples = self.bench.replay(&graph, launches, 3, num_samples, Duration::MAX)?;
        self.report.take(self.bench.stream).context("the kernel reports bad data")?;
        Ok(samples)
    }

    /// A graph of launches by a plan over all rotations; the plan must live as long.
    pub fn capture(&self, plan: &DevicePlan) -> Result<Graph> {
        let Inputs { launches, rotations, case, .. } = &self.inputs;
        self.bench.capture(*launches, |i, stream| {
            self.launch(&self.decoder, &case.spec, plan, i as u64 % rotations, stream)
        })
    }

    /// Runs once by a plan and returns the output; what was not written is not a number.
    pub fn run(&mut self, plan: &DevicePlan) -> Result<Floats> {
        let bench = self.bench;
        self.out.fill(0xff, bench.stream)?;
        self.launch(&self.decoder, &self.case().spec, plan, 0, bench.stream)?;
        self.report.take(bench.stream).context("the kernel reports bad data")?;
        let Case { spec, kv_lens, .. } = self.case();
        let mut got = Floats::round(spec.out_type, &vec![0.0; spec.q_elements(kv_lens.len())]);
        self.out.read(0, got.as_mut_slice().as_bytes_mut())?;
        Ok(got)
    }

    /// The first request's output by the f64 oracle.
    pub fn oracle(&self) -> Result<Vec<f64>> {
        let Inputs { case, q, pattern, .. } = &self.inputs;
        let spec = &case.spec;
        let kv_len = case.kv_lens.first().copied().unwrap_or(0);
        let pages = self.inputs.pattern_pages(0);
        let request = DecodeRequest {
            spec,
            kv_lens: &[kv_len],
            page_table: PageTable { pages: &pages, rows: PageRows::Stride(pages.len() as u64) },
        };
        let q = q.as_slice().slice(0..spec.q_elements(1)).context("q has the first request")?;
        let want = oracle::decode_request(&pattern.layout, &pattern.cache.view(), &request, q)?;
        Ok(want.into_iter().next().context("one request")?.out)
    }

    /// Microseconds of the fastest copy-only reader of the same rows, over the shapes of grid that it can have; empty for
    /// a scale type that has no reader.
    pub fn time_reader(&self, num_samples: usize) -> Result<Vec<f64>> {
        self.time_reader_of(usize::MAX, 3, num_samples, Duration::MAX)
    }

    /// As [`Self::time_reader`], over as many shapes of grid as the cost model likes best.
    pub fn time_reader_of(
        &self,
        num_grids: usize,
        num_uncounted: usize,
        num_samples: usize,
        limit: Duration,
    ) -> Result<Vec<f64>> {
        let (bench, case, pool) = (self.bench, self.case(), self.pool);
        // The reader has one block of rows, whatever the queries.
        let spec = &case.spec;
        let spec = DecodeSpec {
            window: spec.window,
            ..DecodeSpec::new(spec.num_kv_heads, spec.num_kv_heads, spec.head_dim)
        };
        let query = KeyQuery {
            kind: KernelKind::Reader,
            num_rows: 1,
            arithmetic: Arithmetic::Mma,
            shared_bytes: bench.device.facts().shared_mem_optin_bytes,
        };
        let params = CacheArgs { layout: &pool.layout, buffers: &pool.views, pages: None }.params()?;
        let Ok(instance) = key::select(&params, &query) else { return Ok(Vec::new()) };
        let reader = bench.kernels.decoder_of(instance, &spec)?;
        let chooser = cuda_chooser(&bench.tuner, &case.layout_of(1)?, &spec, case.policy, &reader);
        let machine = bench.tuner.machine();
        let run = RunKey::of_step(&spec, &case.kv_lens);
        let (key, shape) = (chooser.key(), chooser.shape());
        let mut choices: Vec<_> = Candidates::few(machine.num_sms, key, shape, &run).collect();
        if num_grids < choices.len() {
            let expected = |choice: &_| bench.tuner.model().predict(machine, key, shape, &run, choice);
            choices.sort_by(|a, b| expected(a).total_cmp(&expected(b)));
            choices.truncate(num_grids.max(1));
        }
        let Inputs { launches, rotations, .. } = self.inputs;
        let mut best: Option<(f64, Vec<f64>, DevicePlan, Graph)> = None;
        for choice in choices {
            let plan = self.plan_for(&reader, &spec, &choice.split(case.policy, spec.num_kv_heads, 1))?;
            let graph = bench.capture(launches, |i, stream| {
                self.launch(&reader, &spec, &plan, i as u64 % rotations, stream)
            })?;
            let mut samples = bench.replay(&graph, launches, num_uncounted, 3, limit)?;
            let us = super::quantiles(&mut samples).0;
            if best.as_ref().is_none_or(|(least, ..)| us < *least) {
                best = Some((us, samples, plan, graph));
            }
        }
        let (_, samples, _plan, graph) = best.context("a reader has a schedule")?;
        if num_samples <= samples.len() {
            return Ok(samples);
        }
        bench.replay(&graph, launches, num_uncounted, num_samples, limit)
    }

    fn launch(
        &self,
        decoder: &Decoder,
        spec: &DecodeSpec,
        plan: &DevicePlan,
        rotation: u64,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let args = DecodeArgs {
            spec,
            cache: self.cache(rotation)?,
            batch: self.case().kv_lens.len() as u32,
            q: self.q.view(),
            out: self.out.view(),
            lse: None,
            kv_lens: self.kv_lens.view(),
            plan: PlanArgs {
                has_partials: plan.plan.num_partials() > 0
                    && decoder.instance().key.kind == KernelKind::Stage1,
                ..plan.args()
            },
            // No kernel here writes the cache; a model's append writes the last token.
            ready: Ready::History,
            partial_o: plan.partial_o.view(),
            partial_ml: plan.partial_ml.view(),
            alibi_slopes: None,
            sinks: self.sinks.as_ref().map(DeviceBuffer::view),
            error: self.report.view(),
        };
        decoder.run(&args, stream)
    }

    /// The cache with the page table of one rotation.
    fn cache(&self, rotation: u64) -> Result<CacheArgs<'_>, DeviceError> {
        let table_bytes = self.inputs.tables.pages_per_step * 4;
        let indices = self
            .pages
            .view()
            .slice(rotation * table_bytes, table_bytes)
            .ok_or_else(|| DeviceError::Launch { what: format!("no table for rotation {rotation}") })?;
        let rows = PageRowsArgs::Starts(self.starts.view());
        Ok(CacheArgs {
            layout: &self.pool.layout,
            buffers: &self.pool.views,
            pages: Some(PageTableArgs { indices, rows }),
        })
    }
}

/// Relative L2 distance of the first of an output's elements from the oracle's.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut want.iter().zip(got).map(|(want, got)| want - f64::from(*got)));
    error / norm(&mut want.iter().copied())
}
