//! Where the rows of a tile lie, and their scales: found once for all query rows.

use super::Simd;
use crate::stage1::{Step, TILE_LEN, padded_dim};
use half::{bf16, f16};
use kv_quant::{Element, FloatType, MAX_HEAD_DIM, ScaleType};

/// Tokens of a tile.
pub(crate) const TILE: usize = TILE_LEN as usize;
const MAX_DIM: usize = MAX_HEAD_DIM as usize;
/// Most scales of a row: groups of 8.
const MAX_SCALES: usize = MAX_DIM / 8;

/// How a chunk of a row is made, see [`Tile::values`]: codes times one scale.
pub(crate) const ONE_SCALE: u8 = 0;
/// Codes times two scales: groups of 8 in vectors of 16.
pub(crate) const TWO_SCALES: u8 = 1;
/// Floats of an unquantized cache.
pub(crate) const FLOATS: u8 = 2;

/// Stands in for rows that do not exist: behind the end of an item, or outside the cache. Elements 0, scales 0.
static ZEROS: [u8; 4 * MAX_DIM] = [0; 4 * MAX_DIM];

/// A strided plane of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    pub buffer: &'a [u8],
    pub offset: u64,
    pub page_stride: u64,
    pub slot_stride: u64,
    pub head_stride: u64,
}

impl Bytes<'_> {
    /// A row. Good for all its bytes if page, slot and head are within the layout, since `Step::new` has found the
    /// buffer as long as the layout says.
    #[inline(always)]
    fn row(&self, page: u64, slot: u64, head: u64) -> *const u8 {
        let first = self
            .offset
            .wrapping_add(page.wrapping_mul(self.page_stride))
            .wrapping_add(slot.wrapping_mul(self.slot_stride))
            .wrapping_add(head.wrapping_mul(self.head_stride));
        self.buffer.as_ptr().wrapping_add(first as usize)
    }
}

/// K or V of a cache.
#[derive(Clone, Copy)]
pub(crate) struct SidePlanes<'a> {
    pub codes: Bytes<'a>,
    pub scales: Bytes<'a>,
    pub head_dim: usize,
    pub num_groups: usize,
    pub group_len: usize,
    pub scale_type: ScaleType,
    pub element: Element,
}

/// One side's rows of a tile. Every pointer is good for a row of its plane: in the cache, or of zeros.
pub(crate) struct SideRows {
    pub codes: [*const u8; TILE],
    pub scales: [*const u8; TILE],
}

/// The rows of a tile, K and V.
pub(crate) struct Rows {
    pub k: SideRows,
    pub v: SideRows,
    pub len: usize,
}

impl SideRows {
    const ZERO: Self = Self { codes: [ZEROS.as_ptr(); TILE], scales: [ZEROS.as_ptr(); TILE] };

    /// Rows `at..at + run` from consecutive slots of a page; of zeros if there is no such page.
    #[inline(always)]
    fn set_run(
        &mut self,
        planes: &SidePlanes<'_>,
        at: usize,
        run: usize,
        page: Option<u64>,
        slot: u64,
        head: u64,
    ) {
        for (plane, rows) in [(&planes.codes, &mut self.codes), (&planes.scales, &mut self.scales)] {
            let (first, stride) = match page {
                Some(page) => (plane.row(page, slot, head), plane.slot_stride as usize),
                None => (ZEROS.as_ptr(), 0),
            };
            for (i, row) in rows[at..at + run].iter_mut().enumerate() {
                *row = first.wrapping_add(i * stride);
            }
        }
    }

    /// Asks for one row's cache lines.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd>(&self, s: S, token: usize, head_dim: usize) {
        let mut at = 0;
        while at < head_dim {
            s.prefetch(self.codes[token].wrapping_add(at));
            at += 64;
        }
        s.prefetch(self.scales[token]);
    }
}

impl Rows {
    pub(crate) fn empty() -> Self {
        Self { k: SideRows::ZERO, v: SideRows::ZERO, len: 0 }
    }

    /// Looks up tokens `start..end` (at most [`TILE`]) of a request, page by page.
    #[inline(always)]
    pub(crate) fn look_up(&mut self, step: &Step<'_>, request: usize, head: u64, start: u32, end: u32) {
        let page_len = step.page_len;
        let len = (end - start) as usize;
        let (mut position, mut slot) = (start / page_len, start % page_len);
        let mut at = 0;
        while at < len {
            let run = ((page_len - slot) as usize).min(len - at);
            let page = step.page(request, position);
            self.k.set_run(&step.k, at, run, page, u64::from(slot), head);
            self.v.set_run(&step.v, at, run, page, u64::from(slot), head);
            at += run;
            (position, slot) = (position + 1, 0);
        }
        if len < TILE {
            for rows in [&mut self.k, &mut self.v] {
                rows.codes[len..].fill(ZEROS.as_ptr());
                rows.scales[len..].fill(ZEROS.as_ptr());
            }
        }
        self.len = len;
    }
}

/// Copies of rows whose length is no multiple of the lanes: zeros behind each.
struct Copies {
    bytes: [[u8; MAX_DIM]; TILE],
    rows: [*const u8; TILE],
}

/// What the inner loops need of a side beyond the rows: decoded scales, and copies where rows must be padded.
pub(crate) struct Side {
    /// `[TILE][scale_stride]`.
    scales: [f32; TILE * MAX_SCALES],
    scale_stride: usize,
    /// A chunk's scale is at `(chunk * LANES) >> shift`.
    shift: u32,
    /// [`ONE_SCALE`], [`TWO_SCALES`] or [`FLOATS`].
    pub mode: u8,
    copies: Option<Copies>,
    /// Widened rows of an unquantized cache, `[TILE][padded_dim]`; else empty and never allocated.
    floats: Vec<f32>,
    padded_dim: usize,
}

/// One side of a tile as the inner loops take it.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// `head_dim` codes each, rounded up to the lanes.
    codes: &'a [*const u8; TILE],
    side: &'a Side,
}

impl Side {
    pub(crate) fn new<S: Simd>(_: S, planes: &SidePlanes<'_>) -> Self {
        let whole = planes.num_groups == 1;
        let is_float = planes.element != Element::Int8;
        let padded_dim = padded_dim(planes.head_dim);
        let copies = (!is_float && !planes.head_dim.is_multiple_of(S::LANES))
            .then_some(Copies { bytes: [[0; MAX_DIM]; TILE], rows: [ZEROS.as_ptr(); TILE] });
        Self {
            scales: [0.0; TILE * MAX_SCALES],
            scale_stride: planes.num_groups.next_multiple_of(8),
            shift: if whole { 31 } else { planes.group_len.trailing_zeros() },
            mode: match (is_float, !whole && planes.group_len < S::LANES) {
                (true, _) => FLOATS,
                (false, true) => TWO_SCALES,
                (false, false) => ONE_SCALE,
            },
            copies,
            floats: if is_float { vec![0.0; TILE * padded_dim] } else { Vec::new() },
            padded_dim,
        }
    }

    /// Takes one side of a tile of `len` tokens.
    #[inline(always)]
    pub(crate) fn load<'a, S: Simd>(
        &'a mut self,
        s: S,
        planes: &SidePlanes<'_>,
        rows: &'a SideRows,
        len: usize,
    ) -> Tile<'a> {
        if let Element::Float(float_type) = planes.element {
            self.widen(float_type, planes.head_dim, rows);
            return Tile { codes: &rows.codes, side: self };
        }
        // The type is matched once, outside the loop.
        match planes.scale_type {
            ScaleType::F16 => self.decode(s, ScaleType::F16, planes.num_groups, rows, len),
            ScaleType::Bf16 => self.decode(s, ScaleType::Bf16, planes.num_groups, rows, len),
            ScaleType::F32 => self.decode(s, ScaleType::F32, planes.num_groups, rows, len),
        }
        if let Some(copies) = &mut self.copies {
            for ((bytes, copy), &row) in copies.bytes.iter_mut().zip(&mut copies.rows).zip(&rows.codes) {
                // SAFETY: row is good for head_dim bytes, and a copy holds MAX_DIM.
                unsafe {
                    std::ptr::copy_nonoverlapping(row, bytes.as_mut_ptr(), planes.head_dim.min(MAX_DIM))
                };
                *copy = bytes.as_ptr();
            }
        }
        let codes = self.copies.as_ref().map_or(&rows.codes, |copies| &copies.rows);
        Tile { codes, side: self }
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

    #[inline(always)]
    fn decode<S: Simd>(
        &mut self,
        s: S,
        scale_type: ScaleType,
        num_groups: usize,
        rows: &SideRows,
        len: usize,
    ) {
        let stride = self.scale_stride;
        assert!(num_groups <= stride && stride <= MAX_SCALES && len <= TILE);
        // The inner loops take tokens in blocks of up to 16.
        for token in 0..len.next_multiple_of(16).min(TILE) {
            let mut first = 0;
            while first < num_groups {
                let n = (num_groups - first).min(8);
                // SAFETY: the row is good for num_groups scales; token * stride + first + 8 <= TILE * MAX_SCALES, since
                // stride is a multiple of 8.
                unsafe {
                    let stored = rows.scales[token].add(first * scale_type.bytes());
                    s.widen_scales(
                        scale_type,
                        stored,
                        n,
                        self.scales.as_mut_ptr().add(token * stride + first),
                    );
                }
                first += 8;
            }
        }
    }
}

impl Tile<'_> {
    /// Values of a chunk: code times scale, or floats as they are.
    ///
    /// # Safety
    /// `token < TILE`, the chunk is one of `head_dim.div_ceil(LANES)`, and `MODE` is the side's.
    #[inline(always)]
    pub(crate) unsafe fn values<S: Simd, const MODE: u8>(&self, s: S, token: usize, chunk: usize) -> S::F {
        let at = chunk * S::LANES;
        // SAFETY: with FLOATS there are [TILE][padded_dim] of them. Else the row has head_dim codes, a multiple of the
        // lanes or a copy of 256, and scale_stride scales, enough for each of its chunks (rounded up to 8, so that the second group of a
        // last chunk exists).
        unsafe {
            if MODE == FLOATS {
                return s.load(self.side.floats.as_ptr().add(token * self.side.padded_dim + at));
            }
            let codes = s.load_codes(self.codes.get_unchecked(token).add(at).cast());
            let row = self.side.scales.as_ptr().add(token * self.side.scale_stride);
            let scale = if MODE == TWO_SCALES {
                s.load_by_eights(row.add(at / 8))
            } else {
                s.splat(*row.add(at >> self.side.shift))
            };
            s.mul(codes, scale)
        }
    }
}
