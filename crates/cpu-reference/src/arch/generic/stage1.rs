//! Stage 1 over one work item of one or more kv heads: tiles of tokens outside, then heads, then blocks of query rows.

use super::Simd;
use super::rows::{Rows, TILE};
use super::side::{FLOATS, NO_SCALE, ONE_SCALE, SCALE_STRIDE, Side, SideMemory, TWO_SCALES, Tile};
use super::softmax::{BlockMask, Softmax};
use super::tile::{Ahead, Dot, IntDot, Pass, ScaleWeights, Values};
use crate::stage1::{MAX_BLOCK, Step, Unit};

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
    let mut tables = [Rows::empty(), Rows::empty()];
    // Logits that become weights, and weights times the scales of one group of V.
    let mut scratch = [const { Aligned([0f32; TILE * MAX_BLOCK]) }; 2];
    let mut memory = [SideMemory::uninit(), SideMemory::uninit()];
    let [k, v] = &mut memory;
    let (mut k, mut v) = (Side::new(s, &step.k, k), Side::new(s, &step.v, v));
    let (mut start, mut head, mut turn) = (item.token_start, 0, false);
    tables[0].look_up(step, request, first_head as u64, start, tile_end(start));
    while start < item.token_end {
        // One tile ahead, so that its rows are on their way while this one is computed. The next tile is the next head's: the
        // heads of a page are neighbours in memory.
        let (next_start, next_head) =
            if head + 1 < num_heads { (start, head + 1) } else { (tile_end(start), 0) };
        let [a, b] = &mut tables;
        let (table, next) = if turn { (b, a) } else { (a, b) };
        next.look_up(step, request, (first_head + next_head) as u64, next_start, tile_end(next_start));
        let (table, next) = (&*table, &*next);
        let q = &q[head * o_len..(head + 1) * o_len];
        let o = &mut o[head * o_len..(head + 1) * o_len];
        let ml = &mut ml[head * ml_len..(head + 1) * ml_len];
        let (modes, chunks_per_group) = ([k.mode, v.mode], [k.chunks_per_group, v.chunks_per_group]);
        let k = k.load(s, &step.k, &table.k, table.len);
        let v = v.load(s, &step.v, &table.v, table.len);
        let mut first = 0;
        while first < rows {
            let num_rows = (rows - first).min(MAX_BLOCK);
            let mask = step.block_mask(request, first_head + head, first, num_rows);
            let block = Block {
                step,
                mask: &mask,
                first_token: start,
                len: table.len,
                k,
                v,
                modes,
                chunks_per_group,
                next,
                ahead_len: if first == 0 { next.len } else { 0 },
                num_rows,
                q: &q[first * padded_dim..(first + num_rows) * padded_dim],
            };
            let o = &mut o[first * padded_dim..(first + num_rows) * padded_dim];
            let ml = &mut ml[first * 2..(first + num_rows) * 2];
            block.run(s, &mut scratch, o, ml);
            first += num_rows;
        }
        (start, head, turn) = (next_start, next_head, !turn);
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
    chunks_per_group: [usize; 2],
    /// The next tile's rows, and how many of them this block is to fetch.
    next: &'a Rows,
    ahead_len: usize,
    num_rows: usize,
    /// `[chunk][row][lane]`.
    q: &'a [f32],
}

impl Block<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, scratch: &mut [Logits; 2], o: &mut [f32], ml: &mut [f32]) {
        // Rows, rows rounded up to a power of two, tokens at once in q.k.
        if S::LANES == 16 {
            match self.num_rows {
                1 => self.run_rows::<S, 1, 1, 8>(s, scratch, o, ml),
                2 => self.run_rows::<S, 2, 2, 8>(s, scratch, o, ml),
                3 => self.run_rows::<S, 3, 4, 4>(s, scratch, o, ml),
                4 => self.run_rows::<S, 4, 4, 4>(s, scratch, o, ml),
                5 => self.run_rows::<S, 5, 8, 2>(s, scratch, o, ml),
                6 => self.run_rows::<S, 6, 8, 2>(s, scratch, o, ml),
                7 => self.run_rows::<S, 7, 8, 2>(s, scratch, o, ml),
                _ => self.run_rows::<S, 8, 8, 2>(s, scratch, o, ml),
            }
        } else {
            match self.num_rows {
                1 => self.run_rows::<S, 1, 1, 8>(s, scratch, o, ml),
                2 => self.run_rows::<S, 2, 2, 4>(s, scratch, o, ml),
                3 => self.run_rows::<S, 3, 4, 4>(s, scratch, o, ml),
                4 => self.run_rows::<S, 4, 4, 2>(s, scratch, o, ml),
                5 => self.run_rows::<S, 5, 8, 1>(s, scratch, o, ml),
                6 => self.run_rows::<S, 6, 8, 1>(s, scratch, o, ml),
                7 => self.run_rows::<S, 7, 8, 1>(s, scratch, o, ml),
                _ => self.run_rows::<S, 8, 8, 1>(s, scratch, o, ml),
            }
        }
    }

    #[inline(always)]
    fn run_rows<S: Simd, const R: usize, const RS: usize, const TB: usize>(
        &self,
        s: S,
        scratch: &mut [Logits; 2],
        o: &mut [f32],
        ml: &mut [f32],
    ) {
        let [logits, scaled] = scratch;
        let mut rescale = [0f32; MAX_BLOCK];
        self.dot::<S, R, RS, TB>(s, logits);
        s.run(Softmax::<RS> {
            rule: &self.step.rule,
            mask: self.mask,
            first_token: self.first_token,
            len: self.len,
            logits: &mut logits.0,
            ml,
            rescale: &mut rescale,
        });
        // Rows go through p.v by four at most: more sums do not fit into registers.
        let parts = match R {
            5 => [3, 2],
            6 => [3, 3],
            7 => [4, 3],
            8 => [4, 4],
            _ => [R, 0],
        };
        self.values::<S, RS>(s, logits, scaled, &rescale, parts, o);
    }

    #[inline(always)]
    fn dot<S: Simd, const R: usize, const RS: usize, const TB: usize>(&self, s: S, logits: &mut Logits) {
        // Not of the padded length, which may be a vector longer than the row is readable.
        let n = self.step.head_dim.div_ceil(S::LANES);
        let ahead = Ahead { rows: &self.next.k, len: self.ahead_len, head_dim: self.step.head_dim };
        let (q, k, len, logits) = (self.q.as_ptr(), self.k, self.len, logits.0.as_mut_ptr());
        if self.step.is_integer {
            let n = self.step.head_dim / (4 * S::LANES);
            // SAFETY: q was packed for this; head_dim is a multiple of 64, and groups of K are multiples of 32.
            unsafe {
                let dot = IntDot::<R, RS, TB>::new(q, n, k, len, ahead, logits);
                match s.integer() {
                    Some(s) => s.run(dot),
                    None => s.run(dot),
                }
            }
            return;
        }
        // SAFETY: q has R rows of padded_dim >= n * LANES; logits has room for TILE * RS, and TB divides TILE; K was loaded
        // for this tile with rows of n * LANES codes, and groups of one head_dim are of one length.
        unsafe {
            match (self.modes[0], self.chunks_per_group[0]) {
                (FLOATS, _) => s.run(Dot::<R, RS, TB, 0, FLOATS>::new(q, n, k, len, ahead, logits)),
                (TWO_SCALES, _) => s.run(Dot::<R, RS, TB, 0, TWO_SCALES>::new(q, n, k, len, ahead, logits)),
                (_, 2) => s.run(Dot::<R, RS, TB, 2, ONE_SCALE>::new(q, n, k, len, ahead, logits)),
                (_, 4) => s.run(Dot::<R, RS, TB, 4, ONE_SCALE>::new(q, n, k, len, ahead, logits)),
                (_, 8) => s.run(Dot::<R, RS, TB, 8, ONE_SCALE>::new(q, n, k, len, ahead, logits)),
                _ => s.run(Dot::<R, RS, TB, 0, ONE_SCALE>::new(q, n, k, len, ahead, logits)),
            }
        }
    }

    #[inline(always)]
    fn values<S: Simd, const RS: usize>(
        &self,
        s: S,
        weights: &Logits,
        scaled: &mut Logits,
        rescale: &[f32; MAX_BLOCK],
        parts: [usize; 2],
        o: &mut [f32],
    ) {
        let num_chunks = self.step.head_dim.div_ceil(S::LANES);
        let chunks_per_group = self.chunks_per_group[1];
        let mut pass = Pass {
            weights: weights.0.as_ptr(),
            tile: self.v,
            len: self.len,
            num_chunks,
            first: 0,
            end: num_chunks,
            ahead: Ahead { rows: &self.next.v, len: self.ahead_len, head_dim: self.step.head_dim },
            rescale,
            o: o.as_mut_ptr(),
            o_stride: self.step.padded_dim,
        };
        // SAFETY: weights are TILE * MAX_BLOCK, RS to a token; o has as many rows as the parts say; V was loaded for this
        // tile with num_chunks chunks, in the mode that is matched.
        unsafe {
            match self.modes[1] {
                FLOATS => run_parts::<S, RS, FLOATS>(s, pass, parts),
                TWO_SCALES => run_parts::<S, RS, TWO_SCALES>(s, pass, parts),
                _ if chunks_per_group < 2 => run_parts::<S, RS, ONE_SCALE>(s, pass, parts),
                _ => {
                    for scales in self.v.scales.chunks_exact(SCALE_STRIDE) {
                        let (weights, scaled) = (&weights.0, &mut scaled.0);
                        pass.weights = scaled.as_ptr();
                        s.run(ScaleWeights::<RS> { weights, scales, len: self.len, scaled });
                        pass.end = (pass.first + chunks_per_group).min(num_chunks);
                        run_parts::<S, RS, NO_SCALE>(s, pass, parts);
                        pass.first = pass.end;
                    }
                }
            }
        }
    }
}

/// A pass over all rows of a block, which go by the counts of `parts`.
///
/// # Safety
/// As of [`Values::new`] for the sum of `parts`.
#[inline(always)]
unsafe fn run_parts<S: Simd, const RS: usize, const MODE: u8>(s: S, mut pass: Pass<'_>, parts: [usize; 2]) {
    for part in parts {
        // SAFETY: the caller's. Rows, of how many, chunks at once, tokens at once, sums. Parts of 1 are whole blocks, and those
        // of 4 are of 4 or more; the other instances are never called.
        unsafe {
            match (S::LANES, part) {
                (16, 1) => s.run(Values::<1, 1, 2, 4, 4, MODE>::new(pass)),
                (16, 2) if RS == 2 => s.run(Values::<2, 2, 2, 2, 2, MODE>::new(pass)),
                (16, 2) => s.run(Values::<2, 8, 2, 2, 2, MODE>::new(pass)),
                (16, 3) if RS == 4 => s.run(Values::<3, 4, 2, 2, 2, MODE>::new(pass)),
                (16, 3) => s.run(Values::<3, 8, 2, 2, 2, MODE>::new(pass)),
                (16, 4) if RS == 4 => s.run(Values::<4, 4, 2, 2, 2, MODE>::new(pass)),
                (16, 4) => s.run(Values::<4, 8, 2, 2, 2, MODE>::new(pass)),
                (_, 1) => s.run(Values::<1, 1, 4, 2, 2, MODE>::new(pass)),
                (_, 2) if RS == 2 => s.run(Values::<2, 2, 4, 2, 1, MODE>::new(pass)),
                (_, 2) => s.run(Values::<2, 8, 4, 2, 1, MODE>::new(pass)),
                (_, 3) if RS == 4 => s.run(Values::<3, 4, 4, 2, 1, MODE>::new(pass)),
                (_, 3) => s.run(Values::<3, 8, 4, 2, 1, MODE>::new(pass)),
                (_, 4) if RS == 4 => s.run(Values::<4, 4, 2, 2, 1, MODE>::new(pass)),
                (_, 4) => s.run(Values::<4, 8, 2, 2, 1, MODE>::new(pass)),
                _ => return,
            }
            pass.weights = pass.weights.add(part);
            pass.o = pass.o.add(part * pass.o_stride);
        }
        pass.rescale = &pass.rescale[part..];
        pass.ahead.len = 0;
    }
}

/// Vectors of the widest instance start on cache lines.
#[repr(align(64))]
struct Aligned<const N: usize>([f32; N]);

type Logits = Aligned<{ TILE * MAX_BLOCK }>;
