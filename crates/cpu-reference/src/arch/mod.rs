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
//! | `aarch64/neon` | NEON | run under emulation, never on a machine |

use crate::{Error, Isa};
#[cfg(target_arch = "aarch64")]
use aarch64::neon;
use generic::append::Rows;
use kv_quant::{CacheLayout, CacheViewMut, FloatSlice, ScaleType};
use rayon::prelude::*;
#[cfg(target_arch = "x86_64")]
use x86_64::{avx2, avx512};

pub(crate) mod generic;
pub(crate) mod portable;

#[cfg(target_arch = "aarch64")]
pub(crate) mod aarch64;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;

/// Writes all tokens that have a slot; false, with nothing written, if slots or buffers are not sound. Every element has
/// been found within the limit of the scale type.
pub(crate) fn append_rows(
    kernel: AppendKernel,
    layout: &CacheLayout,
    cache: &mut CacheViewMut<'_>,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
    is_parallel: bool,
) -> bool {
    let Some(rows) = generic::append::Rows::new(layout, cache, slots) else { return false };
    if is_parallel {
        let min_tokens = slots.len().div_ceil(rayon::current_num_threads() * 4).max(1);
        // SAFETY: each token once.
        let write = |token| unsafe { kernel.token(&rows, &k, &v, token) };
        (0..slots.len()).into_par_iter().with_min_len(min_tokens).for_each(write);
    } else {
        for token in 0..slots.len() {
            // SAFETY: each token once, one at a time.
            unsafe { kernel.token(&rows, &k, &v, token) };
        }
    }
    true
}

/// Append of one instruction set; a value is the proof that it can run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AppendKernel {
    Portable(portable::Append),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Append),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Append),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Append),
}

impl AppendKernel {
    /// The one that [`crate::ISA_VARIABLE`] or the machine asks for. All write the same bits, so that a name which cannot be
    /// followed needs no error here.
    pub(crate) fn best() -> Self {
        static CHOICE: std::sync::OnceLock<AppendKernel> = std::sync::OnceLock::new();
        *CHOICE.get_or_init(|| {
            let isa = Isa::from_env().unwrap_or_else(|_| Isa::best());
            Self::new(isa).unwrap_or(Self::Portable(portable::Append::new()))
        })
    }

    pub(crate) fn new(isa: Isa) -> Result<Self, Error> {
        let kernel = match isa {
            Isa::Portable => Some(Self::Portable(portable::Append::new())),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Append::new().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Append::new().map(Self::Avx512),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Append::new().map(Self::Neon),
            _ => None,
        };
        kernel.ok_or_else(|| Error::unavailable(isa))
    }

    pub(crate) fn all_within(
        self,
        x: FloatSlice<'_>,
        slots: &[i64],
        row: usize,
        scale_type: ScaleType,
    ) -> bool {
        match self {
            Self::Portable(append) => append.all_within(x, slots, row, scale_type),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(append) => append.all_within(x, slots, row, scale_type),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(append) => append.all_within(x, slots, row, scale_type),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(append) => append.all_within(x, slots, row, scale_type),
        }
    }

    /// # Safety
    /// No two calls at a time for one token.
    pub(crate) unsafe fn token(self, rows: &Rows<'_>, k: &FloatSlice<'_>, v: &FloatSlice<'_>, token: usize) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Portable(append) => append.token(rows, k, v, token),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2(append) => append.token(rows, k, v, token),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512(append) => append.token(rows, k, v, token),
                #[cfg(target_arch = "aarch64")]
                Self::Neon(append) => append.token(rows, k, v, token),
            }
        }
    }
}
