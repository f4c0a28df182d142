//! Owned arrays whose element type is known at run time, with sentinels and guard zones.

use half::{bf16, f16};
use kv_quant::{FloatSlice, FloatSliceMut, FloatType};
use std::ops::Range;

/// An owned array of one of the element types.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// IEEE binary16.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// IEEE binary32.
    F32(Vec<f32>),
}

/// The bit pattern of an element that nobody wrote: a NaN that no arithmetic produces.
pub const fn sentinel_bits(float_type: FloatType) -> u32 {
    match float_type {
        FloatType::F16 => 0x7ead,
        FloatType::Bf16 => 0x7fde,
        FloatType::F32 => 0x7fc0_dead,
    }
}

impl Values {
    /// Rounds to nearest, ties to even.
    pub fn from_f32(float_type: FloatType, values: &[f32]) -> Self {
        match float_type {
            FloatType::F16 => Values::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            FloatType::Bf16 => Values::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            FloatType::F32 => Values::F32(values.to_vec()),
        }
    }

    /// `len` sentinels.
    pub fn untouched(float_type: FloatType, len: usize) -> Self {
        let bits = sentinel_bits(float_type);
        match float_type {
            FloatType::F16 => Values::F16(vec![f16::from_bits(bits as u16); len]),
            FloatType::Bf16 => Values::Bf16(vec![bf16::from_bits(bits as u16); len]),
            FloatType::F32 => Values::F32(vec![f32::from_bits(bits); len]),
        }
    }

    /// Element type.
    pub fn float_type(&self) -> FloatType {
        self.as_slice().float_type()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it, for reading.
    pub fn as_slice(&self) -> FloatSlice<'_> {
        match self {
            Values::F16(x) => FloatSlice::F16(x),
            Values::Bf16(x) => FloatSlice::Bf16(x),
            Values::F32(x) => FloatSlice::F32(x),
        }
    }

    /// A part of it, for writing.
    pub fn part_mut(&mut self, range: Range<usize>) -> FloatSliceMut<'_> {
        match self {
            Values::F16(x) => FloatSliceMut::F16(&mut x[range]),
            Values::Bf16(x) => FloatSliceMut::Bf16(&mut x[range]),
            Values::F32(x) => FloatSliceMut::F32(&mut x[range]),
        }
    }

    /// A copy of a part.
    pub fn part(&self, range: Range<usize>) -> Self {
        match self {
            Values::F16(x) => Values::F16(x[range].to_vec()),
            Values::Bf16(x) => Values::Bf16(x[range].to_vec()),
            Values::F32(x) => Values::F32(x[range].to_vec()),
        }
    }

    /// Element `i`, exact.
    pub fn get(&self, i: usize) -> f64 {
        f64::from(self.as_slice().get(i).expect("index within the array"))
    }

    /// The bit pattern of element `i`.
    pub fn bits(&self, i: usize) -> u32 {
        match self {
            Values::F16(x) => u32::from(x[i].to_bits()),
            Values::Bf16(x) => u32::from(x[i].to_bits()),
            Values::F32(x) => x[i].to_bits(),
        }
    }

    /// Whether element `i` was never written.
    pub fn is_untouched(&self, i: usize) -> bool {
        self.bits(i) == sentinel_bits(self.float_type())
    }

    /// First element whose bits differ.
    pub fn first_difference(&self, other: &Self) -> Option<usize> {
        if self.float_type() != other.float_type() || self.len() != other.len() {
            return Some(0);
        }
        (0..self.len()).find(|&i| self.bits(i) != other.bits(i))
    }
}

/// An output array between two guard zones that nobody may write.
#[derive(Clone, Debug)]
pub struct Guarded {
    values: Values,
    len: usize,
}

/// Elements of a guard zone.
const GUARD: usize = 64;

impl Guarded {
    /// `len` untouched elements between guards.
    pub fn untouched(float_type: FloatType, len: usize) -> Self {
        Self { values: Values::untouched(float_type, len + 2 * GUARD), len }
    }

    /// The array itself, for writing.
    pub fn as_mut(&mut self) -> FloatSliceMut<'_> {
        self.values.part_mut(GUARD..GUARD + self.len)
    }

    /// The array, or which guard was written.
    pub fn into_values(self) -> Result<Values, String> {
        let hit =
            (0..GUARD).chain(GUARD + self.len..self.len + 2 * GUARD).find(|&i| !self.values.is_untouched(i));
        match hit {
            Some(i) => {
                Err(format!("element {} of an array of {} was written", i as i64 - GUARD as i64, self.len))
            }
            None => Ok(self.values.part(GUARD..GUARD + self.len)),
        }
    }
}
