//! The CPU: host memory, owned or the caller's, and rayon's current pool. Adapter of `cpu_reference`.

use crate::{
    Backend, BackendId, Capability, Descriptor, Device, Error, Executor, Input, Memory, MemoryKind,
    NormalDecode, Output, Refusal, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, SplitConfig, SplitPlan, SplitPolicy};
use cpu_reference::{Arithmetic, DotProduct, Isa, Machine, Workspace};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, CacheView, CacheViewMut, FloatSliceMut, PageCopy};

/// Decode on the host, in place over int8.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuBackend;

/// How steps over a cache of `format` are cut for `num_threads` threads of this machine: see [`Machine::split_config`].
///
/// ```
/// use attn_plan::SplitPolicy;
/// use kv_quant::{CacheFormat, ScaleType};
/// let format = CacheFormat::new(8, 64, 64, 64, ScaleType::F16)?;
/// let split = attn_backend::cpu_split_config(&format, 8, SplitPolicy::BatchInvariant { split_len: 96 });
/// assert_eq!((split.num_workers, split.tile_len), (16, 32));
/// # Ok::<(), kv_quant::Error>(())
/// ```
pub fn cpu_split_config(format: &CacheFormat, num_threads: u32, policy: SplitPolicy) -> SplitConfig {
    Machine { num_threads, ..Machine::here() }.split_config(format, policy)
}

impl Backend for CpuBackend {
    fn id(&self) -> BackendId {
        BackendId::CPU
    }

    fn probe(&self) -> Result<Device, Refusal> {
        let threads = Machine::here().num_threads;
        let isa = Isa::from_env().map_err(|error| Refusal::Unavailable { reason: error.to_string() })?;
        Ok(Device {
            name: format!("{} {isa}, {threads} threads", std::env::consts::ARCH),
            driver: String::new(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    fn capability(&self) -> Capability {
        let memory = vec![MemoryKind::Owned, MemoryKind::Host, MemoryKind::HostReadOnly];
        Capability { memory, ..Capability::everything() }
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        10
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        Machine::here().split_config(descriptor.layout.format(), descriptor.split)
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        Arithmetic::host(spec, plan)
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        memory: Memory<'a>,
        _: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        open(DotProduct::F32, descriptor, memory)
    }
}

/// The same with q.k in integers, for callers who register it: the query is rounded to 8 bits, each 32 channels on a scale of
/// their own, in exchange for a step that is a few per cent faster on some CPUs (`docs/cpu-performance.md`).
/// [`Backend::arithmetic`] has the larger error, so that trials and tests hold it to no less than it promises.
///
/// It is a permission, not an order: where `head_dim` is no multiple of 64 or K has other groups than multiples of 32, q.k is
/// computed in f32, which that error covers ([`DotProduct::Int8`]). It is in no registry by itself: nobody gets a coarser
/// result than asked for by way of a fallback.
///
/// ```
/// use attn_backend::*;
/// use attn_plan::DecodeSpec;
/// use kv_quant::{CacheFormat, CacheLayout, ScaleType};
/// use std::sync::Arc;
/// let mut registry = Registry::builtin();
/// let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
/// registry.register(key, Arc::new(CpuInt8Backend));
/// let layout = CacheLayout::native(CacheFormat::new(2, 64, 32, 32, ScaleType::F16)?, 8, 16)?;
/// let descriptor = Descriptor::new(layout, DecodeSpec::new(4, 2, 64));
/// let selection = select(&registry, &descriptor, &SelectOptions::named(BackendId::CPU_INT8))?;
/// let session = Session::open(&selection, SessionOptions::default())?;
/// assert_eq!(*session.backend(), BackendId::CPU_INT8);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuInt8Backend;

impl Backend for CpuInt8Backend {
    fn id(&self) -> BackendId {
        BackendId::CPU_INT8
    }

    fn probe(&self) -> Result<Device, Refusal> {
        CpuBackend.probe()
    }

    fn capability(&self) -> Capability {
        CpuBackend.capability()
    }

    fn rank(&self, descriptor: &Descriptor) -> u32 {
        CpuBackend.rank(descriptor) - 1
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        CpuBackend.split_config(descriptor)
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        Arithmetic::host_int8(spec, plan)
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        memory: Memory<'a>,
        _: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        open(DotProduct::Int8, descriptor, memory)
    }
}

fn open<'a>(
    dot: DotProduct,
    descriptor: &Descriptor,
    memory: Memory<'a>,
) -> Result<Box<dyn Executor + 'a>, Error> {
    let layout = descriptor.layout.clone();
    let cache = match memory {
        Memory::Owned => Cache::Owned(CacheBuffers::zeroed(&layout)?),
        Memory::Host(view) => Cache::Borrowed(view),
        Memory::HostReadOnly(view) => Cache::ReadOnly(view),
        Memory::Device(_) => return Err(host_only(crate::Array::Cache(0))),
    };
    Ok(Box::new(CpuExecutor { layout, cache, workspace: Workspace::new().with_dot(dot) }))
}

fn host_only(array: crate::Array) -> Error {
    Error::HostOnly { array, backend: BackendId::CPU }
}

enum Cache<'a> {
    Owned(CacheBuffers),
    Borrowed(CacheViewMut<'a>),
    ReadOnly(CacheView<'a>),
}

impl Cache<'_> {
    fn view(&self) -> CacheView<'_> {
        match self {
            Cache::Owned(buffers) => buffers.view(),
            Cache::Borrowed(view) => view.as_view(),
            Cache::ReadOnly(view) => *view,
        }
    }

    fn write(&mut self, f: impl FnOnce(&mut CacheViewMut<'_>) -> Result<(), Error>) -> Result<(), Error> {
        match self {
            Cache::Owned(buffers) => f(&mut buffers.view_mut()),
            Cache::Borrowed(view) => f(view),
            Cache::ReadOnly(_) => Err(Error::ReadOnly),
        }
    }
}

struct CpuExecutor<'a> {
    layout: CacheLayout,
    cache: Cache<'a>,
    workspace: Workspace,
}

impl Executor for CpuExecutor<'_> {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        let (Input::Host(k), Input::Host(v)) = (k, v) else { return Err(host_only(crate::Array::K)) };
        let layout = &self.layout;
        self.cache.write(|cache| Ok(cpu_reference::append(layout, cache, k, v, slots)?))
    }

    fn plan(&mut self, _: &DecodeRequest<'_>, _: &SplitPlan) -> Result<(), Error> {
        Ok(())
    }

    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        let (Input::Host(q), Output::Host(out)) = (step.q, step.out) else {
            return Err(host_only(crate::Array::Q));
        };
        let lse = match step.lse {
            None => None,
            Some(Output::Host(FloatSliceMut::F32(lse))) => Some(lse),
            Some(_) => return Err(host_only(crate::Array::Lse)),
        };
        let cache = self.cache.view();
        let workspace = &mut self.workspace;
        cpu_reference::decode(&self.layout, cache, &step.request, step.plan, q, out, lse, workspace).map_err(
            |error| Error::Device { backend: BackendId::CPU, what: error.to_string(), is_lost: false },
        )
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        let layout = &self.layout;
        self.cache.write(|cache| {
            copies.iter().try_for_each(|copy| Ok(cache.copy_page(layout, copy.src, copy.dst)?))
        })
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        bytes.copy_from_slice(self.cache.view().bytes(buffer_idx, offset..offset + bytes.len() as u64));
        Ok(())
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.cache.write(|cache| {
            cache.bytes_mut(buffer_idx, offset..offset + bytes.len() as u64).copy_from_slice(bytes);
            Ok(())
        })
    }
}
