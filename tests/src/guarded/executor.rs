//! One cache and its decodes between canaries.

use super::arena::{Arena, Place};
use super::{Guarded, IDLE, SHARES, failed, launched};
use attn_backend::{Descriptor, Error, Executor, Input, NormalDecode, Output};
use attn_kernels::DeviceView;
use attn_kernels::abi::Ready;
use attn_kernels::device::{
    AppendArgs, CacheArgs, CacheKernels, DecodeArgs, Decoder, DeviceError, ErrorReport, Graph, Kernels,
    PageRowsArgs, PageTableArgs, PlanArgs, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, SplitPlan, WorkspaceSize};
use kv_quant::{CacheLayout, FloatSlice, PageCopy, PlaneId};
use std::sync::PoisonError;

/// Memory, stream and loaded kernels, handed from one executor to the next.
pub struct Kit {
    kernels: Kernels,
    cache_kernels: CacheKernels,
    stream: Stream,
    cache: Arena,
    step: Arena,
    report: ErrorReport,
}

impl Kit {
    pub fn new(kernels: &Kernels) -> Result<Self, DeviceError> {
        let device = kernels.device();
        Ok(Self {
            kernels: kernels.clone(),
            cache_kernels: kernels.cache_kernels()?,
            stream: Stream::new(device)?,
            cache: Arena::new(device)?,
            step: Arena::new(device)?,
            report: ErrorReport::new(device)?,
        })
    }
}

/// How the cache on the device stands to the copy on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copies {
    /// Changed on the host: to be sent before the next launch.
    HostIsNewer,
    /// A launch may have changed it.
    DeviceIsNewer,
    Equal,
}

pub struct GuardedExecutor {
    /// `None` only while it is dropped.
    kit: Option<Kit>,
    layout: CacheLayout,
    backend: Guarded,
    buffers: Vec<Place>,
    copies: Copies,
    num_decodes: u32,
}

/// Elements between the rows of k beyond a row, and of v.
const GAPS: [usize; 2] = [8, 24];

impl Drop for GuardedExecutor {
    fn drop(&mut self) {
        // Not after a failure: nobody knows what is still under way.
        if let Some(kit) = self.kit.take().filter(|kit| kit.stream.synchronize().is_ok()) {
            IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(kit);
        }
    }
}

impl GuardedExecutor {
    pub fn new(mut kit: Kit, descriptor: &Descriptor, backend: Guarded) -> Result<Self, DeviceError> {
        let layout = descriptor.layout.clone();
        let sizes: Vec<usize> = layout.buffer_bytes().iter().map(|&bytes| bytes as usize).collect();
        kit.cache.clear(sizes.iter().copied())?;
        let buffers = sizes.iter().map(|&bytes| kit.cache.contents("a cache buffer", bytes)).collect();
        let copies = Copies::HostIsNewer;
        Ok(Self { kit: Some(kit), layout, backend, buffers, copies, num_decodes: 0 })
    }

    fn kit(&mut self) -> &mut Kit {
        self.kit.as_mut().expect("there until it is dropped")
    }

    fn views(&mut self) -> Result<Vec<DeviceView>, DeviceError> {
        let send = self.copies == Copies::HostIsNewer;
        let Kit { cache, stream, .. } = self.kit.as_mut().expect("there until it is dropped");
        if send {
            cache.send(stream)?;
        }
        self.copies = Copies::DeviceIsNewer;
        Ok(self.buffers.iter().map(|place| cache.view(place)).collect())
    }

    /// The cache on the host as it is on the device, its canaries looked at.
    fn fetch_cache(&mut self) -> Result<(), Error> {
        if self.copies == Copies::DeviceIsNewer {
            let Kit { cache, stream, .. } = self.kit();
            cache.fetch(stream).map_err(failed)?;
            cache.keep();
            self.copies = Copies::Equal;
        }
        Ok(())
    }

    /// Heads of a block: another of those that the kernel takes for each number of pages.
    fn heads_per_block(&self, decoder: &Decoder) -> u32 {
        let heads = self.layout.format().num_kv_heads();
        let most = decoder.instance().max_heads;
        let choices: Vec<u32> =
            [1, 2, 4].into_iter().filter(|&n| n <= most && heads.is_multiple_of(n)).collect();
        let asked = self.backend.heads_per_block.filter(|heads| choices.contains(heads));
        asked.unwrap_or(choices[self.layout.num_pages() as usize % choices.len()])
    }

    fn append_rows(&mut self, k: FloatSlice<'_>, v: FloatSlice<'_>, slots: &[i64]) -> Result<(), Error> {
        let views = self.views().map_err(failed)?;
        let layout = self.layout.clone();
        let input_type = k.float_type();
        let row = layout.format().row_elements() * input_type.bytes();
        let [k_rows, v_rows] = [(k, GAPS[0]), (v, GAPS[1])].map(|(x, gap)| {
            let mut rows = Vec::with_capacity(slots.len() * (row + gap * input_type.bytes()));
            for x in x.as_bytes().chunks_exact(row) {
                rows.extend_from_slice(x);
                rows.resize(rows.len() + gap * input_type.bytes(), super::POISON);
            }
            rows
        });
        let slot_bytes: &[u8] = bytemuck::cast_slice(slots);
        let Kit { cache_kernels, stream, step, report, .. } = self.kit();
        step.clear([k_rows.len(), v_rows.len(), slot_bytes.len()]).map_err(failed)?;
        let [k_at, v_at] = [("k", &k_rows), ("v", &v_rows)].map(|(name, rows)| step.input(name, rows));
        let slots_at = step.input("the slot mapping", slot_bytes);
        step.send(stream).map_err(failed)?;
        let elements = layout.format().row_elements();
        let args = AppendArgs {
            cache: CacheArgs { layout: &layout, buffers: &views, pages: None },
            k: step.view(&k_at),
            v: step.view(&v_at),
            k_token_stride: (elements + GAPS[0]) as u64,
            v_token_stride: (elements + GAPS[1]) as u64,
            slot_mapping: step.view(&slots_at),
            num_tokens: slots.len() as u32,
            input_type,
            error: report.view(),
        };
        cache_kernels.append(&args, stream).map_err(failed)?;
        launched("kv8_append");
        step.fetch(stream).map_err(failed)?;
        report.take(stream).map_err(|error| match kv_quant::check_append(&layout, k, v, slots) {
            Err(first) if matches!(error, DeviceError::Reported(_)) => first.into(),
            _ => failed(error),
        })
    }

    fn run(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        let NormalDecode { request, plan, q, out, lse } = step;
        let Input::Host(q) = q else { return Err(failed("host arrays only")) };
        let (mut out, mut lse) = (out, lse);
        let views = self.views().map_err(failed)?;
        let layout = self.layout.clone();
        let arithmetic = self.backend.arithmetic;
        let cache = CacheArgs { layout: &layout, buffers: &views, pages: None };
        let cache = cache.params().map_err(failed)?;
        let decoder = self.kit().kernels.decoder(&cache, request.spec, arithmetic).map_err(failed)?;
        let heads_per_block = self.heads_per_block(&decoder);
        let num_shares = plan.config().map_or(0, |config| decoder.num_shares(config));
        let wide = plan.config().is_some_and(|config| {
            decoder.takes_wide_blocks(config, plan.num_busy_workers(), request.spec.num_kv_heads)
        });
        // The second decode of a cache, and every other one after it.
        let replays = self.num_decodes % 2 == 1;
        self.num_decodes += 1;
        let Kit { stream, step: arena, report, .. } = self.kit();
        let arrays = Arrays::collect(arena, &request, plan, q).map_err(failed)?;
        arena.send(stream).map_err(failed)?;
        let args = DecodeArgs {
            spec: request.spec,
            cache: CacheArgs {
                layout: &layout,
                buffers: &views,
                pages: Some(PageTableArgs {
                    indices: arena.view(&arrays.pages),
                    rows: match (&arrays.row_starts, request.page_table.rows) {
                        (Some(starts), _) => PageRowsArgs::Starts(arena.view(starts)),
                        (None, PageRows::Stride(stride)) => PageRowsArgs::Stride(stride),
                        (None, PageRows::Starts(_)) => return Err(failed("row starts are always collected")),
                    },
                }),
            },
            batch: request.batch() as u32,
            q: arena.view(&arrays.q),
            out: arena.view(&arrays.out),
            lse: arrays.lse.as_ref().map(|lse| arena.view(lse)),
            kv_lens: arena.view(&arrays.kv_lens),
            plan: PlanArgs {
                items: arena.view(&arrays.items),
                worker_starts: arena.view(&arrays.worker_starts),
                request_partials: arena.view(&arrays.request_partials),
                num_workers: plan.num_busy_workers(),
                heads_per_block,
                wide,
                num_shares,
                // A graph that is to serve any plan always has stage 2.
                has_partials: replays || plan.num_partials() > 0,
            },
            // Every way: what was appended is there before a step is collected.
            ready: [Ready::History, Ready::Tables, Ready::Nothing][request.batch() % 3],
            partial_o: arena.view(&arrays.partial_o),
            partial_ml: arena.view(&arrays.partial_ml),
            alibi_slopes: arrays.alibi_slopes.as_ref().map(|slopes| arena.view(slopes)),
            sinks: arrays.sinks.as_ref().map(|sinks| arena.view(sinks)),
            error: report.view(),
        };
        if replays && args.batch > 0 {
            let graph = Graph::capture(stream, |stream| decoder.run(&args, stream)).map_err(failed)?;
            graph.launch(stream).map_err(failed)?;
            stream.synchronize().map_err(failed)?;
        } else {
            decoder.run(&args, stream).map_err(failed)?;
        }
        if args.batch > 0 {
            launched(decoder.symbol_for(&args.plan));
            if args.plan.num_shares > 0 {
                launched(SHARES);
            } else if args.plan.has_partials {
                launched("kv8_stage2");
            }
        }
        arena.fetch(stream).map_err(failed)?;
        // What was computed beside what is reported can be looked at.
        write(&mut out, arena.fetched(&arrays.out));
        if let (Some(lse), Some(place)) = (&mut lse, &arrays.lse) {
            write(lse, arena.fetched(place));
        }
        report.take(stream).map_err(failed)
    }
}

/// Takes an output over, but not what nobody wrote: the caller's sentinels stay there.
fn write(out: &mut Output<'_>, bytes: &[u8]) {
    let Output::Host(out) = out else { return };
    let element = out.float_type().bytes();
    for (to, from) in out.as_bytes_mut().chunks_exact_mut(element).zip(bytes.chunks_exact(element)) {
        if from.iter().any(|&byte| byte != super::POISON) {
            to.copy_from_slice(from);
        }
    }
}

/// The arrays of one decode.
struct Arrays {
    q: Place,
    kv_lens: Place,
    pages: Place,
    row_starts: Option<Place>,
    items: Place,
    worker_starts: Place,
    request_partials: Place,
    alibi_slopes: Option<Place>,
    sinks: Option<Place>,
    partial_o: Place,
    partial_ml: Place,
    out: Place,
    lse: Option<Place>,
}

impl Arrays {
    fn collect(
        arena: &mut Arena,
        request: &DecodeRequest<'_>,
        plan: &SplitPlan,
        q: FloatSlice<'_>,
    ) -> Result<Self, DeviceError> {
        let spec: &DecodeSpec = request.spec;
        let size =
            WorkspaceSize::of(spec, plan).map_err(|error| DeviceError::Launch { what: error.to_string() })?;
        let fields = |item: &attn_plan::WorkItem| {
            [item.request_idx, item.token_start, item.token_end, item.partial_idx]
        };
        let items: Vec<u32> = plan.items().iter().flat_map(fields).collect();
        let starts: &[u8] = match request.page_table.rows {
            PageRows::Starts(starts) => bytemuck::cast_slice(starts),
            PageRows::Stride(_) => &[],
        };
        let floats = |array: &Option<Vec<f32>>| {
            array.as_ref().map(|array| bytemuck::cast_slice::<f32, u8>(array).to_vec())
        };
        let (slopes, sinks) = (floats(&spec.alibi_slopes), floats(&spec.sinks));
        let batch = request.batch();
        let out_bytes = spec.q_elements(batch) * spec.out_type.bytes();
        let lse_bytes = spec.lse_elements(batch) * size_of::<f32>();
        let inputs: [&[u8]; 7] = [
            q.as_bytes(),
            bytemuck::cast_slice(request.kv_lens),
            bytemuck::cast_slice(request.page_table.pages),
            starts,
            bytemuck::cast_slice(&items),
            bytemuck::cast_slice(plan.worker_starts()),
            bytemuck::cast_slice(plan.request_partials()),
        ];
        let more = [slopes.as_ref().map_or(0, Vec::len), sinks.as_ref().map_or(0, Vec::len)];
        let written = [size.o_elements * 4, size.ml_elements * 4, out_bytes, lse_bytes];
        arena.clear(inputs.iter().map(|input| input.len()).chain(more).chain(written))?;
        let [q, lens, pages, starts, items, workers, partials] = inputs;
        Ok(Self {
            q: arena.input("q", q),
            kv_lens: arena.input("kv_lens", lens),
            pages: arena.input("the page table", pages),
            row_starts: match request.page_table.rows {
                PageRows::Starts(_) => Some(arena.input("row starts", starts)),
                PageRows::Stride(_) => None,
            },
            items: arena.input("items", items),
            worker_starts: arena.input("worker starts", workers),
            request_partials: arena.input("request partials", partials),
            alibi_slopes: slopes.map(|slopes| arena.input("slopes", &slopes)),
            sinks: sinks.map(|sinks| arena.input("sinks", &sinks)),
            partial_o: arena.scratch("partial_o", size.o_elements * 4),
            partial_ml: arena.scratch("partial_ml", size.ml_elements * 4),
            out: arena.output("out", out_bytes),
            lse: spec.want_lse.then(|| arena.output("lse", lse_bytes)),
        })
    }
}

impl Executor for GuardedExecutor {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        match (k, v) {
            (Input::Host(k), Input::Host(v)) => self.append_rows(k, v, slots),
            _ => Err(failed("host arrays only")),
        }
    }

    fn plan(&mut self, _: &DecodeRequest<'_>, _: &SplitPlan) -> Result<(), Error> {
        // Each decode brings its plan with it.
        Ok(())
    }

    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        self.run(step)
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        self.fetch_cache()?;
        let layout = self.layout.clone();
        let page_len = u64::from(layout.page_len());
        for copy in copies {
            for slot in 0..page_len {
                for id in PlaneId::ALL {
                    for head in 0..layout.format().num_kv_heads() {
                        let [from, to] = [copy.src, copy.dst].map(|page| {
                            let (buffer_idx, range) = layout.row_bytes(id, page * page_len + slot, head);
                            (buffer_idx, range.start as usize..range.end as usize)
                        });
                        let place = self.buffers[from.0].clone();
                        self.kit().cache.collected(&place).copy_within(from.1, to.1.start);
                    }
                }
            }
        }
        self.copies = Copies::HostIsNewer;
        Ok(())
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.fetch_cache()?;
        let place = self.buffers[buffer_idx].clone();
        bytes.copy_from_slice(&self.kit().cache.collected(&place)[offset as usize..][..bytes.len()]);
        Ok(())
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.fetch_cache()?;
        let place = self.buffers[buffer_idx].clone();
        self.kit().cache.collected(&place)[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        self.copies = Copies::HostIsNewer;
        Ok(())
    }
}
