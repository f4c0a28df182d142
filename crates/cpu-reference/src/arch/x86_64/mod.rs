//! x86-64 instances.

pub(crate) mod avx2;
pub(crate) mod avx512;
