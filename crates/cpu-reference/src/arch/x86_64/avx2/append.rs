//! Append with AVX2, FMA and F16C.

use super::Avx2;
use crate::arch::generic;
use kv_quant::{FloatSlice, ScaleType};

/// Append; a value is the proof that it can run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Append(Avx2);

impl Append {
    pub(crate) fn new() -> Option<Self> {
        Avx2::new().map(Self)
    }

    pub(crate) fn all_within(
        self,
        x: FloatSlice<'_>,
        slots: &[i64],
        row: usize,
        scale_type: ScaleType,
    ) -> bool {
        // SAFETY: self.0 proves the features.
        unsafe { all_within(self.0, x, slots, row, scale_type) }
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
        // SAFETY: self.0 proves the features; the rest is the caller's.
        unsafe { write_token(self.0, rows, k, v, token) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn all_within(s: Avx2, x: FloatSlice<'_>, slots: &[i64], row: usize, scale_type: ScaleType) -> bool {
    generic::append::all_within(s, x, slots, row, scale_type)
}

/// # Safety
/// As of [`generic::append::token`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn write_token(
    s: Avx2,
    rows: &generic::append::Rows<'_>,
    k: &FloatSlice<'_>,
    v: &FloatSlice<'_>,
    token: usize,
) {
    // SAFETY: the caller's.
    unsafe { generic::append::token(s, rows, k, v, token) }
}
