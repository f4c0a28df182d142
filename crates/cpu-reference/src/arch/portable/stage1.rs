//! Stage 1 on any CPU.

use super::Portable;
use crate::arch::generic;
use crate::stage1::{Step, Unit};

/// Stage 1; can always be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage1(Portable);

impl Stage1 {
    pub(crate) fn is_available() -> bool {
        true
    }

    pub(crate) fn new() -> Option<Self> {
        Some(Self(Portable))
    }

    pub(crate) fn attend(self, step: &Step<'_>, unit: Unit<'_>) {
        generic::attend(self.0, step, unit);
    }
}
