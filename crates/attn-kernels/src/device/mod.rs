//! The device side, behind feature `cuda`: context, memory, streams, modules and the launches.
//!
//! Everything here works on the device's primary context, the one that the CUDA runtime, candle and cudarc use, and
//! leaves the calling thread's current context as it found it. The hot path (`append`, `decode`, `dequantize` and the
//! copies on a stream) neither allocates nor synchronises and can be captured into a graph.
//!
//! `driver` and `launch` hold the calls; the rest is safe.

mod append;
mod cache;
mod context;
mod decode;
pub(crate) mod driver;
mod error;
mod graph;
mod launch;
mod memory;
mod module;
mod report;
mod stream;
mod transfer;

pub use append::{AppendArgs, CacheKernels, DequantizeArgs, StreamKernels};
pub use cache::{CacheArgs, PageRowsArgs, PageTableArgs};
pub use context::CudaDevice;
pub use decode::{DecodeArgs, Decoder, PlanArgs};
pub use error::{DeviceError, DeviceReport, DriverError};
pub use graph::Graph;
pub use launch::{LaunchShape, Order};
pub use memory::{DeviceBuffer, DeviceView, PinnedBuffer};
pub use module::{Kernel, KernelFacts, Kernels};
pub use report::ErrorReport;
pub use stream::{Event, Stream};
