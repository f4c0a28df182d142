//! Append on any CPU.

use super::Portable;
use crate::arch::generic;
use kv_quant::{FloatSlice, ScaleType};

/// Append; can always be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Append(Portable);

impl Append {
    pub(crate) fn new() -> Self {
        Self(Portable)
    }

    pub(crate) fn all_within(
        self,
        x: FloatSlice<'_>,
        slots: &[i64],
        row: usize,
        scale_type: ScaleType,
    ) -> bool {
        generic::append::all_within(self.0, x, slots, row, scale_type)
    }

    /// # Safety
    /// As of [`generic::append::token`].
    pub(crate) unsafe fn token(
        self,
        rows: &generic::append::Rows<'_>,
        k: &FloatSlice<'_>,
        v: &FloatSlice<'_>,
        token: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { generic::append::token(self.0, rows, k, v, token) }
    }
}
