//! What an element of the cache is: an INT8 code, or an unquantized float for comparison.

use crate::{Error, FloatType, Side};
use half::{bf16, f16};

/// Coding of K and V elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// `i8` codes, a scale a group: the format that this project is about.
    Int8,
    /// Floats, no scales: what an INT8 cache is compared with.
    Float(FloatType),
}

impl Element {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Element::Int8 => 1,
            Element::Float(float_type) => float_type.bytes(),
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Element::Int8 => f.write_str("int8"),
            Element::Float(float_type) => float_type.fmt(f),
        }
    }
}

/// Refuses a row of an unquantized cache that is not finite, or would not be once rounded to `float_type`.
pub(crate) fn check_floats(
    values: &[f32],
    float_type: FloatType,
    side: Side,
    token: usize,
    head: u32,
) -> Result<(), Error> {
    for (channel, &value) in values.iter().enumerate() {
        let channel = channel as u32;
        if !value.is_finite() {
            return Err(Error::NonFinite { side, token, head, channel });
        }
        let rounded = match float_type {
            FloatType::F16 => f16::from_f32(value).to_f32(),
            FloatType::Bf16 => bf16::from_f32(value).to_f32(),
            FloatType::F32 => value,
        };
        if !rounded.is_finite() {
            return Err(Error::ValueOverflow { side, token, head, channel, value, float_type });
        }
    }
    Ok(())
}

/// Rounds `values` to `float_type` (half to even) into `bytes`, little-endian.
pub(crate) fn write_floats(values: &[f32], float_type: FloatType, bytes: &mut [u8]) {
    match float_type {
        FloatType::F32 => {
            for (bytes, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *bytes = x.to_le_bytes();
            }
        }
        FloatType::F16 => {
            for (bytes, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *bytes = f16::from_f32(*x).to_le_bytes();
            }
        }
        FloatType::Bf16 => {
            for (bytes, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *bytes = bf16::from_f32(*x).to_le_bytes();
            }
        }
    }
}

/// Widens `bytes` of `float_type` to f32; exact.
pub(crate) fn read_floats(bytes: &[u8], float_type: FloatType, values: &mut [f32]) {
    match float_type {
        FloatType::F32 => {
            for (x, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*bytes);
            }
        }
        FloatType::F16 => {
            for (x, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        FloatType::Bf16 => {
            for (x, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::*;

    #[test]
    fn an_unquantized_cache_returns_what_was_appended() {
        let values: Vec<f32> = (0..3 * 2 * 16).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let half: Vec<half::f16> = values.iter().map(|&x| half::f16::from_f32(x)).collect();
        for float_type in FloatType::ALL {
            let format = CacheFormat::unquantized(2, 16, float_type).unwrap();
            for layout in [
                CacheLayout::native(format, 4, 8).unwrap(),
                CacheLayout::hnd(format, 4, 8).unwrap(),
                CacheLayout::nhd(format, 4, 8).unwrap(),
                CacheLayout::lightllm(format, 32).unwrap(),
            ] {
                let mut cache = CacheBuffers::zeroed(&layout).unwrap();
                let k = FloatSlice::F32(&values);
                append(&layout, &mut cache.view_mut(), k, k, &[5, -1, 31]).unwrap();
                let mut row = [0f32; 16];
                for (token, slot) in [(0usize, 5u64), (2, 31)] {
                    for head in 0..2 {
                        dequantize_row(&layout, &cache.view(), Side::V, slot, head, &mut row).unwrap();
                        for (c, x) in row.iter().enumerate() {
                            let want = values[(token * 2 + head as usize) * 16 + c];
                            let u = float_type.unit_roundoff();
                            assert!(f64::from((x - want).abs()) <= u * f64::from(want.abs()), "{float_type}");
                        }
                    }
                }
                let k = FloatSlice::F16(&half);
                append(&layout, &mut cache.view_mut(), k, k, &[0, 1, 2]).unwrap();
                assert!(read_codes(&layout, &cache.view(), Side::K, 0, 0).is_err());
            }
        }
    }

    #[test]
    fn a_value_beyond_the_type_is_refused_and_nothing_is_written() {
        let layout =
            CacheLayout::hnd(CacheFormat::unquantized(1, 16, FloatType::F16).unwrap(), 1, 2).unwrap();
        let mut cache = CacheBuffers::zeroed(&layout).unwrap();
        let mut values = [1f32; 16];
        values[3] = 1e6;
        let k = FloatSlice::F32(&values);
        let error = append(&layout, &mut cache.view_mut(), k, k, &[0]).unwrap_err();
        assert_eq!(error.to_string(), "K[token 0, head 0, channel 3] is 1e6; largest f16: 65504");
        assert_eq!(cache, CacheBuffers::zeroed(&layout).unwrap());
    }
}
