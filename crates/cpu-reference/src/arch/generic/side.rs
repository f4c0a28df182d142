//! One side (K or V) of a tile as the inner loops take it: row pointers, and scales decoded once for all query rows.

use super::Simd;
use super::rows::{MAX_DIM, SidePlanes, SideRows, TILE, ZEROS};
use crate::stage1::padded_dim;
use half::{bf16, f16};
use kv_quant::{Element, FloatType, ScaleType};
use std::mem::MaybeUninit;

/// Most scales of a row: groups of 8.
const MAX_SCALES: usize = MAX_DIM / 8;
/// From one group's scales to the next group's. Behind the tile's tokens lies room for a vector that is read past them.
pub(crate) const SCALE_STRIDE: usize = TILE + 16;

/// How a chunk of a row is made, see [`Tile::values`]: codes times one scale.
pub(crate) const ONE_SCALE: u8 = 0;
/// Codes times two scales: groups of 8 in vectors of 16.
pub(crate) const TWO_SCALES: u8 = 1;
/// Codes alone: the weight carries the scale.
pub(crate) const NO_SCALE: u8 = 2;
/// Floats of an unquantized cache.
pub(crate) const FLOATS: u8 = 3;

/// Copies of rows whose length is no multiple of the lanes: zeros behind each.
struct Copies {
    bytes: [[u8; MAX_DIM]; TILE],
    rows: [*const u8; TILE],
}

/// Memory of a [`Side`], apart so that it is neither moved nor filled where it is not used.
pub(crate) struct SideMemory {
    scales: [MaybeUninit<f32>; MAX_SCALES * SCALE_STRIDE],
    copies: MaybeUninit<Copies>,
}

impl SideMemory {
    #[inline(always)]
    pub(crate) fn uninit() -> MaybeUninit<Self> {
        MaybeUninit::uninit()
    }
}

/// What the inner loops need of a side beyond the rows.
pub(crate) struct Side<'m> {
    /// `[num_groups][SCALE_STRIDE]`, token by token.
    scales: &'m mut [f32],
    copies: Option<&'m mut Copies>,
    /// Widened rows of an unquantized cache, `[TILE][padded_dim]`; else empty and never allocated.
    floats: Vec<f32>,
    padded_dim: usize,
    num_groups: usize,
    /// Chunks (vectors) of a group; 1 where a vector has more than one group; all of the row for a whole head.
    pub chunks_per_group: usize,
    /// The group of a chunk is `chunk * LANES >> shift`.
    shift: u32,
    /// [`ONE_SCALE`], [`TWO_SCALES`] or [`FLOATS`].
    pub mode: u8,
}

/// One side of a tile as the inner loops take it.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// `head_dim` codes each, rounded up to the lanes.
    pub codes: &'a [*const u8; TILE],
    /// `[num_groups][SCALE_STRIDE]`.
    pub scales: &'a [f32],
    floats: &'a [f32],
    padded_dim: usize,
    shift: u32,
}

impl<'m> Side<'m> {
    #[inline(always)]
    pub(crate) fn new<S: Simd>(
        _: S,
        planes: &SidePlanes<'_>,
        memory: &'m mut MaybeUninit<SideMemory>,
    ) -> Self {
        let is_float = planes.element != Element::Int8;
        let whole = planes.num_groups == 1;
        let padded_dim = padded_dim(planes.head_dim);
        let memory = memory.as_mut_ptr();
        // SAFETY: each field is a place of its own, and all of what a reference is made to is written first.
        let (scales, copies) = unsafe {
            let scales = (&raw mut (*memory).scales).cast::<f32>();
            let len = planes.num_groups.min(MAX_SCALES) * SCALE_STRIDE;
            scales.write_bytes(0, len);
            let scales = std::slice::from_raw_parts_mut(scales, len);
            let needs_copies = !is_float && !planes.head_dim.is_multiple_of(S::LANES);
            let copies = needs_copies.then(|| {
                let copies = (&raw mut (*memory).copies).cast::<Copies>();
                (&raw mut (*copies).bytes).write_bytes(0, 1);
                (&raw mut (*copies).rows).write([ZEROS.as_ptr(); TILE]);
                &mut *copies
            });
            (scales, copies)
        };
        Self {
            scales,
            copies,
            floats: if is_float { vec![0.0; TILE * padded_dim] } else { Vec::new() },
            padded_dim,
            num_groups: planes.num_groups.min(MAX_SCALES),
            chunks_per_group: if whole {
                planes.head_dim.div_ceil(S::LANES)
            } else {
                (planes.group_len / S::LANES).max(1)
            },
            shift: if whole { 31 } else { planes.group_len.trailing_zeros() },
            mode: match (is_float, !whole && planes.group_len < S::LANES) {
                (true, _) => FLOATS,
                (false, true) => TWO_SCALES,
                (false, false) => ONE_SCALE,
            },
        }
    }

    /// Reads what of one side of a tile of `len` tokens is not read in place: scales, and rows that are copied.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&mut self, s: S, planes: &SidePlanes<'_>, rows: &SideRows, len: usize) {
        if let Element::Float(float_type) = planes.element {
            self.widen(float_type, planes.head_dim, rows);
        } else {
            // The type is matched once, outside the loop.
            match planes.scale_type {
                ScaleType::F16 => self.decode(s, ScaleType::F16, rows, len),
                ScaleType::Bf16 => self.decode(s, ScaleType::Bf16, rows, len),
                ScaleType::F32 => self.decode(s, ScaleType::F32, rows, len),
            }
        }
        if let Some(copies) = &mut self.copies {
            let Copies { bytes, rows: copied } = &mut **copies;
            for ((bytes, copy), &row) in bytes.iter_mut().zip(copied).zip(&rows.codes) {
                // SAFETY: row is good for head_dim bytes, and a copy holds MAX_DIM.
                unsafe {
                    std::ptr::copy_nonoverlapping(row, bytes.as_mut_ptr(), planes.head_dim.min(MAX_DIM))
                };
                *copy = bytes.as_ptr();
            }
        }
    }

    /// What was loaded, with the same rows.
    #[inline(always)]
    pub(crate) fn tile<'a>(&'a self, rows: &'a SideRows) -> Tile<'a> {
        Tile {
            codes: self.copies.as_deref().map_or(&rows.codes, |copies| &copies.rows),
            scales: self.scales,
            floats: &self.floats,
            padded_dim: self.padded_dim,
            shift: self.shift,
        }
    }

    /// Widens the rows of an unquantized cache; the channels behind head_dim stay 0.
    #[inline(always)]
    fn widen(&mut self, float_type: FloatType, head_dim: usize, rows: &SideRows) {
        for (out, row) in self.floats.chunks_exact_mut(self.padded_dim).zip(rows.codes) {
            // SAFETY: the row is good for head_dim elements, in the cache or of zeros (4 bytes each, the widest).
            let bytes = unsafe { std::slice::from_raw_parts(row, head_dim * float_type.bytes()) };
            match float_type {
                FloatType::F32 => {
                    for (x, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                        *x = f32::from_le_bytes(*bytes);
                    }
                }
                FloatType::F16 => {
                    for (x, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                        *x = f16::from_le_bytes(*bytes).to_f32();
                    }
                }
                FloatType::Bf16 => {
                    for (x, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                        *x = bf16::from_le_bytes(*bytes).to_f32();
                    }
                }
            }
        }
    }

    /// Decodes the scales of eight tokens at a time, as many as there are groups.
    #[inline(always)]
    fn decode<S: Simd>(&mut self, s: S, scale_type: ScaleType, rows: &SideRows, len: usize) {
        let num_groups = self.num_groups;
        assert!(self.scales.len() >= num_groups * SCALE_STRIDE && len <= TILE);
        let mut token = 0;
        // The inner loops take tokens in blocks of up to 8.
        while token < len {
            let mut first = 0;
            while first < num_groups {
                let n = (num_groups - first).min(8);
                // SAFETY: every row is good for num_groups scales; the last write is at
                // (num_groups - 1) * SCALE_STRIDE + TILE.
                unsafe {
                    let stored = rows.scales.as_ptr().add(token);
                    let offset = first * scale_type.bytes();
                    let out = self.scales.as_mut_ptr().add(first * SCALE_STRIDE + token);
                    s.widen_scales(scale_type, stored, offset, n, out, SCALE_STRIDE);
                }
                first += 8;
            }
            token += 8;
        }
    }
}

impl Tile<'_> {
    /// The group of a chunk.
    #[inline(always)]
    fn group<S: Simd>(&self, chunk: usize) -> usize {
        (chunk * S::LANES) >> self.shift
    }

    /// One token's scale of a group, in all lanes.
    ///
    /// # Safety
    /// `token < TILE`, and the group is one of the side's.
    #[inline(always)]
    pub(crate) unsafe fn scale<S: Simd>(&self, s: S, token: usize, group: usize) -> S::F {
        // SAFETY: the caller's.
        s.splat(unsafe { *self.scales.get_unchecked(group * SCALE_STRIDE + token) })
    }

    /// One token's scales of `4 * LANES` codes, each in the lanes of its 32 codes.
    ///
    /// # Safety
    /// `token < TILE`, the vector is one of the row's, and each 32 codes are of one group.
    #[inline(always)]
    pub(crate) unsafe fn scale_of_codes<S: Simd>(&self, s: S, token: usize, vector: usize) -> S::F {
        let first = vector * 4 * S::LANES;
        let [first, second] = [first, first + 32].map(|code| code >> self.shift);
        // SAFETY: both are groups of the row; the second is read only where a vector has 64 codes.
        unsafe {
            let p = self.scales.as_ptr().add(first * SCALE_STRIDE + token);
            s.load_by_eights(p, (second - first) * SCALE_STRIDE)
        }
    }

    /// Codes of a chunk of the row at `codes`, as f32.
    ///
    /// # Safety
    /// `codes` is one of [`Self::codes`], and the chunk is one of `head_dim.div_ceil(LANES)`.
    #[inline(always)]
    pub(crate) unsafe fn codes<S: Simd>(s: S, codes: *const u8, chunk: usize) -> S::F {
        // SAFETY: the row has head_dim codes, a multiple of the lanes or a copy of 256.
        unsafe { s.load_codes(codes.add(chunk * S::LANES).cast()) }
    }

    /// Values of a chunk: code times scale, codes alone, or floats as they are.
    ///
    /// # Safety
    /// `token < TILE`, the chunk is one of `head_dim.div_ceil(LANES)`, and `MODE` fits the side's.
    #[inline(always)]
    pub(crate) unsafe fn values<S: Simd, const MODE: u8>(&self, s: S, token: usize, chunk: usize) -> S::F {
        // SAFETY: with FLOATS there are [TILE][padded_dim] of them. Else there is a scale for each group that the row's
        // chunks have; of the last chunk's two groups the second may be one too many, which is then not read.
        unsafe {
            if MODE == FLOATS {
                return s.load(self.floats.as_ptr().add(token * self.padded_dim + chunk * S::LANES));
            }
            let codes = Self::codes(s, *self.codes.get_unchecked(token), chunk);
            match MODE {
                NO_SCALE => codes,
                TWO_SCALES => {
                    let group = chunk * (S::LANES / 8);
                    let first = self.scales.as_ptr().add(group * SCALE_STRIDE + token);
                    let has_second = (group + 1) * SCALE_STRIDE < self.scales.len();
                    s.mul(codes, s.load_by_eights(first, if has_second { SCALE_STRIDE } else { 0 }))
                }
                _ => s.mul(codes, self.scale(s, token, self.group::<S>(chunk))),
            }
        }
    }
}
