//! Backends, selection and sessions of decode attention over an INT8 KV cache: the crate that users depend on.
//!
//! A [`Descriptor`] says what is asked: cache layout, shapes, masks, types. [`select()`] looks it up in a [`Registry`],
//! filters the candidates by [`Capability`], tries the best of them for real ([`trial`]) and answers with a
//! [`Selection`]: the chosen backend, and for each other one the [`Refusal`]. A [`Session`] opened from it owns the
//! cache, the workspace and the backend: `append`, `plan`, `decode`. [`normal_decode::open`] does both at once.
//!
//! * Everything that a call can get wrong is checked once, before anything runs, and is an [`Error`] of its own.
//! * No fallback is silent: it is logged as a warning and stands in [`Selection::fallback`].
//! * After warm-up a session does not allocate.
//! * A backend is a [`Backend`] (what it says of itself) and an [`Executor`] (what it opens); register your own with
//!   [`Registry::register`].
//!
//! The environment variable [`BACKEND_VARIABLE`] names a backend where no argument does. Feature `cuda` brings the CUDA
//! backend; a binary built with it runs on machines without a driver too, where that backend refuses with the reason.
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
pub use backends::{CpuBackend, CpuInt8Backend, cpu_split_config};
#[cfg(feature = "cuda")]
pub use backends::{CudaBackend, cuda_chooser, cuda_tuner, explain_cuda};
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
