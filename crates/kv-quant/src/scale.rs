//! From the largest magnitude of a group to its stored scale: the one place where a scale is rounded.

use half::{bf16, f16};

/// Storage type of scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum ScaleType {
    /// IEEE binary16, the default: half the bytes of f32 at a loss of 0.02 dB.
    #[default]
    F16 = 0,
    /// bfloat16: f32's range, 0.7 dB worse than f16 at groups of 8, 0.2 dB at groups of 32.
    Bf16 = 1,
    /// IEEE binary32.
    F32 = 2,
}

impl ScaleType {
    /// All of them.
    pub const ALL: [ScaleType; 3] = [ScaleType::F16, ScaleType::Bf16, ScaleType::F32];

    /// Bytes of one scale.
    pub const fn bytes(self) -> usize {
        match self {
            ScaleType::F16 | ScaleType::Bf16 => 2,
            ScaleType::F32 => 4,
        }
    }

    /// The largest finite scale.
    pub fn largest(self) -> f32 {
        match self {
            ScaleType::F16 => f16::MAX.to_f32(),
            ScaleType::Bf16 => bf16::MAX.to_f32(),
            ScaleType::F32 => f32::MAX,
        }
    }

    /// Decodes one stored scale from its little-endian bytes; `None` if there are too few.
    pub fn read(self, bytes: &[u8]) -> Option<f32> {
        Some(match self {
            ScaleType::F16 => f16::from_le_bytes(*bytes.first_chunk()?).to_f32(),
            ScaleType::Bf16 => bf16::from_le_bytes(*bytes.first_chunk()?).to_f32(),
            ScaleType::F32 => f32::from_le_bytes(*bytes.first_chunk()?),
        })
    }
}

impl std::fmt::Display for ScaleType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ScaleType::F16 => "f16",
            ScaleType::Bf16 => "bf16",
            ScaleType::F32 => "f32",
        })
    }
}

/// A scale as stored: its value and its bit pattern in the low bytes of `bits`.
/// ```
/// use kv_quant::{ScaleType, round_scale_up};
/// let scale = round_scale_up(127.01, ScaleType::F16).expect("no overflow");
/// assert_eq!((scale.value, scale.bits), (1.0 + 1.0 / 1024.0, 0x3c01));
/// let mut bytes = [0u8; 2];
/// assert!(scale.write(ScaleType::F16, &mut bytes));
/// assert_eq!(ScaleType::F16.read(&bytes), Some(scale.value));
/// assert!(round_scale_up(f32::MAX, ScaleType::F16).is_none());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredScale {
    /// The value, exact.
    pub value: f32,
    /// The bit pattern; the low 16 bits for f16 and bf16.
    pub bits: u32,
}

impl StoredScale {
    /// Writes the scale's little-endian bytes; false (and nothing written) if `out` is too short.
    pub fn write(self, scale_type: ScaleType, out: &mut [u8]) -> bool {
        let bytes = self.bits.to_le_bytes();
        match (out.get_mut(..scale_type.bytes()), bytes.get(..scale_type.bytes())) {
            (Some(out), Some(bytes)) => {
                out.copy_from_slice(bytes);
                true
            }
            _ => false,
        }
    }
}

/// The smallest value of `scale_type` that is at least `amax / 127`, or `None` if that is beyond the type.
///
/// `amax` is finite and not negative; 0 gives 0. Rounding up keeps every quotient `x / scale` within 127, so that
/// the clamp of the codes never bites.
///
/// The nearest value to the f32 quotient is either the answer or one step below it; the exact product with 127
/// decides (11 or 8 bits times 7 bits fit in f32; for f32 itself the sign of one fused multiply-add).
pub fn round_scale_up(amax: f32, scale_type: ScaleType) -> Option<StoredScale> {
    let quotient = amax / 127.0;
    let stored = match scale_type {
        ScaleType::F16 => {
            let nearest = f16::from_f32(quotient);
            let bits = nearest.to_bits() + u16::from(nearest.to_f32() * 127.0 < amax);
            StoredScale { value: f16::from_bits(bits).to_f32(), bits: u32::from(bits) }
        }
        ScaleType::Bf16 => {
            let nearest = bf16::from_f32(quotient);
            let bits = nearest.to_bits() + u16::from(nearest.to_f32() * 127.0 < amax);
            StoredScale { value: bf16::from_bits(bits).to_f32(), bits: u32::from(bits) }
        }
        ScaleType::F32 => {
            let below = quotient.mul_add(127.0, -amax) < 0.0;
            let bits = quotient.to_bits() + u32::from(below);
            StoredScale { value: f32::from_bits(bits), bits }
        }
    };
    stored.value.is_finite().then_some(stored)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule by exhaustion: the first value of the type, counted up by bits, that reaches amax / 127 exactly.
    fn by_search(amax: f32, scale_type: ScaleType) -> f64 {
        let value = |bits: u32| match scale_type {
            ScaleType::F16 => f16::from_bits(bits as u16).to_f64(),
            ScaleType::Bf16 => bf16::from_bits(bits as u16).to_f64(),
            ScaleType::F32 => f64::from(f32::from_bits(bits)),
        };
        let (mut low, mut high) = (0u32, if scale_type == ScaleType::F32 { 0x7f7f_ffff } else { 0x7b00 });
        while low < high {
            let middle = low + (high - low) / 2;
            // f64 holds the product of any scale with 127 exactly.
            if value(middle) * 127.0 >= f64::from(amax) { high = middle } else { low = middle + 1 }
        }
        value(low)
    }

    #[test]
    fn rounds_up_exactly_over_every_f16_and_bf16_amax() {
        for bits in 1..0x7c00u16 {
            for scale_type in ScaleType::ALL {
                for amax in [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()] {
                    let stored = round_scale_up(amax, scale_type).map(|s| f64::from(s.value));
                    if f64::from(amax) / 127.0 <= f64::from(scale_type.largest()) * 0.4 {
                        assert_eq!(stored, Some(by_search(amax, scale_type)), "{amax:e} {scale_type}");
                    }
                }
            }
        }
    }

    #[test]
    fn rounds_up_around_every_scale_of_f16() {
        // amax one f32 step below, at and above 127 * scale: the three sides of the decision.
        for bits in 1..0x7c00u16 {
            let exact = f16::from_bits(bits).to_f32() * 127.0;
            for amax in [f32::from_bits(exact.to_bits() - 1), exact, f32::from_bits(exact.to_bits() + 1)] {
                let Some(stored) = round_scale_up(amax, ScaleType::F16) else {
                    assert!(amax > f16::MAX.to_f32() * 127.0);
                    continue;
                };
                assert!(stored.value * 127.0 >= amax);
                let below = f16::from_bits(stored.bits as u16 - 1).to_f32();
                assert!(below * 127.0 < amax, "{amax:e}: {} is not the smallest", stored.value);
            }
        }
    }

    #[test]
    fn beyond_the_type_is_none() {
        assert!(round_scale_up(65504.0 * 127.0, ScaleType::F16).is_some());
        assert!(round_scale_up(f32::from_bits((65504.0f32 * 127.0).to_bits() + 1), ScaleType::F16).is_none());
        assert!(round_scale_up(f32::MAX, ScaleType::Bf16).is_some());
        assert!(round_scale_up(f32::MAX, ScaleType::F32).is_some());
        assert_eq!(round_scale_up(f32::from_bits(1), ScaleType::F32).map(|s| s.bits), Some(1));
        assert_eq!(round_scale_up(0.0, ScaleType::F16).map(|s| s.bits), Some(0));
    }
}
