//! Stage 1 with AVX-512.

use super::Avx512;
use crate::arch::generic;
use crate::stage1::{Step, Unit};

/// Stage 1; a value is the proof that it can run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage1(Avx512);

impl Stage1 {
    pub(crate) fn is_available() -> bool {
        Avx512::new().is_some()
    }

    pub(crate) fn new() -> Option<Self> {
        Avx512::new().map(Self)
    }

    pub(crate) fn attend(self, step: &Step<'_>, unit: Unit<'_>) {
        // SAFETY: self.0 proves the features.
        unsafe { attend(self.0, step, unit) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn attend(s: Avx512, step: &Step<'_>, unit: Unit<'_>) {
    generic::attend(s, step, unit);
}
