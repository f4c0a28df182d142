//! Append where there is AVX-512: the AVX2 instance, since division is no faster in wider vectors.

use super::Avx512;
use crate::arch::generic;
use crate::arch::x86_64::avx2;
use kv_quant::{FloatSlice, ScaleType};

/// Append; a value is the proof that it can run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Append(avx2::Append);

impl Append {
    pub(crate) fn new() -> Option<Self> {
        Avx512::new().and_then(|_| avx2::Append::new()).map(Self)
    }

    pub(crate) fn all_within(
        self,
        x: FloatSlice<'_>,
        slots: &[i64],
        row: usize,
        scale_type: ScaleType,
    ) -> bool {
        self.0.all_within(x, slots, row, scale_type)
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
        unsafe { self.0.token(rows, k, v, token) }
    }
}
