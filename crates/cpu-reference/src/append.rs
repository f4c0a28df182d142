//! Append: k, v -> codes and scales in cache slots, by the one quantization rule of `kv_quant`.

use crate::Isa;
use crate::arch::{AppendKernel, append_rows};
use kv_quant::{CacheLayout, CacheViewMut, Element, FloatSlice};

/// Below this many elements one thread is faster than waking others.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// Quantizes `k` and `v`, `[slots.len(), num_kv_heads, head_dim]`, and writes token `i` to slot `slots[i]`; -1 skips.
///
/// Same bits and same errors as [`kv_quant::append()`] on every instruction set, vectorised and, for large inputs,
/// parallel. On any error nothing is written. Does not allocate for up to 32 tokens, nor for slots in rising order.
/// Runs on the instruction set that [`crate::ISA_VARIABLE`] names, or the best that this machine has.
///
/// # Errors
/// Those of [`kv_quant::append()`].
pub fn append(
    layout: &CacheLayout,
    cache: &mut CacheViewMut<'_>,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), kv_quant::Error> {
    run(AppendKernel::best(), layout, cache, k, v, slots)
}

/// [`append`] on one instruction set.
///
/// # Errors
/// [`crate::Error::Isa`] if this machine cannot run it, and those of [`append`] as [`crate::Error::Cache`].
pub fn append_on(
    isa: Isa,
    layout: &CacheLayout,
    cache: &mut CacheViewMut<'_>,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), crate::Error> {
    Ok(run(AppendKernel::new(isa)?, layout, cache, k, v, slots)?)
}

fn run(
    kernel: AppendKernel,
    layout: &CacheLayout,
    cache: &mut CacheViewMut<'_>,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), kv_quant::Error> {
    let format = layout.format();
    if format.element() != Element::Int8 {
        return kv_quant::append(layout, cache, k, v, slots);
    }
    let row = format.num_kv_heads() as usize * format.head_dim() as usize;
    let want = slots.len().saturating_mul(row);
    let is_sound = k.len() == want
        && v.len() == want
        && k.float_type() == v.float_type()
        && [k, v].iter().all(|x| kernel.all_within(*x, slots, row, format.scale_type()));
    // Whatever is wrong, the plain version says what it is.
    if !is_sound || !append_rows(kernel, layout, cache, k, v, slots, want >= PARALLEL_ELEMENTS) {
        return kv_quant::append(layout, cache, k, v, slots);
    }
    Ok(())
}
