//! One captured step (append, stage 1, stage 2) replayed while the sequences grow: only what lies in device memory changes.

use super::text;
use crate::case::Case;
use crate::compare::{self, Run};
use crate::count::Ledger;
use crate::guarded::{POISON, kernels};
use crate::numbers::Numbers;
use crate::poison::{self, Fill};
use crate::problem::Step;
use crate::values::Values;
use attn_backend::{Backend as _, CudaBackend};
use attn_kernels::DeviceView;
use attn_kernels::abi::Ready;
use attn_kernels::device::{
    AppendArgs, CacheArgs, CudaDevice, DecodeArgs, DeviceBuffer, DeviceError, ErrorReport, Graph,
    PageRowsArgs, PageTableArgs, PlanArgs, Stream,
};
use attn_kernels::key::Arithmetic;
use attn_plan::{DecodeSpec, SplitPlan, WorkspaceSize};
use cpu_reference::oracle;
use kv_quant::{CacheBuffers, CacheLayout, FloatType, LayoutKind};

const NUM_WORKERS: u32 = 24;
const PAGES_A_ROW: usize = 24;
const NUM_STEPS: usize = 150;

/// For both policies, shares and both arithmetics: every replay is what the oracle says and, bit for bit, what the same launches
/// give without a graph. Outputs and workspace are poisoned before each.
///
/// # Errors
/// The first step that is wrong.
pub fn growing_graph(ledger: &Ledger) -> Result<(), String> {
    for (seed, arithmetic) in [Arithmetic::Mma, Arithmetic::F32].into_iter().enumerate() {
        for (invariant, layout, num_shares) in [
            (false, LayoutKind::Native, 0),
            (true, LayoutKind::Hnd, 0),
            (false, LayoutKind::Nhd, 0),
            (false, LayoutKind::Native, 4),
            (false, LayoutKind::Hnd, 3),
        ] {
            let mut case = Case {
                num_kv_heads: 2,
                gqa_group: 5,
                head_dim: 128,
                k_group_len: 8,
                v_group_len: 8,
                layout,
                page_len: 16,
                q_type: FloatType::F16,
                in_type: FloatType::Bf16,
                seed: seed as u64,
                window: invariant.then_some(100),
                ..Case::plain(64, 0)
            };
            case.config.num_workers = NUM_WORKERS;
            case.config.num_shares = num_shares;
            if invariant {
                case = case.batch_invariant(1);
            }
            let replays = Growing::new(&case, arithmetic).and_then(|mut growing| growing.run());
            let replays = replays.map_err(|error| format!("{arithmetic:?}: {error}\n  in {case:?}"))?;
            ledger.ran("gpu", "replays of one graph over growing sequences", replays);
        }
    }
    Ok(())
}

/// Device arrays of a fixed size, a host model beside them.
struct Growing<'a> {
    case: &'a Case,
    arithmetic: Arithmetic,
    device: CudaDevice,
    stream: Stream,
    layout: CacheLayout,
    spec: DecodeSpec,
    model: CacheBuffers,
    lens: Vec<u32>,
    pages: Vec<i32>,
    numbers: Numbers,
}

impl<'a> Growing<'a> {
    fn new(case: &'a Case, arithmetic: Arithmetic) -> Result<Self, String> {
        let device = kernels().map_err(text)?.device().clone();
        // One is empty at first, one about to fill a tile, one long, one about to need a page.
        let lens = vec![0u32, 63, 150, 16];
        let layout = case.layout_of((lens.len() * PAGES_A_ROW) as u64);
        let mut numbers = Numbers::new(case.seed, 10);
        let mut pages: Vec<i32> = (0..layout.num_pages() as i32).collect();
        numbers.shuffle(&mut pages);
        let model = poison::dead_cache(&layout, Fill::Poison);
        let stream = Stream::new(&device).map_err(text)?;
        let spec = case.bare_spec();
        Ok(Self { case, arithmetic, device, stream, layout, spec, model, lens, pages, numbers })
    }

    fn slot(&self, request: usize, token: u32) -> i64 {
        let (page, slot) = (token / self.case.page_len, token % self.case.page_len);
        let page = self.pages[request * PAGES_A_ROW + page as usize];
        i64::from(page) * i64::from(self.case.page_len) + i64::from(slot)
    }

    /// New rows for these slots, in the model too.
    fn rows(&mut self, slots: &[i64]) -> Result<(Values, Values), String> {
        let elements = slots.len() * self.layout.format().row_elements();
        let [k, v] = [(); 2].map(|()| Values::from_f32(self.case.in_type, &self.numbers.normals(elements)));
        kv_quant::append(&self.layout, &mut self.model.view_mut(), k.as_slice(), v.as_slice(), slots)
            .map_err(text)?;
        Ok((k, v))
    }

    fn plan(&self) -> Result<SplitPlan, String> {
        SplitPlan::new(&self.spec, &self.lens, &self.case.config).map_err(text)
    }

    fn run(&mut self) -> Result<u64, String> {
        let batch = self.lens.len();
        // The cache as it is before the first step.
        let prefill: Vec<i64> = (0..batch)
            .flat_map(|r| (0..self.lens[r]).map(move |t| (r, t)))
            .map(|(r, t)| self.slot(r, t))
            .collect();
        self.rows(&prefill)?;
        let upload = |bytes: &[u8]| self.device.upload(bytes).map_err(text);
        let cache: Vec<DeviceBuffer> = crate::subject::buffers(&self.layout, &self.model)
            .into_iter()
            .map(upload)
            .collect::<Result<_, _>>()?;
        let views: Vec<DeviceView> = cache.iter().map(DeviceBuffer::view).collect();

        // Room for the longest step that will come: every request one row of pages long.
        let longest = vec![PAGES_A_ROW as u32 * self.case.page_len; batch];
        let largest = SplitPlan::new(&self.spec, &longest, &self.case.config).map_err(text)?;
        let num_workers = match self.case.config.num_shares {
            0 => NUM_WORKERS,
            shares => batch as u32 * shares,
        };
        let most_items = largest.items().len() + batch + num_workers as usize;
        let size = WorkspaceSize::of(&self.spec, &largest).map_err(text)?;
        let row = self.layout.format().row_elements() * self.case.in_type.bytes();
        let alloc = |bytes: usize| -> Result<DeviceBuffer, String> {
            let buffer = self.device.alloc(bytes).map_err(text)?;
            buffer.fill(POISON, &self.stream).map_err(text)?;
            Ok(buffer)
        };
        let [k, v] = [alloc(batch * row)?, alloc(batch * row)?];
        let [slots, kv_lens] = [alloc(batch * 8)?, alloc(batch * 4)?];
        let q = alloc(self.spec.q_elements(batch) * self.spec.q_type.bytes())?;
        let out = alloc(self.spec.q_elements(batch) * self.spec.out_type.bytes())?;
        let lse = alloc(self.spec.lse_elements(batch) * 4)?;
        let [items, starts, partials] =
            [alloc(most_items * 16)?, alloc((num_workers as usize + 1) * 4)?, alloc((batch + 1) * 4)?];
        // A short request may have more partials in another plan than in the longest's: twice the room.
        let [partial_o, partial_ml] = [alloc(size.o_elements * 8)?, alloc(size.ml_elements * 8)?];
        let pages = self.device.upload(&self.pages).map_err(text)?;
        self.stream.synchronize().map_err(text)?;
        let mut report = ErrorReport::new(&self.device).map_err(text)?;

        let (layout, spec) = (self.layout.clone(), self.spec.clone());
        let cache = CacheArgs {
            layout: &layout,
            buffers: &views,
            pages: Some(PageTableArgs {
                indices: pages.view(),
                rows: PageRowsArgs::Stride(PAGES_A_ROW as u64),
            }),
        };
        let append = AppendArgs {
            cache: CacheArgs { pages: None, ..cache },
            k: k.view(),
            v: v.view(),
            k_token_stride: layout.format().row_elements() as u64,
            v_token_stride: layout.format().row_elements() as u64,
            slot_mapping: slots.view(),
            num_tokens: batch as u32,
            input_type: self.case.in_type,
            error: report.view(),
        };
        let kernels = kernels().map_err(text)?;
        let cache_kernels = kernels.cache_kernels().map_err(text)?;
        let decoder =
            kernels.decoder(&cache.params().map_err(text)?, &spec, self.arithmetic).map_err(text)?;
        // In shares the plan is not read: none is sent.
        let num_shares = decoder.num_shares(&self.case.config);
        let decode = DecodeArgs {
            spec: &spec,
            cache,
            batch: batch as u32,
            q: q.view(),
            out: out.view(),
            lse: Some(lse.view()),
            kv_lens: kv_lens.view(),
            plan: PlanArgs {
                items: items.view(),
                worker_starts: starts.view(),
                request_partials: partials.view(),
                num_workers,
                num_shares,
                wide: decoder.takes_wide_blocks(&self.case.config, num_workers, spec.num_kv_heads),
                heads_per_block: 1,
                has_partials: true,
            },
            // Copied by the host, between replays.
            ready: Ready::History,
            partial_o: partial_o.view(),
            partial_ml: partial_ml.view(),
            alibi_slopes: None,
            sinks: None,
            error: report.view(),
        };
        let step = |stream: &Stream| -> Result<(), DeviceError> {
            cache_kernels.append(&append, stream)?;
            decoder.run(&decode, stream)
        };
        let mut graph = None;
        let mut replays = 0;
        for step_idx in 0..NUM_STEPS {
            // Each sequence gets a token; one rests every third step, as in an engine's padded batch.
            let new: Vec<i64> = (0..batch)
                .map(|request| {
                    if request == 1 && step_idx % 3 == 0 || self.lens[request] == longest[request] {
                        return -1;
                    }
                    self.lens[request] += 1;
                    self.slot(request, self.lens[request] - 1)
                })
                .collect();
            let (new_k, new_v) = self.rows(&new)?;
            let queries = Values::from_f32(spec.q_type, &self.numbers.normals(spec.q_elements(batch)));
            let plan = self.plan()?;
            if plan.worker_starts().len() != num_workers as usize + 1 || plan.items().len() > most_items {
                return Err(format!("a plan that the graph has no room for: {plan}"));
            }
            let fields: Vec<u32> = plan
                .items()
                .iter()
                .flat_map(|item| [item.request_idx, item.token_start, item.token_end, item.partial_idx])
                .collect();
            let write = |buffer: &DeviceBuffer, bytes: &[u8]| buffer.write(0, bytes).map_err(text);
            write(&k, new_k.as_slice().as_bytes())?;
            write(&v, new_v.as_slice().as_bytes())?;
            write(&slots, bytemuck::cast_slice(&new))?;
            write(&kv_lens, bytemuck::cast_slice(&self.lens))?;
            write(&q, queries.as_slice().as_bytes())?;
            if num_shares == 0 {
                write(&items, bytemuck::cast_slice(&fields))?;
                write(&starts, bytemuck::cast_slice(plan.worker_starts()))?;
                write(&partials, bytemuck::cast_slice(plan.request_partials()))?;
            }
            let poison = |stream: &Stream| {
                [&out, &lse, &partial_o, &partial_ml].into_iter().try_for_each(|b| b.fill(POISON, stream))
            };
            let fetch = || -> Result<Run, String> {
                let mut values = vec![0f32; spec.q_elements(batch)];
                out.read(0, &mut values).map_err(text)?;
                let mut sums = vec![0f32; spec.lse_elements(batch)];
                lse.read(0, &mut sums).map_err(text)?;
                Ok(Run { out: Values::F32(values), lse: Some(Values::F32(sums)) })
            };
            // Captured once, at the first step; capturing runs nothing.
            let graph = match &graph {
                Some(graph) => graph,
                None => graph.insert(Graph::capture(&self.stream, step).map_err(text)?),
            };
            poison(&self.stream).map_err(text)?;
            graph.launch(&self.stream).map_err(text)?;
            report.take(&self.stream).map_err(text)?;
            let replayed = fetch()?;
            poison(&self.stream).map_err(text)?;
            step(&self.stream).map_err(text)?;
            report.take(&self.stream).map_err(text)?;
            let at = |error: String| format!("step {step_idx}, lengths {:?}: {error}", self.lens);
            if let Some(difference) = replayed.difference(&fetch()?) {
                return Err(at(format!("the graph has other bits than its launches: {difference}")));
            }
            self.compare(&plan, &queries, &replayed).map_err(at)?;
            replays += 1;
        }
        Ok(replays)
    }

    fn compare(&self, plan: &SplitPlan, q: &Values, run: &Run) -> Result<(), String> {
        let step = Step {
            kv_lens: self.lens.clone(),
            pages: self.pages.clone(),
            row_starts: Vec::new(),
            stride: Some(PAGES_A_ROW as u64),
            q: q.clone(),
        };
        let request = step.request(&self.spec);
        let expected =
            oracle::decode_request(&self.layout, &self.model.view(), &request, q.as_slice()).map_err(text)?;
        let backend = CudaBackend { arithmetic: self.arithmetic, ..CudaBackend::default() };
        let arithmetic = backend.arithmetic(&self.spec, plan);
        compare::with_oracle(&self.spec, &expected, &arithmetic, run).map(|_| ())
    }
}
