//! An opened CUDA backend: the cache on the device, plans on their way there, launches.

use super::CudaBackend;
use super::errors::of_device;
use super::schedule::{cuda_chooser, cuda_tuner, explain_cuda, plan_args};
use super::transfer::{Download, Grow, Upload};
use crate::{BackendId, Descriptor, Error, Executor, Expect, Input, Memory, NormalDecode, Output, Stream};
use attn_kernels::DeviceView;
use attn_kernels::abi::Ready;
use attn_kernels::device::{
    AppendArgs, CacheArgs, CacheKernels, CudaDevice, DecodeArgs, Decoder, DeviceBuffer, DeviceError,
    ErrorReport, Kernels, PageRowsArgs, PageTableArgs, PlanArgs, Stream as CudaStream,
};
use attn_kernels::key;
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, SplitConfig, SplitPlan, SplitPolicy, WorkspaceSize};
use attn_tune::{Chooser, Level, RunKey, Tuner};
use kv_quant::{CacheLayout, LayoutKind, PageCopy, PlaneId};
use std::sync::Arc;

/// Arrays of one spec, on the device for good.
pub(super) struct SpecArrays {
    alibi_slopes: Option<DeviceBuffer>,
    sinks: Option<DeviceBuffer>,
    /// To tell the specs of a descriptor apart; `q_len` does not count.
    pub spec: DecodeSpec,
}

/// The kernels for a number of query rows of a kv head.
pub(super) struct Variant {
    num_rows: u32,
    pub(super) decoder: Decoder,
    pub chooser: Option<Chooser>,
}

/// The latest plan, on the device (or queued to be).
struct Planned {
    args: PlanArgs,
    kv_lens: DeviceView,
    pages: PageTableArgs,
    decoder: usize,
    arrays: usize,
}

pub(super) struct CudaExecutor {
    pub(super) layout: CacheLayout,
    arithmetic: key::Arithmetic,
    pub(super) device: CudaDevice,
    pub(super) stream: Arc<CudaStream>,
    kernels: Kernels,
    cache_kernels: CacheKernels,
    /// Keeps owned memory alive; the views below name it.
    _owned: Vec<DeviceBuffer>,
    buffers: Vec<DeviceView>,
    pub(super) arrays: Vec<SpecArrays>,
    pub(super) policy: SplitPolicy,
    /// Whose profiles choose schedules; none until a session asks for that.
    tuner: Option<Tuner>,
    pub(super) variants: Vec<Variant>,
    /// Whether the caller has promised [`Ready::History`].
    is_history_ready: bool,
    planned: Option<Planned>,
    plan_upload: Upload,
    inputs: Upload,
    out: Download,
    lse: Download,
    partial_o: Grow,
    partial_ml: Grow,
    pub(super) report: ErrorReport,
}

impl CudaExecutor {
    pub(super) fn open(
        backend: CudaBackend,
        descriptor: &Descriptor,
        memory: Memory<'_>,
        stream: Option<Stream>,
    ) -> Result<Self, DeviceError> {
        let device = CudaDevice::open(backend.ordinal)?;
        let stream = match stream {
            None => Arc::new(CudaStream::new(&device)?),
            Some(stream) => stream.downcast::<CudaStream>().ok_or_else(|| DeviceError::Launch {
                what: "the session's stream is no attn_kernels::device::Stream".to_owned(),
            })?,
        };
        let kernels = Kernels::embedded(&device)?;
        let layout = descriptor.layout.clone();
        let mut owned = Vec::new();
        let buffers = match memory {
            Memory::Device(views) => views,
            _ => {
                for &bytes in layout.buffer_bytes() {
                    owned.push(device.alloc_zeroed(usize::try_from(bytes).unwrap_or(usize::MAX))?);
                }
                owned.iter().map(DeviceBuffer::view).collect()
            }
        };
        let mut arrays = Vec::new();
        for spec in descriptor.specs() {
            let upload =
                |array: &Option<Vec<f32>>| array.as_ref().map(|array| device.upload(array)).transpose();
            arrays.push(SpecArrays {
                alibi_slopes: upload(&spec.alibi_slopes)?,
                sinks: upload(&spec.sinks)?,
                spec: spec.clone(),
            });
        }
        let mut executor = Self {
            cache_kernels: kernels.cache_kernels()?,
            plan_upload: Upload::new(&device)?,
            inputs: Upload::new(&device)?,
            out: Download::new(&device)?,
            lse: Download::new(&device)?,
            partial_o: Grow::new(&device)?,
            partial_ml: Grow::new(&device)?,
            report: ErrorReport::new(&device)?,
            planned: None,
            policy: descriptor.split,
            tuner: None,
            variants: Vec::new(),
            is_history_ready: false,
            _owned: owned,
            arithmetic: backend.arithmetic,
            layout,
            device,
            stream,
            kernels,
            buffers,
            arrays,
        };
        for spec in descriptor.specs() {
            executor.decoder(spec)?;
        }
        Ok(executor)
    }

    /// Renews the look-ups of all kernels that are loaded.
    fn choose_by(&mut self, tuner: &Tuner) {
        for Variant { decoder, chooser, num_rows } in &mut self.variants {
            let of_spec = |arrays: &&SpecArrays| arrays.spec.gqa_group() * arrays.spec.q_len == *num_rows;
            *chooser = self
                .arrays
                .iter()
                .find(of_spec)
                .map(|arrays| cuda_chooser(tuner, &self.layout, &arrays.spec, self.policy, decoder));
        }
    }

    /// The kernels for a spec, chosen and loaded on first use.
    pub(super) fn decoder(&mut self, spec: &DecodeSpec) -> Result<usize, DeviceError> {
        let num_rows = spec.gqa_group() * spec.q_len;
        if let Some(found) = self.variants.iter().position(|variant| variant.num_rows == num_rows) {
            return Ok(found);
        }
        let cache = CacheArgs { layout: &self.layout, buffers: &self.buffers, pages: None }.params()?;
        let decoder = self.kernels.decoder(&cache, spec, self.arithmetic)?;
        let choose = |tuner: &Tuner| cuda_chooser(tuner, &self.layout, spec, self.policy, &decoder);
        let chooser = self.tuner.as_ref().map(choose);
        self.variants.push(Variant { num_rows, decoder, chooser });
        Ok(self.variants.len() - 1)
    }

    fn append_to_slots(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), DeviceError> {
        let Self { layout, buffers, stream, inputs, report, cache_kernels, .. } = self;
        let input_type = k.float_type();
        let slot_bytes: &[u8] = bytemuck::cast_slice(slots);
        let is_host = matches!(k, Input::Host(_));
        let host = |input: &Input<'_>| match input {
            Input::Host(slice) => slice.len() * input_type.bytes(),
            Input::Device(_) => 0,
        };
        inputs.begin(&[slot_bytes.len(), host(&k), host(&v)], stream)?;
        let slot_mapping = inputs.put(slot_bytes);
        let mut place = |input: Input<'_>| match input {
            Input::Host(slice) => inputs.put(slice.as_bytes()),
            Input::Device(slice) => slice.view(),
        };
        let (k, v) = (place(k), place(v));
        inputs.send(stream)?;
        let row = layout.format().row_elements() as u64;
        let args = AppendArgs {
            cache: CacheArgs { layout, buffers, pages: None },
            k,
            v,
            k_token_stride: row,
            v_token_stride: row,
            slot_mapping,
            num_tokens: u32::try_from(slots.len()).map_err(|_| DeviceError::Launch {
                what: format!("{} tokens are too many for one append", slots.len()),
            })?,
            input_type,
            error: report.view(),
        };
        cache_kernels.append(&args, stream)?;
        if is_host { report.take(stream) } else { Ok(()) }
    }

    pub(super) fn upload_plan(
        &mut self,
        request: &DecodeRequest<'_>,
        plan: &SplitPlan,
    ) -> Result<(), DeviceError> {
        self.planned = None;
        let decoder = self.decoder(request.spec)?;
        let shares = |variant: &Variant| plan.config().map_or(0, |config| variant.decoder.num_shares(config));
        let num_shares = self.variants.get(decoder).map_or(0, shares);
        let same = |arrays: &SpecArrays| {
            arrays.spec.alibi_slopes == request.spec.alibi_slopes && arrays.spec.sinks == request.spec.sinks
        };
        let arrays = self.arrays.iter().position(same).unwrap_or(0);
        // Shares are merged where they are made.
        let num_partials = if num_shares > 0 { 0 } else { plan.num_partials() };
        let size = WorkspaceSize::for_partials(request.spec, u64::from(num_partials))
            .map_err(|error| DeviceError::Launch { what: error.to_string() })?;
        let stream = &self.stream;
        self.partial_o.at_least(size.o_elements * size_of::<f32>(), stream)?;
        self.partial_ml.at_least(size.ml_elements * size_of::<f32>(), stream)?;

        let (lens, pages): (&[u8], &[u8]) =
            (bytemuck::cast_slice(request.kv_lens), bytemuck::cast_slice(request.page_table.pages));
        let workers: &[u8] = bytemuck::cast_slice(plan.worker_starts());
        let partials: &[u8] = bytemuck::cast_slice(plan.request_partials());
        let item_bytes = size_of_val(plan.items());
        let start_bytes = match request.page_table.rows {
            PageRows::Starts(starts) => size_of_val(starts),
            PageRows::Stride(_) => 0,
        };
        let sizes = [item_bytes, lens.len(), pages.len(), start_bytes, workers.len(), partials.len()];
        let upload = &mut self.plan_upload;
        upload.begin(&sizes, stream)?;
        let items = upload.put_with(item_bytes, |to| {
            for (to, item) in to.chunks_exact_mut(16).zip(plan.items()) {
                let fields = [item.request_idx, item.token_start, item.token_end, item.partial_idx];
                to.copy_from_slice(bytemuck::cast_slice(&fields));
            }
        });
        let (kv_lens, indices) = (upload.put(lens), upload.put(pages));
        let rows = match request.page_table.rows {
            PageRows::Starts(starts) => PageRowsArgs::Starts(upload.put(bytemuck::cast_slice(starts))),
            PageRows::Stride(stride) => PageRowsArgs::Stride(stride),
        };
        let (worker_starts, request_partials) = (upload.put(workers), upload.put(partials));
        upload.send(stream)?;
        let no_kernels = || DeviceError::Launch { what: "there are no kernels for the plan".to_owned() };
        let Variant { decoder: kernels, .. } = self.variants.get(decoder).ok_or_else(no_kernels)?;
        let args = plan_args(kernels, request.spec, plan, [items, worker_starts, request_partials]);
        self.planned =
            Some(Planned { args, kv_lens, pages: PageTableArgs { indices, rows }, decoder, arrays });
        Ok(())
    }

    fn run(&mut self, step: NormalDecode<'_>) -> Result<(), DeviceError> {
        let stream = Arc::clone(&self.stream);
        let NormalDecode { request, q, mut out, mut lse, .. } = step;
        let q = match q {
            Input::Device(slice) => slice.view(),
            Input::Host(slice) => {
                self.inputs.begin(&[slice.as_bytes().len()], &stream)?;
                let view = self.inputs.put(slice.as_bytes());
                self.inputs.send(&stream)?;
                view
            }
        };
        let bytes = |output: &Output<'_>| output.len() as usize * output.float_type().bytes();
        let place = |output: &Output<'_>, download: &mut Download| match output {
            Output::Device(slice) => Ok(slice.view()),
            Output::Host(_) => download.begin(bytes(output), &stream),
        };
        let out_view = place(&out, &mut self.out)?;
        let lse_view = lse.as_ref().map(|lse| place(lse, &mut self.lse)).transpose()?;
        self.launch(&request, q, out_view, lse_view)?;
        let Output::Host(out) = &mut out else { return Ok(()) };
        let out = out.as_bytes_mut();
        self.out.queue(out.len(), &stream)?;
        let lse = match &mut lse {
            Some(Output::Host(lse)) => lse.as_bytes_mut(),
            _ => &mut [],
        };
        self.lse.queue(lse.len(), &stream)?;
        self.report.take(&stream)?;
        out.copy_from_slice(self.out.bytes(out.len()));
        lse.copy_from_slice(self.lse.bytes(lse.len()));
        Ok(())
    }

    /// Queues the planned step on arrays of the device.
    pub(super) fn launch(
        &self,
        request: &DecodeRequest<'_>,
        q: DeviceView,
        out: DeviceView,
        lse: Option<DeviceView>,
    ) -> Result<(), DeviceError> {
        let no_plan = || DeviceError::Launch { what: "there is no plan".to_owned() };
        let planned = self.planned.as_ref().ok_or_else(no_plan)?;
        let Variant { decoder, .. } = self.variants.get(planned.decoder).ok_or_else(no_plan)?;
        let arrays = self.arrays.get(planned.arrays).ok_or_else(no_plan)?;
        let args = DecodeArgs {
            spec: request.spec,
            cache: CacheArgs { layout: &self.layout, buffers: &self.buffers, pages: Some(planned.pages) },
            batch: request.batch() as u32,
            q,
            out,
            lse,
            kv_lens: planned.kv_lens,
            plan: planned.args,
            // Lengths, pages and plan came from the host.
            ready: if self.is_history_ready { Ready::History } else { Ready::Tables },
            partial_o: self.partial_o.view(),
            partial_ml: self.partial_ml.view(),
            alibi_slopes: arrays.alibi_slopes.as_ref().map(DeviceBuffer::view),
            sinks: arrays.sinks.as_ref().map(DeviceBuffer::view),
            error: self.report.view(),
        };
        decoder.run(&args, &self.stream)
    }

    fn copy(&self, copy: &PageCopy) -> Result<(), DeviceError> {
        let part = |buffer_idx: usize, range: std::ops::Range<u64>| {
            let buffer = self.buffers.get(buffer_idx).copied();
            buffer.and_then(|buffer| buffer.slice(range.start, range.end - range.start)).ok_or_else(|| {
                DeviceError::Launch { what: format!("page bytes {range:?} are outside buffer {buffer_idx}") }
            })
        };
        let layout = &self.layout;
        if layout.kind() != LayoutKind::Custom {
            // A page of a named layout is one stretch of each buffer.
            let num_pages = layout.num_pages();
            for (buffer_idx, bytes) in layout.buffer_bytes().iter().enumerate() {
                let page = bytes / num_pages;
                let [from, to] = [copy.src, copy.dst].map(|index| index * page..(index + 1) * page);
                self.stream.copy(part(buffer_idx, from)?, part(buffer_idx, to)?)?;
            }
            return Ok(());
        }
        let page_len = u64::from(layout.page_len());
        for id in PlaneId::ALL {
            for slot in 0..page_len {
                for head in 0..layout.format().num_kv_heads() {
                    let [from, to] = [copy.src, copy.dst].map(|page| {
                        let (buffer_idx, range) = layout.row_bytes(id, page * page_len + slot, head);
                        part(buffer_idx, range)
                    });
                    self.stream.copy(from?, to?)?;
                }
            }
        }
        Ok(())
    }

    fn buffer(&self, buffer_idx: usize) -> Result<DeviceView, Error> {
        let missing = || Error::Device {
            backend: BackendId::CUDA,
            what: format!("there is no buffer {buffer_idx}"),
            is_lost: false,
        };
        self.buffers.get(buffer_idx).copied().ok_or_else(missing)
    }
}

impl Executor for CudaExecutor {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        self.append_to_slots(k, v, slots).map_err(|error| {
            // The device reports one of several bad values, whichever came first; on the host the first can be told.
            if let (DeviceError::Reported(_), Input::Host(k), Input::Host(v)) = (&error, k, v)
                && let Err(first) = kv_quant::check_append(&self.layout, k, v, slots)
            {
                return first.into();
            }
            of_device(error, &self.layout)
        })
    }

    fn promise_history(&mut self) {
        self.is_history_ready = true;
    }

    fn tune(&mut self, level: Level, expect: Option<&Expect>) -> Result<(), Error> {
        let mut tuner = cuda_tuner(self.device.facts(), level);
        self.choose_by(&tuner);
        if level.measures()
            && let Some(expect) = expect
        {
            let measured = self.warm_up(&mut tuner, expect);
            measured.map_err(|error| of_device(error, &self.layout))?;
            self.choose_by(&tuner);
        }
        self.tuner = Some(tuner);
        Ok(())
    }

    fn split_config(&mut self, spec: &DecodeSpec, kv_lens: &[u32]) -> Option<SplitConfig> {
        let variant = self.decoder(spec).ok()?;
        let chooser = self.variants.get(variant)?.chooser.as_ref()?;
        let decision = chooser.choose(&RunKey::of_step(spec, kv_lens));
        let split = decision.choice.split(self.policy, spec.num_kv_heads, chooser.shape().row_blocks);
        Some(self.variants.get(variant)?.decoder.deal(split, spec.num_kv_heads))
    }

    fn explain_split(&mut self, spec: &DecodeSpec, kv_lens: &[u32]) -> Option<String> {
        let variant = self.decoder(spec).ok()?;
        let Variant { decoder, chooser, .. } = self.variants.get(variant)?;
        let chooser = chooser.as_ref()?;
        let decision = chooser.choose(&RunKey::of_step(spec, kv_lens));
        let (step, any) = ((spec, kv_lens), self.report.view());
        explain_cuda(decoder, chooser, &decision, self.policy, step, any).ok()
    }

    fn plan(&mut self, request: &DecodeRequest<'_>, plan: &SplitPlan) -> Result<(), Error> {
        self.upload_plan(request, plan).map_err(|error| of_device(error, &self.layout))
    }

    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        self.run(step).map_err(|error| of_device(error, &self.layout))
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        copies.iter().try_for_each(|copy| self.copy(copy)).map_err(|error| of_device(error, &self.layout))
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.synchronize()?;
        let read = self.device.read_view(self.buffer(buffer_idx)?, offset, bytes);
        read.map_err(|error| of_device(error, &self.layout))
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.synchronize()?;
        let written = self.device.write_view(self.buffer(buffer_idx)?, offset, bytes);
        written.map_err(|error| of_device(error, &self.layout))
    }

    fn synchronize(&mut self) -> Result<(), Error> {
        self.report.take(&self.stream).map_err(|error| of_device(error, &self.layout))
    }
}

impl Drop for CudaExecutor {
    /// Staging and workspace may not be freed under work that is still queued on the caller's stream.
    fn drop(&mut self) {
        // A lost device has nothing queued.
        let _ = self.stream.synchronize();
    }
}
