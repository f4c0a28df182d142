//! Element types and slices whose type is known at run time.

use half::{bf16, f16};

/// Element type of inputs and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum FloatType {
    /// IEEE binary16.
    F16 = 0,
    /// bfloat16.
    Bf16 = 1,
    /// IEEE binary32.
    F32 = 2,
}

impl FloatType {
    /// All of them.
    pub const ALL: [FloatType; 3] = [FloatType::F16, FloatType::Bf16, FloatType::F32];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            FloatType::F16 | FloatType::Bf16 => 2,
            FloatType::F32 => 4,
        }
    }

    /// The largest finite value.
    pub fn largest(self) -> f32 {
        match self {
            FloatType::F16 => f16::MAX.to_f32(),
            FloatType::Bf16 => bf16::MAX.to_f32(),
            FloatType::F32 => f32::MAX,
        }
    }

    /// Unit roundoff: half the distance from 1 to the next value.
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            FloatType::F16 => 1.0 / 2048.0,
            FloatType::Bf16 => 1.0 / 256.0,
            FloatType::F32 => 1.0 / 16_777_216.0,
        }
    }

    /// The smallest positive value (subnormal).
    pub const fn tiny(self) -> f64 {
        match self {
            FloatType::F16 => 5.960_464_477_539_063e-8,
            FloatType::Bf16 => 9.183_549_615_799_121e-41,
            FloatType::F32 => 1.401_298_464_324_817e-45,
        }
    }
}

impl std::fmt::Display for FloatType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FloatType::F16 => "f16",
            FloatType::Bf16 => "bf16",
            FloatType::F32 => "f32",
        })
    }
}

/// A borrowed input of one of the element types.
/// ```
/// use kv_quant::{FloatSlice, FloatType};
/// let x = FloatSlice::F32(&[1.0, 2.0, 3.0]);
/// assert_eq!((x.float_type(), x.len(), x.get(1)), (FloatType::F32, 3, Some(2.0)));
/// let mut wide = [0f32; 2];
/// x.widen(1, &mut wide);
/// assert_eq!(wide, [2.0, 3.0]);
/// ```
#[derive(Clone, Copy, Debug)]
pub enum FloatSlice<'a> {
    /// IEEE binary16.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE binary32.
    F32(&'a [f32]),
}

impl<'a> FloatSlice<'a> {
    /// The element type.
    pub fn float_type(&self) -> FloatType {
        match self {
            FloatSlice::F16(_) => FloatType::F16,
            FloatSlice::Bf16(_) => FloatType::Bf16,
            FloatSlice::F32(_) => FloatType::F32,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            FloatSlice::F16(s) => s.len(),
            FloatSlice::Bf16(s) => s.len(),
            FloatSlice::F32(s) => s.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i` as f32 (exact), or `None` past the end.
    pub fn get(&self, i: usize) -> Option<f32> {
        match self {
            FloatSlice::F16(s) => s.get(i).map(|x| x.to_f32()),
            FloatSlice::Bf16(s) => s.get(i).map(|x| x.to_f32()),
            FloatSlice::F32(s) => s.get(i).copied(),
        }
    }

    /// A part of the slice, or `None` if `range` is not within it.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Option<FloatSlice<'a>> {
        Some(match self {
            FloatSlice::F16(s) => FloatSlice::F16(s.get(range)?),
            FloatSlice::Bf16(s) => FloatSlice::Bf16(s.get(range)?),
            FloatSlice::F32(s) => FloatSlice::F32(s.get(range)?),
        })
    }

    /// Converts `out.len()` elements from `start` on to f32 (exact). Elements past the end leave `out` as it is.
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        use half::slice::HalfFloatSliceExt;
        let end = start.saturating_add(out.len());
        match self {
            FloatSlice::F16(s) => {
                if let Some(s) = s.get(start..end) {
                    s.convert_to_f32_slice(out);
                }
            }
            FloatSlice::Bf16(s) => {
                if let Some(s) = s.get(start..end) {
                    s.convert_to_f32_slice(out);
                }
            }
            FloatSlice::F32(s) => {
                if let Some(s) = s.get(start..end) {
                    out.copy_from_slice(s);
                }
            }
        }
    }

    /// The elements as bytes, little-endian on every machine this crate supports.
    pub fn as_bytes(&self) -> &'a [u8] {
        match self {
            FloatSlice::F16(s) => bytemuck::cast_slice(s),
            FloatSlice::Bf16(s) => bytemuck::cast_slice(s),
            FloatSlice::F32(s) => bytemuck::cast_slice(s),
        }
    }
}

/// A borrowed output of one of the element types.
/// ```
/// use half::bf16;
/// use kv_quant::FloatSliceMut;
/// let mut out = [bf16::ZERO; 2];
/// FloatSliceMut::Bf16(&mut out).narrow(1, &[1.0 + 1.0 / 512.0]);
/// assert_eq!(out[1], bf16::ONE); // rounded to nearest
/// ```
#[derive(Debug)]
pub enum FloatSliceMut<'a> {
    /// IEEE binary16.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
    /// IEEE binary32.
    F32(&'a mut [f32]),
}

impl FloatSliceMut<'_> {
    /// The element type.
    pub fn float_type(&self) -> FloatType {
        match self {
            FloatSliceMut::F16(_) => FloatType::F16,
            FloatSliceMut::Bf16(_) => FloatType::Bf16,
            FloatSliceMut::F32(_) => FloatType::F32,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            FloatSliceMut::F16(s) => s.len(),
            FloatSliceMut::Bf16(s) => s.len(),
            FloatSliceMut::F32(s) => s.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A shorter borrow of the same memory.
    pub fn reborrow(&mut self) -> FloatSliceMut<'_> {
        match self {
            FloatSliceMut::F16(s) => FloatSliceMut::F16(s),
            FloatSliceMut::Bf16(s) => FloatSliceMut::Bf16(s),
            FloatSliceMut::F32(s) => FloatSliceMut::F32(s),
        }
    }

    /// Rounds `values` (to nearest, ties to even) into the elements from `start` on. Out of range: nothing is written.
    pub fn narrow(&mut self, start: usize, values: &[f32]) {
        use half::slice::HalfFloatSliceExt;
        let end = start.saturating_add(values.len());
        match self {
            FloatSliceMut::F16(s) => {
                if let Some(s) = s.get_mut(start..end) {
                    s.convert_from_f32_slice(values);
                }
            }
            FloatSliceMut::Bf16(s) => {
                if let Some(s) = s.get_mut(start..end) {
                    s.convert_from_f32_slice(values);
                }
            }
            FloatSliceMut::F32(s) => {
                if let Some(s) = s.get_mut(start..end) {
                    s.copy_from_slice(values);
                }
            }
        }
    }

    /// The elements as bytes.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            FloatSliceMut::F16(s) => bytemuck::cast_slice_mut(s),
            FloatSliceMut::Bf16(s) => bytemuck::cast_slice_mut(s),
            FloatSliceMut::F32(s) => bytemuck::cast_slice_mut(s),
        }
    }
}
