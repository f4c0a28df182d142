//! Owned arrays of an element type known at run time, and the numbers that fill them.

use half::{bf16, f16};
use kv_quant::{FloatSlice, FloatSliceMut, FloatType};

/// An owned [`FloatSlice`].
pub(super) enum Floats {
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Floats {
    /// Rounds `values` to the type.
    pub(super) fn from_f32(float_type: FloatType, values: &[f32]) -> Self {
        match float_type {
            FloatType::F16 => Floats::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            FloatType::Bf16 => Floats::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            FloatType::F32 => Floats::F32(values.to_vec()),
        }
    }

    pub(super) fn slice(&self) -> FloatSlice<'_> {
        match self {
            Floats::F16(x) => FloatSlice::F16(x),
            Floats::Bf16(x) => FloatSlice::Bf16(x),
            Floats::F32(x) => FloatSlice::F32(x),
        }
    }

    pub(super) fn slice_mut(&mut self) -> FloatSliceMut<'_> {
        match self {
            Floats::F16(x) => FloatSliceMut::F16(x),
            Floats::Bf16(x) => FloatSliceMut::Bf16(x),
            Floats::F32(x) => FloatSliceMut::F32(x),
        }
    }

    /// Element `i`; NaN past the end.
    pub(super) fn get(&self, i: usize) -> f64 {
        self.slice().get(i).map_or(f64::NAN, f64::from)
    }
}

/// xorshift64*: the same numbers on every machine.
pub(super) struct Random(pub u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// Uniform in -1 to 1.
    pub(super) fn symmetric(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 31) as f32 - 1.0
    }

    /// Uniform in 0 to 1.
    pub(super) fn unit(&mut self) -> f64 {
        self.bits() as f64 / (1u64 << 32) as f64
    }

    /// Uniform in `0..bound`.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound.max(1) as u64) as usize
    }
}
