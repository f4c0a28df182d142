//! Which kernel: key and symbol.

/// No kernel for a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no kernel")]
pub struct KeyMiss;
