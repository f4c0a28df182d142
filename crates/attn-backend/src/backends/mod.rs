//! The adapters of this build, one file a backend.

mod cpu;

pub use cpu::{CpuBackend, cpu_split_config};

use crate::{BackendId, FormatKey, Operation, OperationKey, Registry};
use std::sync::Arc;

/// Backends of this project that other features bring: name and feature.
pub(crate) const BEHIND_FEATURES: &[(BackendId, &str)] =
    if cfg!(feature = "cuda") { &[] } else { &[(BackendId::CUDA, "cuda")] };

pub(crate) fn builtin() -> Registry {
    let mut registry = Registry::empty();
    for format in [FormatKey::INT8_GROUP, FormatKey::UNQUANTIZED] {
        let key = OperationKey { format, operation: Operation::NormalDecode };
        registry.register(key, Arc::new(CpuBackend));
    }
    registry
}
