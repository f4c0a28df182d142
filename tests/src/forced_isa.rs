//! The CPU backend on one instruction set, whatever the machine prefers: each is a backend of its own to the suite.

use attn_backend::{
    Backend, BackendId, Capability, CpuBackend, Descriptor, Device, Error, Executor, Input, Memory,
    NormalDecode, Output, Refusal, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, SplitConfig, SplitPlan};
use cpu_reference::{Arithmetic, DotProduct, Isa, Workspace};
use kv_quant::{CacheBuffers, CacheLayout, FloatSliceMut, PageCopy};

/// The CPU backend, held to one instruction set and one way to compute q.k.
#[derive(Clone, Copy, Debug)]
pub struct ForcedIsa {
    /// Which instruction set.
    pub isa: Isa,
    /// How q.k is computed.
    pub dot: DotProduct,
}

struct IsaExecutor {
    isa: Isa,
    layout: CacheLayout,
    cache: CacheBuffers,
    workspace: Workspace,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Device { backend: BackendId::CPU, what: error.to_string(), is_lost: false }
}

impl Backend for ForcedIsa {
    fn id(&self) -> BackendId {
        match self.dot {
            DotProduct::F32 => BackendId::named(format!("cpu-{}", self.isa)),
            _ => BackendId::named(format!("cpu-{}-int8", self.isa)),
        }
    }

    fn probe(&self) -> Result<Device, Refusal> {
        if self.isa.is_available() {
            return CpuBackend.probe();
        }
        Err(Refusal::Unavailable { reason: format!("this CPU has no {}", self.isa) })
    }

    fn capability(&self) -> Capability {
        // The memory that this wrapper handles is its own.
        Capability::everything()
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        1
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        CpuBackend.split_config(descriptor)
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        match self.dot {
            DotProduct::F32 => CpuBackend.arithmetic(spec, plan),
            _ => Arithmetic::host_int8(spec, plan),
        }
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        _: Memory<'a>,
        _: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        let layout = descriptor.layout.clone();
        let cache = CacheBuffers::zeroed(&layout)?;
        let workspace = Workspace::for_isa(self.isa).map_err(failed)?.with_dot(self.dot);
        Ok(Box::new(IsaExecutor { isa: self.isa, layout, cache, workspace }))
    }
}

impl Executor for IsaExecutor {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        let (Input::Host(k), Input::Host(v)) = (k, v) else { return Err(failed("host memory only")) };
        match cpu_reference::append_on(self.isa, &self.layout, &mut self.cache.view_mut(), k, v, slots) {
            // What a session must see is the cache's own error.
            Err(cpu_reference::Error::Cache(error)) => Err(error.into()),
            other => other.map_err(failed),
        }
    }

    fn plan(&mut self, _: &DecodeRequest<'_>, _: &SplitPlan) -> Result<(), Error> {
        Ok(())
    }

    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        let (Input::Host(q), Output::Host(out)) = (step.q, step.out) else {
            return Err(failed("host memory only"));
        };
        let lse = match step.lse {
            Some(Output::Host(FloatSliceMut::F32(lse))) => Some(lse),
            _ => None,
        };
        let (cache, workspace) = (self.cache.view(), &mut self.workspace);
        cpu_reference::decode(&self.layout, cache, &step.request, step.plan, q, out, lse, workspace)
            .map_err(failed)
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        for copy in copies {
            self.cache.copy_page(&self.layout, copy.src, copy.dst)?;
        }
        Ok(())
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        bytes.copy_from_slice(self.cache.view().bytes(buffer_idx, offset..offset + bytes.len() as u64));
        Ok(())
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let end = offset + bytes.len() as u64;
        self.cache.view_mut().bytes_mut(buffer_idx, offset..end).copy_from_slice(bytes);
        Ok(())
    }
}
