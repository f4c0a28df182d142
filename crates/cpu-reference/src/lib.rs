//! The f64 oracle and the CPU backend of decode attention over an INT8 group-quantized KV cache.
//!
//! [`oracle`] is naive on purpose: f64, dense, unpaged, unplanned. It says what is right and, with [`Arithmetic`], how
//! far a correct backend may be from it. [`decode`] and [`append()`] are the CPU backend: plan-driven, reading int8 in
//! place, parallel over rayon's current pool, with bits that depend neither on timing nor on the number of threads.
#![deny(unsafe_code)] // allowed in arch alone

mod append;
#[allow(unsafe_code, reason = "vector instructions and rows shared out among threads")]
mod arch;
pub mod bound;
pub mod case;
mod error;
mod host;
mod isa;
pub mod measure;
pub mod oracle;
mod query;
mod split;
mod stage1;
mod stage2;
#[cfg(feature = "proptest")]
pub mod strategies;
mod workspace;

pub use append::{append, append_on};
pub use bound::Arithmetic;
pub use error::Error;
pub use host::decode;
pub use isa::{ISA_VARIABLE, Isa};
pub use query::DotProduct;
pub use split::Machine;
pub use workspace::Workspace;
