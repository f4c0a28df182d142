//! CUDA kernels of kv8 and their launch.
//!
//! Three levels of unsafety, by name:
//!
//! * [`abi`]: the parameter structs, layout asserted on both sides; plain data.
//! * `device::launch` and `device::driver`: the only calls into the driver.
//! * `device`: safe, typed objects and functions on top, for plain structs and raw device views.
//!
//! Who validates: shapes, strides, lengths and indices are checked by the caller (`attn-backend` does it once, before any
//! launch). Below that, only what a caller cannot foresee is an error: memory, driver, image, device.
//!
//! The kernels themselves are CUDA C++ under `cuda/`, built by `cargo xtask kernels` into one image, which feature
//! `cuda` embeds. Without the image the crate builds and answers "not built".

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod abi;
pub mod image;
mod instances;
pub mod key;
pub mod probe;
pub mod residency;
mod view;

pub use view::DeviceView;

#[cfg(feature = "cuda")]
pub mod device;
