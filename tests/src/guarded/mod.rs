//! The kernels themselves, launched without the backend around them: every array between canaries, inputs that nobody
//! may write, workspace and outputs full of poison before each launch, every block shape, and the second decode of a
//! cache replayed from a captured graph. Reuses its memory, so that there can be many cases.

mod arena;
mod executor;

pub use arena::{Arena, POISON, Place};

use attn_backend::{
    Backend, BackendId, Capability, CudaBackend, Descriptor, Device, Error, Executor, Memory, MemoryKind,
    Missing, Refusal, Stream,
};
use attn_kernels::device::{CudaDevice, DeviceError, Kernels};
use attn_kernels::key::Arithmetic;
use attn_plan::{DecodeSpec, SplitConfig, SplitPlan};
use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock, PoisonError};

use executor::{GuardedExecutor, Kit};

/// The kernels between canaries.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guarded {
    /// Which variants.
    pub arithmetic: Arithmetic,
    /// kv heads of a block; `None`: another number for each cache.
    pub heads_per_block: Option<u32>,
}

/// Stands among the symbols once a launch was in shares.
pub const SHARES: &str = "shares";

/// Symbols of the kernels that were launched between canaries.
static LAUNCHED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn launched(symbol: &str) {
    let mut launched = LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner);
    if !launched.contains(symbol) {
        launched.insert(symbol.to_owned());
    }
}

/// The kernels that this process has launched between canaries, so far.
pub fn launches() -> BTreeSet<String> {
    LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Kits that no executor uses at the moment.
static IDLE: Mutex<Vec<Kit>> = Mutex::new(Vec::new());

/// The first device with the embedded kernels, opened once: code and context stay while caches come and go.
pub fn kernels() -> Result<&'static Kernels, DeviceError> {
    static KERNELS: OnceLock<Result<Kernels, DeviceError>> = OnceLock::new();
    KERNELS.get_or_init(|| Kernels::embedded(&CudaDevice::open(0)?)).as_ref().map_err(Clone::clone)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Device { backend: BackendId::named("cuda-guarded"), what: error.to_string(), is_lost: false }
}

impl Guarded {
    fn plain(self) -> CudaBackend {
        CudaBackend { arithmetic: self.arithmetic, ..CudaBackend::default() }
    }
}

impl Backend for Guarded {
    fn id(&self) -> BackendId {
        match self.arithmetic {
            Arithmetic::Mma => BackendId::named("cuda-guarded"),
            Arithmetic::F32 => BackendId::named("cuda-guarded-f32"),
        }
    }

    fn probe(&self) -> Result<Device, Refusal> {
        self.plain().probe()
    }

    fn capability(&self) -> Capability {
        Capability { memory: vec![MemoryKind::Owned], device_arrays: false, ..self.plain().capability() }
    }

    fn missing(&self, descriptor: &Descriptor) -> Vec<Missing> {
        self.plain().missing(descriptor)
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        1
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        self.plain().split_config(descriptor)
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> cpu_reference::Arithmetic {
        self.plain().arithmetic(spec, plan)
    }

    fn variant(&self, descriptor: &Descriptor) -> Option<String> {
        self.plain().variant(descriptor)
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        _: Memory<'a>,
        _: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let kit = idle.map_or_else(|| Kit::new(kernels()?), Ok).map_err(failed)?;
        Ok(Box::new(GuardedExecutor::new(kit, descriptor, *self).map_err(failed)?))
    }
}
