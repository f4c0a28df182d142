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
    // At 1.5 * 2^23 the last bit of an f32 is worth 1: the sum rounds half to even, and its low byte is the code. The
    // bounds are whole, so clamping first changes nothing; unlike a call of rint, all of it runs in vectors.
    const ONES_PLACE: f32 = 12_582_912.0;
    ((x / scale).clamp(-127.0, 127.0) + ONES_PLACE).to_bits() as u8 as i8
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_the_plainly_rounded_quotient() {
        let plain = |x: f32, scale: f32| (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
        // Every quotient in steps of 2^-12 through all ties and past both bounds, then every 4099th f32.
        for i in -(130 << 12)..=(130 << 12) {
            let x = i as f32 / 4096.0;
            assert_eq!(quantize_value(x, 1.0), plain(x, 1.0), "{x}");
        }
        for bits in (0..=f32::MAX.to_bits()).step_by(4099) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                for scale in [1.0, 0.3, 1e-41, 7e37] {
                    assert_eq!(quantize_value(x, scale), plain(x, scale), "{x:e} {scale:e}");
                }
            }
        }
    }
}
