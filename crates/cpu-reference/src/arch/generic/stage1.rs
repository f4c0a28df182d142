//! Stage 1 over one work item of one or more kv heads: tiles of tokens outside, then heads, then blocks of query rows.

use super::Simd;
use super::rows::{FLOATS, ONE_SCALE, Rows, Side, TILE, TWO_SCALES, Tile};
use super::softmax::{BlockMask, softmax};
use super::tile::{self, Ahead};
use crate::stage1::{Step, Unit};

/// The most query rows that one pass over a tile serves.
const MAX_BLOCK: usize = 8;

/// Fills `o` (`[num_heads][rows][padded_dim]`) and `ml` (`[num_heads][rows][2]`) of one unit.
///
/// Inlined into a function that has the instruction set's target features.
#[inline(always)]
pub(crate) fn attend<S: Simd>(s: S, step: &Step<'_>, unit: Unit<'_>) {
    let Unit { item, first_head, num_heads, q, o, ml } = unit;
    let (rows, padded_dim) = (step.rows, step.padded_dim);
    let (o_len, ml_len) = (rows * padded_dim, rows * 2);
    assert!(q.len() >= num_heads * o_len && o.len() >= num_heads * o_len && ml.len() >= num_heads * ml_len);
    o.fill(0.0);
    for ml in ml.chunks_exact_mut(2) {
        ml.copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
    }
    let request = item.request_idx as usize;
    let tile_end = |start: u32| item.token_end.min(start.saturating_add(TILE as u32));
    let look_up = |table: &mut Rows, start: u32, head: usize| {
        table.look_up(step, request, (first_head + head) as u64, start, tile_end(start));
    };
    let mut tables = [Rows::empty(), Rows::empty()];
    let (mut k, mut v) = (Side::new(s, &step.k), Side::new(s, &step.v));
    let (mut start, mut head, mut turn) = (item.token_start, 0, false);
    look_up(&mut tables[0], start, head);
    while start < item.token_end {
        // One tile ahead, so that its rows are on their way while this one is computed. Where the heads of a token are
        // neighbours in memory, the next tile is the next head's.
        let (next_start, next_head) =
            if head + 1 < num_heads { (start, head + 1) } else { (tile_end(start), 0) };
        let [a, b] = &mut tables;
        let (table, next) = if turn { (b, a) } else { (a, b) };
        look_up(next, next_start, next_head);
        let (table, next) = (&*table, &*next);
        let q = &q[head * o_len..(head + 1) * o_len];
        let o = &mut o[head * o_len..(head + 1) * o_len];
        let ml = &mut ml[head * ml_len..(head + 1) * ml_len];
        let modes = [k.mode, v.mode];
        let k = k.load(s, &step.k, &table.k, table.len);
        let v = v.load(s, &step.v, &table.v, table.len);
        let mut first = 0;
        while first < rows {
            let ahead_len = if first == 0 { next.len } else { 0 };
            let num_rows = block_len(rows - first);
            let mask = step.block_mask(request, first_head + head, first, num_rows);
            let block = Block {
                step,
                mask: &mask,
                first_token: start,
                len: table.len,
                k,
                v,
                modes,
                next,
                ahead_len,
                q: &q[first * padded_dim..(first + num_rows) * padded_dim],
            };
            let o = &mut o[first * padded_dim..(first + num_rows) * padded_dim];
            let ml = &mut ml[first * 2..(first + num_rows) * 2];
            // R, R rounded up to a power of two, tokens at once in q.k, chunks at once in p.v.
            if S::LANES == 16 {
                match num_rows {
                    1 => block.run::<S, 1, 1, 16, 8>(s, o, ml),
                    2 => block.run::<S, 2, 2, 8, 8>(s, o, ml),
                    3 => block.run::<S, 3, 4, 4, 4>(s, o, ml),
                    4 => block.run::<S, 4, 4, 4, 4>(s, o, ml),
                    _ => block.run::<S, 8, 8, 2, 2>(s, o, ml),
                }
            } else {
                match num_rows {
                    1 => block.run::<S, 1, 1, 8, 4>(s, o, ml),
                    2 => block.run::<S, 2, 2, 4, 4>(s, o, ml),
                    3 => block.run::<S, 3, 4, 2, 2>(s, o, ml),
                    4 => block.run::<S, 4, 4, 2, 2>(s, o, ml),
                    _ => block.run::<S, 8, 8, 1, 1>(s, o, ml),
                }
            }
            first += num_rows;
        }
        (start, head, turn) = (next_start, next_head, !turn);
    }
}

/// Rows of the next block, `left` being left: 8 where possible, then 4, 3, 2 or 1 so that 5 to 7 take two passes.
fn block_len(left: usize) -> usize {
    match left {
        8.. => 8,
        7 | 4 => 4,
        3 | 5 | 6 => 3,
        _ => left,
    }
}

/// A block of query rows against a tile.
struct Block<'a> {
    step: &'a Step<'a>,
    mask: &'a BlockMask,
    first_token: u32,
    len: usize,
    k: Tile<'a>,
    v: Tile<'a>,
    /// How chunks of K and of V are made.
    modes: [u8; 2],
    /// The next tile's rows, and how many of them this block is to fetch.
    next: &'a Rows,
    ahead_len: usize,
    q: &'a [f32],
}

impl Block<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const RS: usize, const TB: usize, const CB: usize>(
        &self,
        s: S,
        o: &mut [f32],
        ml: &mut [f32],
    ) {
        let stride = self.step.padded_dim;
        // Not of the padded length, which may be a vector longer than the row is readable.
        let num_chunks = self.step.head_dim.div_ceil(S::LANES);
        let mut logits = [0f32; TILE * MAX_BLOCK];
        let head_dim = self.step.head_dim;
        let k_ahead = Ahead { rows: &self.next.k, len: self.ahead_len, head_dim };
        let mut v_ahead = Ahead { rows: &self.next.v, ..k_ahead };
        // SAFETY: q and o have R rows of padded_dim >= num_chunks * LANES; logits has room for TILE * RS, and TB divides
        // TILE; both sides were loaded for this tile with rows of num_chunks * LANES codes.
        unsafe {
            let (q, logits) = (self.q.as_ptr(), logits.as_mut_ptr());
            let (k, len) = (self.k, self.len);
            match self.modes[0] {
                FLOATS => {
                    tile::dot::<S, R, RS, TB, FLOATS>(s, q, stride, num_chunks, k, len, k_ahead, logits)
                }
                TWO_SCALES => {
                    tile::dot::<S, R, RS, TB, TWO_SCALES>(s, q, stride, num_chunks, k, len, k_ahead, logits)
                }
                _ => tile::dot::<S, R, RS, TB, ONE_SCALE>(s, q, stride, num_chunks, k, len, k_ahead, logits),
            }
        }
        let (mut m, mut l) = ([f32::NEG_INFINITY; MAX_BLOCK], [0f32; MAX_BLOCK]);
        for (r, ml) in ml.chunks_exact(2).enumerate().take(R) {
            (m[r], l[r]) = (ml[0], ml[1]);
        }
        let rule = &self.step.rule;
        let rescale =
            softmax::<S, R, RS>(s, rule, self.mask, self.first_token, self.len, &mut logits, &mut m, &mut l);
        for (r, ml) in ml.chunks_exact_mut(2).enumerate().take(R) {
            ml.copy_from_slice(&[m[r], l[r]]);
        }
        let (weights, o) = (logits.as_ptr(), o.as_mut_ptr());
        let mut chunk = 0;
        // SAFETY: as above; chunk + CB (or + 1) <= num_chunks.
        unsafe {
            while chunk + CB <= num_chunks {
                self.values::<S, R, RS, CB>(s, weights, chunk, v_ahead, &rescale, o);
                chunk += CB;
                v_ahead.len = 0;
            }
            while chunk < num_chunks {
                self.values::<S, R, RS, 1>(s, weights, chunk, v_ahead, &rescale, o);
                chunk += 1;
                v_ahead.len = 0;
            }
        }
    }

    /// [`tile::values`] for the way V's chunks are made.
    ///
    /// # Safety
    /// As [`tile::values`].
    #[inline(always)]
    unsafe fn values<S: Simd, const R: usize, const RS: usize, const CB: usize>(
        &self,
        s: S,
        weights: *const f32,
        chunk: usize,
        ahead: Ahead<'_>,
        rescale: &[f32; 8],
        o: *mut f32,
    ) {
        let (v, len, stride) = (self.v, self.len, self.step.padded_dim);
        // SAFETY: the caller's.
        unsafe {
            match self.modes[1] {
                FLOATS => {
                    tile::values::<S, R, RS, CB, FLOATS>(s, weights, v, len, chunk, ahead, rescale, o, stride)
                }
                TWO_SCALES => tile::values::<S, R, RS, CB, TWO_SCALES>(
                    s, weights, v, len, chunk, ahead, rescale, o, stride,
                ),
                _ => tile::values::<S, R, RS, CB, ONE_SCALE>(
                    s, weights, v, len, chunk, ahead, rescale, o, stride,
                ),
            }
        }
    }
}
