//! The choice of instruction set: once, at run time.

use crate::Error;
#[cfg(target_arch = "aarch64")]
use crate::arch::aarch64::neon;
use crate::arch::portable;
#[cfg(target_arch = "x86_64")]
use crate::arch::x86_64::{avx2, avx512};
use crate::stage1::{Step, Unit};

/// The environment variable that forces an instruction set by its name.
pub const ISA_VARIABLE: &str = "KV8_CPU_ISA";

/// An instruction set that the backend has an instance for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// Any CPU.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512,
    /// 64-bit Arm with NEON. It has run under emulation, not on a machine yet.
    Neon,
}

impl Isa {
    /// All of them, the preferred last.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Neon];

    /// The name that [`ISA_VARIABLE`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => portable::Stage1::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Stage1::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Stage1::is_available(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Stage1::is_available(),
            _ => false,
        }
    }

    /// Those that this machine can run, the preferred last.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The preferred one that this machine can run.
    pub fn best() -> Isa {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// What [`ISA_VARIABLE`] asks for, or [`Self::best`] if it is not set.
    ///
    /// # Errors
    /// [`Error::Isa`] for an unknown name or one that this machine cannot run.
    pub fn from_env() -> Result<Isa, Error> {
        let Some(asked) = std::env::var_os(ISA_VARIABLE) else { return Ok(Self::best()) };
        let asked = asked.to_string_lossy();
        let found = Self::ALL.into_iter().find(|isa| isa.name() == asked && isa.is_available());
        found.ok_or_else(|| Error::Isa { asked: asked.into_owned(), available: Self::available() })
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Stage 1 of one instruction set; a value is the proof that it can run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kernel {
    Portable(portable::Stage1),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Stage1),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Stage1),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Stage1),
}

impl Kernel {
    pub(crate) fn new(isa: Isa) -> Result<Self, Error> {
        let kernel = match isa {
            Isa::Portable => portable::Stage1::new().map(Kernel::Portable),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Stage1::new().map(Kernel::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Stage1::new().map(Kernel::Avx512),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Stage1::new().map(Kernel::Neon),
            _ => None,
        };
        kernel.ok_or_else(|| Error::unavailable(isa))
    }

    /// Lanes of a vector.
    pub(crate) fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512(_) => 16,
            _ => 8,
        }
    }

    #[inline]
    pub(crate) fn attend(self, step: &Step<'_>, unit: Unit<'_>) {
        match self {
            Kernel::Portable(stage1) => stage1.attend(step, unit),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2(stage1) => stage1.attend(step, unit),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512(stage1) => stage1.attend(step, unit),
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon(stage1) => stage1.attend(step, unit),
        }
    }
}
