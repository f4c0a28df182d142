//! The CPU backend, counting what it is asked to do.

use attn_backend::{
    Backend, BackendId, Capability, CpuBackend, Descriptor, Device, Error, Executor, Input, Memory,
    NormalDecode, Refusal, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, SplitConfig, SplitPlan};
use cpu_reference::Arithmetic;
use kv_quant::PageCopy;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A backend that counts its launches.
#[derive(Clone, Debug, Default)]
pub struct CountingBackend {
    /// Decodes started, and appends, copies and writes that went through.
    pub launches: Arc<AtomicU64>,
    /// Whether it offers sliding windows and batch invariance.
    pub is_narrow: bool,
}

struct CountingExecutor<'a> {
    launches: Arc<AtomicU64>,
    inner: Box<dyn Executor + 'a>,
}

impl Backend for CountingBackend {
    fn id(&self) -> BackendId {
        BackendId::named("counting")
    }

    fn probe(&self) -> Result<Device, Refusal> {
        CpuBackend.probe()
    }

    fn capability(&self) -> Capability {
        let offered = !self.is_narrow;
        Capability { window: offered, batch_invariant: offered, ..CpuBackend.capability() }
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        1
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        SplitConfig { tile_len: 4, ..CpuBackend.split_config(descriptor) }
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        CpuBackend.arithmetic(spec, plan)
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        memory: Memory<'a>,
        stream: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        let inner = CpuBackend.open(descriptor, memory, stream)?;
        Ok(Box::new(CountingExecutor { launches: Arc::clone(&self.launches), inner }))
    }
}

impl CountingExecutor<'_> {
    fn count(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }
}

impl Executor for CountingExecutor<'_> {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        // Non-finite values are found by the quantizer itself; it counts if it wrote.
        self.inner.append(k, v, slots)?;
        self.count();
        Ok(())
    }

    fn plan(&mut self, request: &DecodeRequest<'_>, plan: &SplitPlan) -> Result<(), Error> {
        self.count();
        self.inner.plan(request, plan)
    }

    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        self.count();
        self.inner.normal_decode(step)
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        self.count();
        self.inner.copy_pages(copies)
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.inner.read_bytes(buffer_idx, offset, bytes)
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.count();
        self.inner.write_bytes(buffer_idx, offset, bytes)
    }
}
