//! The testkit: case generation, poison, comparison against the oracle, and the conformance suite of every backend.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a testkit: what cannot go on must fail loudly, in the test that called it"
)]
#![forbid(unsafe_code)]

pub mod case;
pub mod compare;
pub mod conformance;
pub mod count;
pub mod forced_isa;
#[cfg(feature = "cuda")]
pub mod gpu;
#[cfg(feature = "cuda")]
pub mod guarded;
pub mod malformed;
pub mod mutant;
pub mod numbers;
pub mod poison;
pub mod problem;
pub mod subject;
pub mod values;
