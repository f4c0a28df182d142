//! Instruction sets: one algorithm in `generic`, a thin instance of it for each set.
//!
//! The only unsafe code of the crate is here. Every instance has a type whose value proves that the CPU has the
//! instructions: its constructor is the only way to it.
//!
//! | folder | needs | ran on |
//! |---|---|---|
//! | `portable` | nothing | x86-64 |
//! | `x86_64/avx2` | AVX2, FMA, F16C | x86-64 |
//! | `x86_64/avx512` | AVX-512 F, BW, VL, DQ | x86-64 |
//! | `aarch64/neon` | NEON | compiled and reviewed, never run |

pub(crate) mod generic;
pub(crate) mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
