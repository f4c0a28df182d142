//! The adapters of this build, one file a backend.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

pub use cpu::{CpuBackend, CpuInt8Backend, cpu_split_config};
#[cfg(feature = "cuda")]
pub use cuda::{CudaBackend, cuda_chooser, cuda_tuner, explain_cuda};

use crate::{BackendId, FormatKey, Operation, OperationKey, Registry};
use std::sync::Arc;

/// Backends of this project that other features bring: name and feature.
pub(crate) const BEHIND_FEATURES: &[(BackendId, &str)] =
    if cfg!(feature = "cuda") { &[] } else { &[(BackendId::CUDA, "cuda")] };

pub(crate) fn builtin() -> Registry {
    let mut registry = Registry::empty();
    let key = |format| OperationKey { format, operation: Operation::NormalDecode };
    #[cfg(feature = "cuda")]
    registry.register(key(FormatKey::INT8_GROUP), Arc::new(CudaBackend::default()));
    registry.register(key(FormatKey::INT8_GROUP), Arc::new(CpuBackend));
    registry.register(key(FormatKey::UNQUANTIZED), Arc::new(CpuBackend));
    registry
}
