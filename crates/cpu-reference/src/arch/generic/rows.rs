//! Where the rows of a tile lie: looked up once for all query rows.

use super::Simd;
use crate::split::TILE_LEN;
use crate::stage1::Step;
use kv_quant::{Element, MAX_HEAD_DIM, ScaleType};

/// Tokens of a tile.
pub(crate) const TILE: usize = TILE_LEN as usize;
pub(super) const MAX_DIM: usize = MAX_HEAD_DIM as usize;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Stands in for rows that do not exist: behind the end of an item, or outside the cache. Elements 0, scales 0.
pub(super) static ZEROS: [u8; 4 * MAX_DIM] = [0; 4 * MAX_DIM];

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
    /// Whether every page exists.
    is_full: bool,
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
            let mut next = first;
            for row in &mut rows[at..at + run] {
                *row = next;
                next = next.wrapping_add(stride);
            }
        }
    }

    /// Asks for one row's cache lines, of which `second` is the offset of the second. Rows of zeros are as good as any, which
    /// saves asking how many there are.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd>(&self, s: S, token: usize, second: usize, head_dim: usize) {
        let (codes, scales) = (self.codes[token % TILE], self.scales[token % TILE]);
        s.prefetch(codes);
        s.prefetch(scales);
        s.prefetch(codes.wrapping_add(second));
        let mut at = 2 * LINE;
        while at < head_dim {
            s.prefetch(codes.wrapping_add(at));
            at += LINE;
        }
    }

    /// The same tokens' rows of the next head; behind `len` rows as they are, which are good to read.
    #[inline(always)]
    fn set_next_head(&mut self, rows: &Self, len: usize, planes: &SidePlanes<'_>) {
        for (plane, to, from) in
            [(&planes.codes, &mut self.codes, &rows.codes), (&planes.scales, &mut self.scales, &rows.scales)]
        {
            let stride = plane.head_stride as usize;
            for (to, from) in to.iter_mut().zip(from).take(len) {
                *to = from.wrapping_add(stride);
            }
            to[len..].copy_from_slice(&from[len..]);
        }
    }
}

impl Rows {
    pub(crate) fn empty() -> Self {
        Self { k: SideRows::ZERO, v: SideRows::ZERO, len: 0, is_full: false }
    }

    /// Looks up tokens `start..end` (at most [`TILE`]) of a request, page by page.
    #[inline(always)]
    pub(crate) fn look_up(&mut self, step: &Step<'_>, request: usize, head: u64, start: u32, end: u32) {
        let page_len = step.page_len;
        let len = (end - start) as usize;
        let (mut position, mut slot) = (start / page_len, start % page_len);
        let mut at = 0;
        self.is_full = true;
        while at < len {
            let run = ((page_len - slot) as usize).min(len - at);
            let page = step.page(request, position);
            self.is_full &= page.is_some();
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
    /// The tokens of `rows` of the next head, which are `start..end` of a request.
    #[inline(always)]
    pub(crate) fn next_head(
        &mut self,
        rows: &Self,
        step: &Step<'_>,
        request: usize,
        head: u64,
        [start, end]: [u32; 2],
    ) {
        if rows.is_full {
            self.k.set_next_head(&rows.k, rows.len, &step.k);
            self.v.set_next_head(&rows.v, rows.len, &step.v);
            (self.len, self.is_full) = (rows.len, true);
        } else {
            self.look_up(step, request, head, start, end);
        }
    }
}
