//! One group of channels to codes: the one place where a value is rounded.

use crate::{ScaleType, StoredScale, round_scale_up};

/// The code of `x` under the stored `scale`: the IEEE f32 quotient, rounded half to even, clamped to ±127.
///
/// A scale of 0 belongs to an all-zero group and gives 0.
#[inline]
pub fn quantize_value(x: f32, scale: f32) -> i8 {
    if scale == 0.0 {
        return 0;
    }
    (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8
}

/// Quantizes one group. `codes` is as long as `values`, and every value is finite.
///
/// Returns the stored scale, or `None` (and leaves `codes` alone) if the scale overflows its type.
/// ```
/// use kv_quant::{ScaleType, quantize_group};
/// let mut codes = [0i8; 4];
/// let scale = quantize_group(&[1.0, -0.5, 0.25, 0.003], ScaleType::F16, &mut codes).expect("no overflow");
/// assert_eq!(scale.bits, 0x2009);
/// assert_eq!(codes, [127, -63, 32, 0]);
/// ```
#[inline]
pub fn quantize_group(values: &[f32], scale_type: ScaleType, codes: &mut [i8]) -> Option<StoredScale> {
    let amax = values.iter().fold(0f32, |amax, x| amax.max(x.abs()));
    let scale = round_scale_up(amax, scale_type)?;
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = quantize_value(x, scale.value);
    }
    Some(scale)
}
