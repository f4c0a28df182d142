//! Backends, selection and sessions of decode attention over an INT8 KV cache: the crate that users depend on.
#![forbid(unsafe_code)]

mod backend;
mod backends;
mod capability;
mod descriptor;
mod error;
mod key;
mod memory;
pub mod normal_decode;
mod registry;
mod select;
mod select_error;
mod session;
pub mod trial;
mod validate;

pub use attn_kernels::DeviceView;
pub use backend::{Backend, Device, Executor, Isolation, NormalDecode};
#[cfg(feature = "cuda")]
pub use backends::CudaBackend;
pub use backends::{CpuBackend, cpu_split_config};
pub use capability::{Capability, Missing, Refusal};
pub use descriptor::Descriptor;
pub use error::{Array, Error};
pub use key::{BackendId, FormatKey, Operation, OperationKey};
pub use memory::{DeviceSlice, Input, Memory, MemoryKind, Output, Stream};
pub use registry::Registry;
pub use select::{
    BACKEND_VARIABLE, Fallback, NamedBy, OverridePolicy, SelectOptions, Selection, TrialMode, select,
};
pub use select_error::SelectError;
pub use session::{Expect, Session, SessionOptions};
pub use trial::{Evidence, TrialFailure};
