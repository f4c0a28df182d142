//! Owned arrays whose element type is known at run time.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kv_quant::{FloatSlice, FloatSliceMut, FloatType};

/// Owned elements of one of the float types.
#[derive(Clone, Debug, PartialEq)]
pub enum Floats {
    /// IEEE binary16.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// IEEE binary32.
    F32(Vec<f32>),
}

impl Floats {
    /// Rounds `values` to a type (nearest, ties to even).
    pub fn round(float_type: FloatType, values: &[f32]) -> Self {
        match float_type {
            FloatType::F16 => {
                let mut rounded = vec![f16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                Floats::F16(rounded)
            }
            FloatType::Bf16 => {
                let mut rounded = vec![bf16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                Floats::Bf16(rounded)
            }
            FloatType::F32 => Floats::F32(values.to_vec()),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For reading.
    pub fn as_slice(&self) -> FloatSlice<'_> {
        match self {
            Floats::F16(x) => FloatSlice::F16(x),
            Floats::Bf16(x) => FloatSlice::Bf16(x),
            Floats::F32(x) => FloatSlice::F32(x),
        }
    }

    /// For writing.
    pub fn as_mut_slice(&mut self) -> FloatSliceMut<'_> {
        match self {
            Floats::F16(x) => FloatSliceMut::F16(x),
            Floats::Bf16(x) => FloatSliceMut::Bf16(x),
            Floats::F32(x) => FloatSliceMut::F32(x),
        }
    }

    /// In f32, exact.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut wide = vec![0f32; self.len()];
        self.as_slice().widen(0, &mut wide);
        wide
    }
}
