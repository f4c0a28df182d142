//! Graphs of launches over rotating tables, timed by events.

use super::super::GpuArgs;
use super::case::Case;
use super::data::{Pool, Tables, gaussians};
use anyhow::{Context, Result, ensure};
use attn_kernels::abi::WorkItem;
use attn_kernels::device::{
    AppendArgs, CacheArgs, CudaDevice, DecodeArgs, Decoder, DeviceBuffer, DeviceError, ErrorReport, Event,
    Graph, Kernels, PageRowsArgs, PageTableArgs, PlanArgs, Stream, StreamKernels,
};
use attn_kernels::key::{self, Arithmetic, KernelKind, KeyQuery};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan, WorkspaceSize};
use cpu_reference::case::{Floats, Rng};
use cpu_reference::oracle;
use kv_quant::FloatType;

/// Pools rotate through this many times the L2.
const L2_TIMES: u64 = 5;
/// A graph should run at least this long, so that its launch does not show.
const GRAPH_MICROSECONDS: f64 = 600.0;
/// Bytes of the streams that measure bandwidth.
const STREAM_BYTES: usize = 4 << 30;

/// A device ready to be measured.
pub struct Bench<'a> {
    device: &'a CudaDevice,
    kernels: &'a Kernels,
    stream: &'a Stream,
    streams: StreamKernels,
    args: &'a GpuArgs,
    pub gpu: String,
    pub read_gb_per_s: f64,
    pub copy_gb_per_s: f64,
}

/// What one case gave.
pub struct Measured {
    pub microseconds: Vec<f64>,
    pub copy_only_microseconds: Vec<f64>,
    pub bytes: f64,
    pub relative_error: Option<f64>,
    pub plan: String,
}

/// A plan in device memory.
struct DevicePlan {
    items: DeviceBuffer,
    worker_starts: DeviceBuffer,
    request_partials: DeviceBuffer,
    partial_o: DeviceBuffer,
    partial_ml: DeviceBuffer,
    plan: SplitPlan,
    heads_per_block: u32,
}

/// Everything that the launches of one case share.
struct Step<'a> {
    pool: &'a Pool,
    case: &'a Case,
    tables: &'a Tables,
    pages: DeviceBuffer,
    starts: DeviceBuffer,
    kv_lens: DeviceBuffer,
    q: DeviceBuffer,
    out: DeviceBuffer,
    sinks: Option<DeviceBuffer>,
}

impl<'a> Bench<'a> {
    pub fn new(
        device: &'a CudaDevice,
        kernels: &'a Kernels,
        stream: &'a Stream,
        args: &'a GpuArgs,
    ) -> Result<Self> {
        let mut bench = Self {
            device,
            kernels,
            stream,
            streams: kernels.stream_kernels()?,
            args,
            gpu: device.facts().name.clone(),
            read_gb_per_s: 0.0,
            copy_gb_per_s: 0.0,
        };
        let (src, dst) = (device.alloc(STREAM_BYTES)?, device.alloc(STREAM_BYTES)?);
        let mut rng = Rng::new(3);
        let block: Vec<u64> = (0..1 << 20).map(|_| rng.bits()).collect();
        for offset in (0..STREAM_BYTES).step_by(size_of_val(&block[..])) {
            src.write(offset, &block)?;
        }
        let read = bench.time(4, |_, stream| bench.streams.read(src.view(), dst.view(), stream))?;
        let copy = bench.time(4, |_, stream| bench.streams.copy(src.view(), dst.view(), stream))?;
        let median = |samples: Vec<f64>| super::quantiles(&mut samples.clone()).0;
        bench.read_gb_per_s = STREAM_BYTES as f64 / median(read) / 1e3;
        bench.copy_gb_per_s = 2.0 * STREAM_BYTES as f64 / median(copy) / 1e3;
        Ok(bench)
    }

    /// Microseconds a launch: one sample a replay of a graph of `launches` launches.
    fn time(
        &self,
        launches: usize,
        launch: impl Fn(usize, &Stream) -> Result<(), DeviceError>,
    ) -> Result<Vec<f64>> {
        let graph = Graph::capture(self.stream, |stream| (0..launches).try_for_each(|i| launch(i, stream)))?;
        let (start, end) = (Event::new(self.device)?, Event::new(self.device)?);
        let mut samples = Vec::with_capacity(self.args.samples);
        for sample in 0..self.args.samples + 3 {
            start.record(self.stream)?;
            graph.launch(self.stream)?;
            end.record(self.stream)?;
            end.synchronize()?;
            // The first replays upload the graph and warm the clocks.
            if sample >= 3 {
                samples.push(end.microseconds_since(&start)? / launches as f64);
            }
        }
        Ok(samples)
    }

    /// How many launches a graph takes, and how many tables they rotate through.
    fn launches(&self, bytes: f64) -> (usize, u64) {
        let l2 = u64::from(self.device.facts().l2_bytes);
        let rotations = ((L2_TIMES * l2) as f64 / bytes).ceil().clamp(1.0, 256.0) as u64;
        let expected = 4.0 + bytes / self.read_gb_per_s / 1e3;
        let launches = ((GRAPH_MICROSECONDS / expected).ceil() as usize).clamp(1, 400);
        (launches.max(rotations as usize), rotations)
    }

    pub fn decode(&self, case: &Case, pool: &mut Option<Pool>) -> Result<Measured> {
        let spec = &case.spec;
        let per_token = case.layout_of(1)?.format().bytes_per_token();
        let visible = |&kv_len: &u32| u64::from(spec.visible_any(kv_len).len() as u32);
        let bytes = (case.kv_lens.iter().map(visible).sum::<u64>() * per_token) as f64;
        let (launches, rotations) = self.launches(bytes);
        let tables = Tables::shuffled(case, rotations);
        let num_pages = tables.pages_per_step * rotations;
        let pool = Pool::ensure(pool, case, num_pages, self.device, &self.streams, self.stream)?;
        let batch = case.kv_lens.len();
        let q_host = gaussians(spec.q_type, spec.q_elements(batch), 4);
        let step = Step {
            pool,
            case,
            pages: self.device.upload(&tables.pages)?,
            starts: self.device.upload(&tables.starts)?,
            kv_lens: self.device.upload(&case.kv_lens)?,
            q: self.device.upload(q_host.as_slice().as_bytes())?,
            out: self.device.alloc(spec.q_elements(batch) * spec.out_type.bytes())?,
            sinks: spec.sinks.as_ref().map(|sinks| self.device.upload(sinks)).transpose()?,
            tables: &tables,
        };
        let mut report = ErrorReport::new(self.device)?;

        let cache = step.cache(0, &pool.views())?.params()?;
        let decoder = self.kernels.decoder(&cache, spec, Arithmetic::Mma)?;
        let plan = self.plan(&decoder, spec, case)?;
        step.out.fill(0xff, self.stream)?;
        self.launch(&step, &decoder, spec, &plan, &report, 0, self.stream)?;
        report.take(self.stream).context("the kernel reports bad data")?;
        let relative_error =
            case.is_checked.then(|| relative_error(&step, q_host.as_slice(), &tables)).transpose()?;
        let microseconds = self.time(launches, |i, stream| {
            self.launch(&step, &decoder, spec, &plan, &report, i as u64 % rotations, stream)
        })?;
        report.take(self.stream).context("the kernel reports bad data")?;

        // The reader has one block of rows, whatever the queries.
        let reader_spec = DecodeSpec {
            window: spec.window,
            ..DecodeSpec::new(spec.num_kv_heads, spec.num_kv_heads, spec.head_dim)
        };
        let query = KeyQuery {
            kind: KernelKind::Reader,
            num_rows: 1,
            arithmetic: Arithmetic::Mma,
            shared_bytes: self.device.facts().shared_mem_optin_bytes,
        };
        // Not every scale type has a reader; such a row has no copy-only figure.
        let copy_only_microseconds = match key::select(&cache, &query) {
            Err(_) => Vec::new(),
            Ok(instance) => {
                let reader = self.kernels.decoder_of(instance, &reader_spec)?;
                let reader_plan = self.plan(&reader, &reader_spec, case)?;
                self.time(launches, |i, stream| {
                    self.launch(
                        &step,
                        &reader,
                        &reader_spec,
                        &reader_plan,
                        &report,
                        i as u64 % rotations,
                        stream,
                    )
                })?
            }
        };
        let config = plan.plan.config().context("the plan is made")?;
        let plan = format!(
            "{}: {} workers, {} heads a block, {} items, {} partials, {}",
            config.policy,
            config.num_workers,
            plan.heads_per_block,
            plan.plan.items().len(),
            plan.plan.num_partials(),
            decoder.instance().key
        );
        Ok(Measured { microseconds, copy_only_microseconds, bytes, relative_error, plan })
    }

    fn plan(&self, decoder: &Decoder, spec: &DecodeSpec, case: &Case) -> Result<DevicePlan> {
        let kv_tokens = case.kv_lens.iter().map(|&kv_len| spec.visible_any(kv_len).len() as u64).sum();
        let schedule = decoder.schedule(spec, case.page_len, kv_tokens, case.policy);
        let default = schedule.split;
        let config = SplitConfig {
            item_overhead: self.args.item_overhead.unwrap_or(default.item_overhead),
            min_split_tiles: self.args.min_split_tiles.unwrap_or(default.min_split_tiles),
            ..default
        };
        let plan = SplitPlan::new(spec, &case.kv_lens, &config)?;
        let workspace = WorkspaceSize::of(spec, &plan)?;
        let flat = |item: &WorkItem| [item.request_idx, item.token_start, item.token_end, item.partial_idx];
        let items: Vec<u32> = plan.items().iter().flat_map(flat).collect();
        Ok(DevicePlan {
            items: self.device.upload(&items)?,
            worker_starts: self.device.upload(plan.worker_starts())?,
            request_partials: self.device.upload(plan.request_partials())?,
            partial_o: self.device.alloc(workspace.o_elements * 4)?,
            partial_ml: self.device.alloc(workspace.ml_elements * 4)?,
            plan,
            heads_per_block: schedule.heads_per_block,
        })
    }

    fn launch(
        &self,
        step: &Step<'_>,
        decoder: &Decoder,
        spec: &DecodeSpec,
        plan: &DevicePlan,
        report: &ErrorReport,
        rotation: u64,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let views = step.pool.views();
        let args = DecodeArgs {
            spec,
            cache: step.cache(rotation, &views)?,
            batch: step.case.kv_lens.len() as u32,
            q: step.q.view(),
            out: step.out.view(),
            lse: None,
            kv_lens: step.kv_lens.view(),
            plan: PlanArgs {
                items: plan.items.view(),
                worker_starts: plan.worker_starts.view(),
                request_partials: plan.request_partials.view(),
                num_workers: plan.plan.config().map_or(0, |config| config.num_workers),
                heads_per_block: plan.heads_per_block,
                has_partials: plan.plan.num_partials() > 0
                    && decoder.instance().key.kind == KernelKind::Stage1,
            },
            tables_ready: true,
            partial_o: plan.partial_o.view(),
            partial_ml: plan.partial_ml.view(),
            alibi_slopes: None,
            sinks: step.sinks.as_ref().map(DeviceBuffer::view),
            error: report.view(),
        };
        decoder.run(&args, stream)
    }

    /// Appends of `tokens` tokens to shuffled slots, inputs and slots rotating.
    pub fn append(&self, case: &Case, tokens: u32) -> Result<Measured> {
        let spec = &case.spec;
        let row = spec.num_kv_heads as usize * spec.head_dim as usize;
        let input_bytes = 2 * tokens as usize * row * FloatType::Bf16.bytes();
        let per_token = case.layout_of(1)?.format().bytes_per_token();
        let bytes = input_bytes as f64 + (u64::from(tokens) * per_token) as f64;
        let (launches, rotations) = self.launches(bytes);
        let slots_in_all = (u64::from(tokens) * rotations).next_multiple_of(u64::from(case.page_len));
        let layout = case.layout_of(slots_in_all / u64::from(case.page_len))?;
        let buffers = layout
            .buffer_bytes()
            .iter()
            .map(|&bytes| self.device.alloc(usize::try_from(bytes).unwrap_or(usize::MAX)))
            .collect::<Result<Vec<_>, _>>()?;
        let views: Vec<_> = buffers.iter().map(DeviceBuffer::view).collect();
        let mut slots: Vec<i64> = (0..slots_in_all as i64).collect();
        Rng::new(5).shuffle(&mut slots);
        let slots = self.device.upload(&slots)?;
        let input = gaussians(FloatType::Bf16, tokens as usize * row, 6);
        let side_bytes = (input_bytes / 2) as u64;
        let inputs = self.device.alloc(input_bytes * rotations as usize)?;
        for half in 0..2 * rotations as usize {
            inputs.write(half * side_bytes as usize, input.as_slice().as_bytes())?;
        }
        let cache_kernels = self.kernels.cache_kernels()?;
        let mut report = ErrorReport::new(self.device)?;
        let microseconds = self.time(launches, |i, stream| {
            let rotation = i as u64 % rotations;
            let part = |buffer: &DeviceBuffer, offset: u64, len: u64| {
                buffer
                    .view()
                    .slice(offset, len)
                    .ok_or_else(|| DeviceError::Launch { what: "a slice".to_owned() })
            };
            let args = AppendArgs {
                cache: CacheArgs { layout: &layout, buffers: &views, pages: None },
                k: part(&inputs, 2 * rotation * side_bytes, side_bytes)?,
                v: part(&inputs, (2 * rotation + 1) * side_bytes, side_bytes)?,
                k_token_stride: row as u64,
                v_token_stride: row as u64,
                slot_mapping: part(&slots, rotation * u64::from(tokens) * 8, u64::from(tokens) * 8)?,
                num_tokens: tokens,
                input_type: FloatType::Bf16,
                error: report.view(),
            };
            cache_kernels.append(&args, stream)
        })?;
        report.take(self.stream).context("the kernel reports bad data")?;
        // The floor of an append is a copy of as many bytes.
        let floor = bytes / self.copy_gb_per_s / 1e3;
        Ok(Measured {
            copy_only_microseconds: vec![floor],
            microseconds,
            bytes,
            relative_error: None,
            plan: "append; copy-only is the copy bandwidth of this run".to_owned(),
        })
    }
}

impl Step<'_> {
    /// The cache with the page table of one rotation.
    fn cache<'b>(
        &'b self,
        rotation: u64,
        views: &'b [attn_kernels::device::DeviceView],
    ) -> Result<CacheArgs<'b>, DeviceError> {
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

/// Relative L2 error of the first request's output, which must be wholly written.
fn relative_error(step: &Step<'_>, q: kv_quant::FloatSlice<'_>, tables: &Tables) -> Result<f64> {
    let spec = &step.case.spec;
    let elements = spec.q_elements(1);
    let mut got = Floats::round(spec.out_type, &vec![0.0; elements]);
    step.out.read(0, got.as_mut_slice().as_bytes_mut())?;
    let pattern_pages = step.pool.pattern_layout.num_pages() as i32;
    let kv_len = step.case.kv_lens.first().copied().unwrap_or(0);
    let pages: Vec<i32> = tables
        .pages
        .iter()
        .take(step.case.pages_of(kv_len) as usize)
        .map(|page| page % pattern_pages)
        .collect();
    let request = DecodeRequest {
        spec,
        kv_lens: &[kv_len],
        page_table: PageTable { pages: &pages, rows: PageRows::Stride(pages.len() as u64) },
    };
    let q = q.slice(0..elements).context("q has the first request")?;
    let want = oracle::decode_request(&step.pool.pattern_layout, &step.pool.pattern.view(), &request, q)?;
    let want = &want.first().context("one request")?.out;
    let got = got.to_f32();
    ensure!(got.iter().all(|x| x.is_finite()), "the output has values that are not finite");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut want.iter().zip(&got).map(|(want, got)| want - f64::from(*got)));
    Ok(error / norm(&mut want.iter().copied()))
}
