//! Append, vectorised: the rule of `kv_quant`, to the bit.

use super::Simd;
use kv_quant::{CacheLayout, CacheViewMut, FloatSlice, MAX_BUFFERS, MAX_HEAD_DIM, PlaneId, ScaleType, Side};
use std::marker::PhantomData;

/// Lanes that this algorithm works in: no group is shorter.
const LANES: usize = 8;
const MAX_DIM: usize = MAX_HEAD_DIM as usize;

/// The cache's buffers, shared by the threads of one append.
///
/// Its constructor is the proof that no two of the rows that will be written share a byte: the layout guarantees it for
/// different slots, heads and planes, and the slots are found to be different.
pub(crate) struct Rows<'a> {
    layout: &'a CacheLayout,
    slots: &'a [i64],
    buffers: [*mut u8; MAX_BUFFERS],
    lives: PhantomData<&'a mut [u8]>,
}

// SAFETY: each token is handed to one call of `token`, tokens have slots of their own, and rows of different slots are
// disjoint.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// `None` if a slot is out of range or named twice, or a buffer is shorter than the layout says.
    pub(crate) fn new(
        layout: &'a CacheLayout,
        cache: &'a mut CacheViewMut<'_>,
        slots: &'a [i64],
    ) -> Option<Self> {
        if !are_different(slots) || slots.iter().any(|&slot| slot < -1 || slot >= layout.num_slots() as i64) {
            return None;
        }
        let mut buffers = [std::ptr::null_mut(); MAX_BUFFERS];
        for (buffer_idx, &bytes) in layout.buffer_bytes().iter().enumerate() {
            let buffer = cache.bytes_mut(buffer_idx, 0..bytes);
            if buffer.len() as u64 != bytes {
                return None;
            }
            buffers[buffer_idx] = buffer.as_mut_ptr();
        }
        Some(Self { layout, slots, buffers, lives: PhantomData })
    }

    fn row(&self, id: PlaneId, slot: u64, head: u32) -> *mut u8 {
        let (buffer_idx, range) = self.layout.row_bytes(id, slot, head);
        self.buffers[buffer_idx].wrapping_add(range.start as usize)
    }
}

/// Whether no slot but -1 is named twice. Allocates only for many slots in no order.
fn are_different(slots: &[i64]) -> bool {
    let mut last = -1;
    if slots.iter().all(|&slot| slot < 0 || slot > std::mem::replace(&mut last, slot)) {
        return true;
    }
    if slots.len() <= 32 {
        return (1..slots.len()).all(|i| slots[i] < 0 || !slots[..i].contains(&slots[i]));
    }
    let mut sorted: Vec<i64> = slots.iter().copied().filter(|&slot| slot >= 0).collect();
    sorted.sort_unstable();
    sorted.windows(2).all(|pair| pair[0] != pair[1])
}

/// Whether every element of the tokens that have a slot is finite and small enough for the scale type.
#[inline(always)]
pub(crate) fn all_within<S: Simd>(
    s: S,
    x: FloatSlice<'_>,
    slots: &[i64],
    row: usize,
    scale_type: ScaleType,
) -> bool {
    // The smallest magnitude that is refused.
    let limit = match scale_type {
        ScaleType::F16 => (scale_type.largest() * 127.0).next_up(),
        ScaleType::Bf16 | ScaleType::F32 => f32::INFINITY,
    };
    let (limit, yes, no) = (s.splat(limit), s.splat(1.0), s.splat(0.0));
    let mut all = [yes; 4];
    let mut buffer = [0f32; MAX_DIM];
    for (token, _) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        let mut at = 0;
        while at < row {
            let len = (row - at).min(MAX_DIM);
            let part = widened(&x, token * row + at, len, &mut buffer);
            let mut chunks = part.chunks_exact(S::LANES);
            for (i, chunk) in chunks.by_ref().enumerate() {
                // SAFETY: LANES elements.
                let ok = unsafe { s.select_lt(s.abs(s.load(chunk.as_ptr())), limit, yes, no) };
                all[i % 4] = s.min(all[i % 4], ok);
            }
            let mut rest = [0f32; 16];
            let tail = chunks.remainder();
            rest[..tail.len()].copy_from_slice(tail);
            // SAFETY: 16 elements, at least LANES.
            let ok = unsafe { s.select_lt(s.abs(s.load(rest.as_ptr())), limit, yes, no) };
            all[0] = s.min(all[0], ok);
            at += len;
        }
    }
    let all = s.min(s.min(all[0], all[1]), s.min(all[2], all[3]));
    let mut lanes = [1f32; 16];
    // SAFETY: 16 elements, at least LANES.
    unsafe { s.store(lanes.as_mut_ptr(), all) };
    lanes.iter().all(|&x| x == 1.0)
}

/// Elements as f32: in place, or widened into `buffer`.
#[inline(always)]
fn widened<'a>(x: &FloatSlice<'a>, start: usize, len: usize, buffer: &'a mut [f32; MAX_DIM]) -> &'a [f32] {
    match x {
        FloatSlice::F32(x) => &x[start..start + len],
        _ => {
            x.widen(start, &mut buffer[..len]);
            &buffer[..len]
        }
    }
}

/// Writes one token's rows. All its elements are within the limit; tokens without a slot are left out.
///
/// # Safety
/// No two calls at a time for one token.
#[inline(always)]
pub(crate) unsafe fn token<S: Simd>(
    s: S,
    rows: &Rows<'_>,
    k: &FloatSlice<'_>,
    v: &FloatSlice<'_>,
    token: usize,
) {
    let Ok(slot) = u64::try_from(rows.slots[token]) else { return };
    let format = rows.layout.format();
    let head_dim = format.head_dim() as usize;
    let mut buffer = [0f32; MAX_DIM];
    for head in 0..format.num_kv_heads() {
        let start = (token * format.num_kv_heads() as usize + head as usize) * head_dim;
        for (side, x) in [(Side::K, k), (Side::V, v)] {
            let x = widened(x, start, head_dim, &mut buffer);
            let codes = rows.row(PlaneId::Codes(side), slot, head);
            let scales = rows.row(PlaneId::Scales(side), slot, head);
            let (group_len, num_groups) = (format.group_len(side) as usize, format.num_groups(side) as usize);
            let scale_bytes = num_groups * format.scale_type().bytes();
            // SAFETY: a row of codes and one of scales, which no other thread touches.
            let (codes, scales) = unsafe {
                let codes = std::slice::from_raw_parts_mut(codes.cast::<i8>(), head_dim);
                (codes, std::slice::from_raw_parts_mut(scales, scale_bytes))
            };
            if S::LANES == LANES && group_len.is_multiple_of(LANES) {
                quantize_row(s, x, group_len, format.scale_type(), codes, scales);
            } else {
                quantize_odd_row(x, group_len, format.scale_type(), codes, scales);
            }
        }
    }
}

/// Rows whose groups are no multiple of the lanes (whole heads of odd lengths): group by group.
fn quantize_odd_row(x: &[f32], group_len: usize, scale_type: ScaleType, codes: &mut [i8], scales: &mut [u8]) {
    let groups = x.chunks_exact(group_len).zip(codes.chunks_exact_mut(group_len));
    for ((x, codes), bytes) in groups.zip(scales.chunks_exact_mut(scale_type.bytes())) {
        if let Some(scale) = kv_quant::quantize_group(x, scale_type, codes) {
            scale.write(scale_type, bytes);
        }
    }
}

#[inline(always)]
fn quantize_row<S: Simd>(
    s: S,
    x: &[f32],
    group_len: usize,
    scale_type: ScaleType,
    codes: &mut [i8],
    scales: &mut [u8],
) {
    let num_groups = x.len() / group_len;
    assert!(num_groups <= MAX_DIM / LANES && codes.len() == x.len());
    let mut divisors = [0f32; MAX_DIM / LANES];
    for (divisor, group) in divisors.iter_mut().zip(x.chunks_exact(group_len)) {
        let mut amax = s.splat(0.0);
        for chunk in group.chunks_exact(LANES) {
            // SAFETY: LANES elements.
            amax = unsafe { s.max(amax, s.abs(s.load(chunk.as_ptr()))) };
        }
        *divisor = s.max_lanes(amax);
    }
    let mut first = 0;
    while first < num_groups {
        let n = (num_groups - first).min(LANES);
        let stored = &mut scales[first * scale_type.bytes()..(first + n) * scale_type.bytes()];
        // SAFETY: `divisors` is a multiple of 8 long, `stored` has n scales.
        unsafe {
            let at = divisors.as_mut_ptr().add(first);
            let value = s.round_scales_up(scale_type, s.load(at), stored.as_mut_ptr(), n);
            // An all-zero group has scale 0; its codes are 0 under any other divisor.
            s.store(at, s.select_lt(s.splat(0.0), value, value, s.splat(1.0)));
        }
        first += n;
    }
    // One divisor a vector, then four vectors at a time. The clamp of the rule is left out: the scale is at least
    // amax / 127, hence no quotient exceeds 127, and 127 is representable.
    let mut by_chunk = [1f32; MAX_DIM / LANES];
    for (chunks, &divisor) in by_chunk.chunks_mut(group_len / LANES).zip(&divisors[..num_groups]) {
        chunks.fill(divisor);
    }
    let num_chunks = x.len() / LANES;
    let mut chunk = 0;
    while chunk + 4 <= num_chunks {
        let mut quotients = [s.splat(0.0); 4];
        for (i, quotient) in quotients.iter_mut().enumerate() {
            // SAFETY: a vector of x.
            let x = unsafe { s.load(x.as_ptr().add((chunk + i) * LANES)) };
            *quotient = s.div(x, s.splat(by_chunk[chunk + i]));
        }
        // SAFETY: four vectors of codes from chunk on.
        unsafe { s.store_codes_of_four(codes.as_mut_ptr().add(chunk * LANES), quotients) };
        chunk += 4;
    }
    while chunk < num_chunks {
        // SAFETY: one vector of x and of codes.
        unsafe {
            let quotient = s.div(s.load(x.as_ptr().add(chunk * LANES)), s.splat(by_chunk[chunk]));
            s.store_codes(codes.as_mut_ptr().add(chunk * LANES), quotient);
        }
        chunk += 1;
    }
}
