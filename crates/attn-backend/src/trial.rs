//! The trial of a candidate: a real decode of the caller's own descriptor, judged by the oracle's bound.

use std::time::Duration;

/// What a passed trial showed.
#[derive(Clone, Debug, PartialEq)]
pub struct Evidence {
    /// Output elements compared.
    pub num_compared: u64,
    /// The largest error as a share of its bound, 0 to 1.
    pub worst_share: f64,
    /// Time it took.
    pub elapsed: Duration,
    /// Whether the verdict is an earlier one for the same device, driver, build and descriptor.
    pub is_cached: bool,
}

/// How a trial failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TrialFailure {
    /// An output element is off by more than the bound, or not a number.
    #[error(
        "{what} of request {request}, row {row}, head {head}, channel {channel} is {got:e}; expected {want:e} within {bound:e}"
    )]
    Wrong {
        /// "out" or "lse".
        what: &'static str,
        /// Request of the trial batch.
        request: usize,
        /// Query row of the request.
        row: u32,
        /// Query head.
        head: u32,
        /// Channel; 0 for lse.
        channel: u32,
        /// What the backend computed.
        got: f64,
        /// What the oracle computed.
        want: f64,
        /// The a-priori error bound.
        bound: f64,
    },
    /// Append left other bytes in the cache than the format's rule says.
    #[error("append: byte {offset} of cache buffer {buffer_idx} is {got:#04x}; the format says {want:#04x}")]
    Bytes {
        /// Which buffer.
        buffer_idx: usize,
        /// Which byte.
        offset: u64,
        /// What the backend wrote (or touched).
        got: u8,
        /// What it should be.
        want: u8,
    },
    /// The backend returned an error.
    #[error("error: {0}")]
    Error(String),
    /// The backend panicked.
    #[error("panic: {0}")]
    Panic(String),
    /// No verdict within the time limit.
    #[error("no verdict within {0:?}")]
    TimeLimit(Duration),
    /// The child process died or answered nonsense.
    #[error("child process: {0}")]
    Child(String),
}
