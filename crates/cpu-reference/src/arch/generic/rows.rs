//! Where the rows of a tile lie: looked up once for all query rows.

use super::Simd;
use crate::stage1::{Step, TILE_LEN, padded_dim};
use half::{bf16, f16};
use kv_quant::{Element, FloatType, MAX_HEAD_DIM, ScaleType};

/// Tokens of a tile.
pub(crate) const TILE: usize = TILE_LEN as usize;
/// Most scales of a row: groups of 8.
const MAX_SCALES: usize = MAX_HEAD_DIM as usize / 8;

/// Stands in for rows that do not exist: behind the end of an item, or outside the cache. Elements 0, scales 0.
static ZEROS: [u8; 4 * MAX_HEAD_DIM as usize] = [0; 4 * MAX_HEAD_DIM as usize];

/// How a chunk of a row is made, see [`Side::chunk`]: codes times one scale.
pub(crate) const ONE_SCALE: u8 = 0;
/// Codes times two scales: groups of 8 in vectors of 16.
pub(crate) const TWO_SCALES: u8 = 1;
/// Floats of an unquantized cache.
pub(crate) const FLOATS: u8 = 2;

/// K or V of a cache: two strided planes. Strides and offsets in bytes.
#[derive(Clone, Copy)]
pub(crate) struct SidePlanes<'a> {
    pub codes: &'a [u8],
    pub scales: &'a [u8],
    /// Offset, page stride, slot stride, head stride of the codes.
    pub code_strides: [u64; 4],
    /// The same of the scales.
    pub scale_strides: [u64; 4],
    pub head_dim: usize,
    pub num_groups: usize,
    pub group_len: usize,
    pub scale_type: ScaleType,
    pub element: Element,
}

impl<'a> SidePlanes<'a> {
    /// Codes and scales of a row, or `None` outside the buffers.
    #[inline(always)]
    fn row(&self, page: u64, slot: u64, head: u64) -> Option<(&'a [u8], &'a [u8])> {
        let start = |[offset, page_stride, slot_stride, head_stride]: [u64; 4]| {
            offset
                .wrapping_add(page.wrapping_mul(page_stride))
                .wrapping_add(slot.wrapping_mul(slot_stride))
                .wrapping_add(head.wrapping_mul(head_stride)) as usize
        };
        let (code, scale) = (start(self.code_strides), start(self.scale_strides));
        let scale_bytes = self.num_groups * self.scale_type.bytes();
        Some((
            self.codes.get(code..code.checked_add(self.head_dim * self.element.bytes())?)?,
            self.scales.get(scale..scale.checked_add(scale_bytes)?)?,
        ))
    }
}

/// One side's rows of a tile.
pub(crate) struct SideRows<'a> {
    /// At least `padded_dim` codes each, where the head dimension is a multiple of the lanes; else see `padded`.
    codes: [&'a [u8]; TILE],
    scales: [&'a [u8]; TILE],
}

/// The rows of a tile, K and V.
pub(crate) struct Rows<'a> {
    pub k: SideRows<'a>,
    pub v: SideRows<'a>,
    pub len: usize,
}

/// One side of a tile as the inner loops take it.
pub(crate) struct Side {
    /// `padded_dim` codes each; `TILE` of them, zeros behind the tile's end.
    pub codes: [*const i8; TILE],
    /// Decoded scales, `[TILE][scale_stride]`.
    pub scales: [f32; TILE * MAX_SCALES],
    pub scale_stride: usize,
    /// A chunk's scale is at `(chunk * LANES) >> shift`.
    pub shift: u32,
    /// [`ONE_SCALE`], [`TWO_SCALES`] or [`FLOATS`].
    pub mode: u8,
    /// Copies of rows whose length is no multiple of the lanes, zeros behind each.
    padded: Vec<u8>,
    /// Rows of an unquantized cache, `[TILE][padded_dim]`; else empty.
    floats: Vec<f32>,
    padded_dim: usize,
}

impl<'a> Rows<'a> {
    pub(crate) fn empty() -> Self {
        let side = || SideRows { codes: [&ZEROS; TILE], scales: [&ZEROS; TILE] };
        Self { k: side(), v: side(), len: 0 }
    }

    /// Looks up tokens `start..end` (at most [`TILE`]) of a request.
    #[inline(always)]
    pub(crate) fn look_up(&mut self, step: &Step<'a>, request: usize, head: u64, start: u32, end: u32) {
        let page_len = step.page_len;
        self.len = (end - start) as usize;
        let (mut page_of_row, mut slot) = (start / page_len, start % page_len);
        let mut page = step.page(request, page_of_row);
        for i in 0..self.len {
            for (planes, rows) in [(&step.k, &mut self.k), (&step.v, &mut self.v)] {
                let row = page.and_then(|page| planes.row(page, u64::from(slot), head));
                let (codes, scales) = row.unwrap_or((&ZEROS, &ZEROS));
                rows.codes[i] = codes;
                rows.scales[i] = scales;
            }
            slot += 1;
            if slot == page_len {
                (page_of_row, slot) = (page_of_row + 1, 0);
                page = if i + 1 < self.len { step.page(request, page_of_row) } else { None };
            }
        }
    }
}

impl SideRows<'_> {
    /// Asks for one row's cache lines.
    ///
    /// # Safety
    /// `token < TILE`.
    #[inline(always)]
    pub(crate) unsafe fn prefetch<S: Simd>(&self, s: S, token: usize, head_dim: usize) {
        // SAFETY: the caller's.
        let (codes, scales) = unsafe { (self.codes.get_unchecked(token), self.scales.get_unchecked(token)) };
        let mut at = 0;
        while at < head_dim {
            s.prefetch(codes.as_ptr().wrapping_add(at));
            at += 64;
        }
        s.prefetch(scales.as_ptr());
    }
}

impl Side {
    pub(crate) fn new<S: Simd>(_: S, planes: &SidePlanes<'_>) -> Self {
        let whole = planes.num_groups == 1;
        let is_float = planes.element != Element::Int8;
        let is_whole = is_float || planes.head_dim.is_multiple_of(S::LANES);
        let padded_dim = padded_dim(planes.head_dim);
        let mode = match (is_float, !whole && planes.group_len < S::LANES) {
            (true, _) => FLOATS,
            (false, true) => TWO_SCALES,
            (false, false) => ONE_SCALE,
        };
        Self {
            codes: [ZEROS.as_ptr().cast(); TILE],
            scales: [0.0; TILE * MAX_SCALES],
            scale_stride: planes.num_groups.next_multiple_of(8),
            shift: if whole { 31 } else { planes.group_len.trailing_zeros() },
            mode,
            padded: vec![0; if is_whole { 0 } else { TILE * MAX_HEAD_DIM as usize }],
            floats: vec![0.0; if is_float { TILE * padded_dim } else { 0 }],
            padded_dim,
        }
    }

    /// Takes one side of a tile: pointers, decoded scales.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&mut self, s: S, planes: &SidePlanes<'_>, rows: &SideRows<'_>, len: usize) {
        if let Element::Float(float_type) = planes.element {
            return self.widen(float_type, rows, len);
        }
        let scale_bytes = planes.scale_type.bytes();
        for i in 0..TILE {
            let (codes, scales): (&[u8], &[u8]) =
                if i < len { (rows.codes[i], rows.scales[i]) } else { (&ZEROS, &ZEROS) };
            self.codes[i] = if self.padded.is_empty() || i >= len {
                codes.as_ptr().cast()
            } else {
                let at = i * MAX_HEAD_DIM as usize;
                let n = planes.head_dim.min(codes.len());
                self.padded[at..at + n].copy_from_slice(&codes[..n]);
                self.padded[at..].as_ptr().cast()
            };
            let mut first = 0;
            while first < planes.num_groups {
                let n = (planes.num_groups - first).min(8);
                let bytes = &scales[first * scale_bytes..(first + n) * scale_bytes];
                let out = &mut self.scales[i * self.scale_stride + first..][..8];
                // SAFETY: `bytes` holds n scales, `out` 8 f32.
                unsafe { s.widen_scales(planes.scale_type, bytes.as_ptr(), n, out.as_mut_ptr()) };
                first += n;
            }
        }
    }

    /// Takes one side of a tile of an unquantized cache: values, zeros behind each row and behind the last.
    #[inline(always)]
    fn widen(&mut self, float_type: FloatType, rows: &SideRows<'_>, len: usize) {
        for (i, out) in self.floats.chunks_exact_mut(self.padded_dim).enumerate() {
            let bytes: &[u8] = if i < len { rows.codes[i] } else { &[] };
            let num = bytes.len() / float_type.bytes();
            let (out, padding) = out.split_at_mut(num.min(out.len()));
            padding.fill(0.0);
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

    /// A chunk of a row, dequantized.
    ///
    /// # Safety
    /// `token < TILE` and `chunk * LANES < padded_dim`; the side was loaded, and `MODE` is its mode.
    #[inline(always)]
    pub(crate) unsafe fn chunk<S: Simd, const MODE: u8>(&self, s: S, token: usize, chunk: usize) -> S::F {
        let at = chunk * S::LANES;
        // SAFETY: with FLOATS, `floats` is [TILE][padded_dim]. Else every row has padded_dim codes and scale_stride
        // scales, enough for every chunk of it (rounded up to 8, so that the second group of a last chunk exists).
        unsafe {
            if MODE == FLOATS {
                return s.load(self.floats.as_ptr().add(token * self.padded_dim + at));
            }
            let row = self.scales.as_ptr().add(token * self.scale_stride);
            let scale = if MODE == TWO_SCALES {
                s.load_by_eights(row.add(at / 8))
            } else {
                s.splat(*row.add(at >> self.shift))
            };
            s.mul(s.load_codes(self.codes.get_unchecked(token).add(at)), scale)
        }
    }
}
