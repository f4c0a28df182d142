//! Stage 1 with NEON.

use super::Neon;
use crate::arch::generic;
use crate::stage1::{Step, Unit};

/// Stage 1; a value is the proof that it can run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage1(Neon);

impl Stage1 {
    pub(crate) fn is_available() -> bool {
        Neon::new().is_some()
    }

    pub(crate) fn new() -> Option<Self> {
        Neon::new().map(Self)
    }

    pub(crate) fn attend(self, step: &Step<'_>, unit: Unit<'_>) {
        // SAFETY: self.0 proves the features.
        unsafe { attend(self.0, step, unit) }
    }
}

#[target_feature(enable = "neon")]
fn attend(s: Neon, step: &Step<'_>, unit: Unit<'_>) {
    generic::attend(s, step, unit);
}
