//! 64-bit Arm instances.

pub(crate) mod neon;
