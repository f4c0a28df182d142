//! One case on the device: its arrays, its plans, its launches, and whether its output is right.

use super::case::Case;
use super::data::{Pool, Tables, gaussians};
use super::measure::Bench;
use anyhow::{Context, Result, ensure};
use attn_backend::cuda_chooser;
use attn_kernels::abi::WorkItem;
use attn_kernels::device::{
    CacheArgs, DecodeArgs, Decoder, DeviceBuffer, DeviceError, DeviceView, ErrorReport, PageRowsArgs,
    PageTableArgs, PlanArgs, Stream,
};
use attn_kernels::key::{self, Arithmetic, KernelKind, KeyQuery};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan, WorkspaceSize};
use attn_tune::{Candidates, Chooser, RunKey};
use cpu_reference::case::Floats;
use cpu_reference::oracle;

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
}

/// Everything that the launches of one case share.
pub struct Step<'a> {
    bench: &'a Bench<'a>,
    pool: &'a Pool,
    case: &'a Case,
    tables: Tables,
    pages: DeviceBuffer,
    starts: DeviceBuffer,
    kv_lens: DeviceBuffer,
    q_host: Floats,
    q: DeviceBuffer,
    out: DeviceBuffer,
    sinks: Option<DeviceBuffer>,
    report: ErrorReport,
    /// Launches of one timed graph.
    launches: usize,
    rotations: u64,
    /// Codes and scales that a launch reads.
    pub bytes: f64,
    pub decoder: Decoder,
}

impl<'a> Step<'a> {
    pub fn new(bench: &'a Bench<'a>, case: &'a Case, pool: &'a mut Option<Pool>) -> Result<Self> {
        let (device, spec) = (bench.device, &case.spec);
        let per_token = case.layout_of(1)?.format().bytes_per_token();
        let bytes = (RunKey::of_step(spec, &case.kv_lens).kv_tokens * per_token) as f64;
        let (launches, rotations) = bench.launches(bytes);
        let tables = Tables::shuffled(case, rotations);
        let num_pages = tables.pages_per_step * rotations;
        let pool = Pool::ensure(pool, case, num_pages, device, &bench.streams, bench.stream)?;
        let batch = case.kv_lens.len();
        let q_host = gaussians(spec.q_type, spec.q_elements(batch), 4);
        let params = CacheArgs { layout: &pool.layout, buffers: &pool.views(), pages: None }.params()?;
        Ok(Self {
            bench,
            pool,
            case,
            pages: device.upload(&tables.pages)?,
            starts: device.upload(&tables.starts)?,
            kv_lens: device.upload(&case.kv_lens)?,
            q: device.upload(q_host.as_slice().as_bytes())?,
            out: device.alloc(spec.q_elements(batch) * spec.out_type.bytes())?,
            sinks: spec.sinks.as_ref().map(|sinks| device.upload(sinks)).transpose()?,
            report: ErrorReport::new(device)?,
            tables,
            q_host,
            launches,
            rotations,
            bytes,
            decoder: bench.kernels.decoder(&params, spec, Arithmetic::Mma)?,
        })
    }

    /// The look-up for this case.
    pub fn chooser(&self) -> Result<Chooser> {
        let Self { bench, case, decoder, .. } = self;
        Ok(cuda_chooser(&bench.tuner, &case.layout_of(1)?, &case.spec, case.policy, decoder))
    }

    /// How the library would cut the step.
    pub fn default_split(&self) -> Result<SplitConfig> {
        let Self { case, .. } = self;
        let chooser = self.chooser()?;
        let choice = chooser.choose(&RunKey::of_step(&case.spec, &case.kv_lens)).choice;
        Ok(choice.split(case.policy, case.spec.num_kv_heads, chooser.shape().row_blocks))
    }

    /// A plan of this split on the device.
    pub fn plan(&self, split: &SplitConfig) -> Result<DevicePlan> {
        self.plan_for(&self.decoder, &self.case.spec, split)
    }

    fn plan_for(&self, decoder: &Decoder, spec: &DecodeSpec, split: &SplitConfig) -> Result<DevicePlan> {
        let device = self.bench.device;
        let plan = SplitPlan::new(spec, &self.case.kv_lens, split)?;
        let workspace = WorkspaceSize::of(spec, &plan)?;
        let flat = |item: &WorkItem| [item.request_idx, item.token_start, item.token_end, item.partial_idx];
        let items: Vec<u32> = plan.items().iter().flat_map(flat).collect();
        Ok(DevicePlan {
            items: device.upload(&items)?,
            worker_starts: device.upload(plan.worker_starts())?,
            request_partials: device.upload(plan.request_partials())?,
            partial_o: device.alloc(workspace.o_elements * 4)?,
            partial_ml: device.alloc(workspace.ml_elements * 4)?,
            plan,
            heads_per_block: decoder.heads_per_block(split.heads_per_block, spec.num_kv_heads),
            num_shares: decoder.num_shares(split),
        })
    }

    /// Microseconds of a launch by a plan, one for each replay.
    pub fn time(&mut self, plan: &DevicePlan, num_samples: usize) -> Result<Vec<f64>> {
        let samples = self.bench.time(self.launches, num_samples, |i, stream| {
            self.launch(&self.decoder, &self.case.spec, plan, i as u64 % self.rotations, stream)
        })?;
        self.report.take(self.bench.stream).context("the kernel reports bad data")?;
        Ok(samples)
    }

    /// Runs once by a plan and returns the first request's output; all of it must have been written.
    pub fn run(&mut self, plan: &DevicePlan) -> Result<Vec<f32>> {
        let (bench, case) = (self.bench, self.case);
        self.out.fill(0xff, bench.stream)?;
        self.launch(&self.decoder, &case.spec, plan, 0, bench.stream)?;
        let spec = &case.spec;
        self.report.take(self.bench.stream).context("the kernel reports bad data")?;
        let mut got = Floats::round(spec.out_type, &vec![0.0; spec.q_elements(case.kv_lens.len())]);
        self.out.read(0, got.as_mut_slice().as_bytes_mut())?;
        let mut got = got.to_f32();
        ensure!(got.iter().all(|x| x.is_finite()), "the output has values that are not finite");
        got.truncate(spec.q_elements(1));
        Ok(got)
    }

    /// The first request's output by the f64 oracle.
    pub fn oracle(&self) -> Result<Vec<f64>> {
        let Self { case, pool, tables, q_host, .. } = self;
        let spec = &case.spec;
        let pattern_pages = pool.pattern_layout.num_pages() as i32;
        let kv_len = case.kv_lens.first().copied().unwrap_or(0);
        let num_pages = case.pages_of(kv_len) as usize;
        let pages: Vec<i32> = tables.pages.iter().take(num_pages).map(|page| page % pattern_pages).collect();
        let request = DecodeRequest {
            spec,
            kv_lens: &[kv_len],
            page_table: PageTable { pages: &pages, rows: PageRows::Stride(pages.len() as u64) },
        };
        let q = q_host.as_slice().slice(0..spec.q_elements(1)).context("q has the first request")?;
        let want = oracle::decode_request(&pool.pattern_layout, &pool.pattern.view(), &request, q)?;
        Ok(want.into_iter().next().context("one request")?.out)
    }

    /// Microseconds of the fastest copy-only reader of the same rows, over the shapes of grid that it can have; empty for
    /// a scale type that has no reader.
    pub fn time_reader(&self, num_samples: usize) -> Result<Vec<f64>> {
        let (bench, case, pool) = (self.bench, self.case, self.pool);
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
        let params = CacheArgs { layout: &pool.layout, buffers: &pool.views(), pages: None }.params()?;
        let Ok(instance) = key::select(&params, &query) else { return Ok(Vec::new()) };
        let reader = bench.kernels.decoder_of(instance, &spec)?;
        let chooser = cuda_chooser(&bench.tuner, &case.layout_of(1)?, &spec, case.policy, &reader);
        let num_sms = bench.device.facts().num_sms;
        let mut best: Option<(f64, DevicePlan)> = None;
        let run = RunKey::of_step(&spec, &case.kv_lens);
        for choice in Candidates::few(num_sms, chooser.key(), chooser.shape(), &run) {
            let plan = self.plan_for(&reader, &spec, &choice.split(case.policy, spec.num_kv_heads, 1))?;
            let us = super::quantiles(&mut self.time_reads(&reader, &spec, &plan, 3)?).0;
            if best.as_ref().is_none_or(|(least, _)| us < *least) {
                best = Some((us, plan));
            }
        }
        let (_, plan) = best.context("a reader has a schedule")?;
        self.time_reads(&reader, &spec, &plan, num_samples)
    }

    fn time_reads(
        &self,
        reader: &Decoder,
        spec: &DecodeSpec,
        plan: &DevicePlan,
        num_samples: usize,
    ) -> Result<Vec<f64>> {
        self.bench.time(self.launches, num_samples, |i, stream| {
            self.launch(reader, spec, plan, i as u64 % self.rotations, stream)
        })
    }

    fn launch(
        &self,
        decoder: &Decoder,
        spec: &DecodeSpec,
        plan: &DevicePlan,
        rotation: u64,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let views = self.pool.views();
        let args = DecodeArgs {
            spec,
            cache: self.cache(rotation, &views)?,
            batch: self.case.kv_lens.len() as u32,
            q: self.q.view(),
            out: self.out.view(),
            lse: None,
            kv_lens: self.kv_lens.view(),
            plan: PlanArgs {
                items: plan.items.view(),
                worker_starts: plan.worker_starts.view(),
                request_partials: plan.request_partials.view(),
                num_workers: plan.plan.num_busy_workers(),
                heads_per_block: plan.heads_per_block,
                num_shares: plan.num_shares,
                has_partials: plan.plan.num_partials() > 0
                    && decoder.instance().key.kind == KernelKind::Stage1,
            },
            tables_ready: true,
            partial_o: plan.partial_o.view(),
            partial_ml: plan.partial_ml.view(),
            alibi_slopes: None,
            sinks: self.sinks.as_ref().map(DeviceBuffer::view),
            error: self.report.view(),
        };
        decoder.run(&args, stream)
    }

    /// The cache with the page table of one rotation.
    fn cache<'b>(&'b self, rotation: u64, views: &'b [DeviceView]) -> Result<CacheArgs<'b>, DeviceError> {
        let table_bytes = self.tables.pages_per_step * 4;
        let indices = self
            .pages
            .view()
            .slice(rotation * table_bytes, table_bytes)
            .ok_or_else(|| DeviceError::Launch { what: format!("no table for rotation {rotation}") })?;
        let rows = PageRowsArgs::Starts(self.starts.view());
        Ok(CacheArgs {
            layout: &self.pool.layout,
            buffers: views,
            pages: Some(PageTableArgs { indices, rows }),
        })
    }
}

/// Relative L2 distance of an output from the oracle's.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut want.iter().zip(got).map(|(want, got)| want - f64::from(*got)));
    error / norm(&mut want.iter().copied())
}
