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
    let tile_end = |start: u32| item.token_end.min(start.saturating_add(step.tile_len));
    let mut tables = [Rows::empty(), Rows::empty()];
    let mut scratch = Scratch {
        weights: Aligned([0.0; TILE * MAX_BLOCK]),
        scaled: Aligned([[0.0; TILE * MAX_BLOCK]; GROUPS]),
        rescale: [0.0; MAX_BLOCK],
    };
    let mut memory = [SideMemory::uninit(), SideMemory::uninit()];
    let [k, v] = &mut memory;
    let (mut k, mut v) = (Side::new(s, &step.k, k), Side::new(s, &step.v, v));
    let per_chunk = Ahead::per_chunk(step.head_dim.div_ceil(S::LANES));
    let (mut start, mut head, mut turn) = (item.token_start, 0, false);
    tables[0].look_up(step, request, first_head as u64, start, tile_end(start));
    while start < item.token_end {
        // One tile ahead, so that its rows are on their way while this one is computed. The next tile is the next head's: the
        // heads of a page are neighbours in memory.
        let [a, b] = &mut tables;
        let (table, next) = if turn { (b, a) } else { (a, b) };
        let (next_start, next_head) =
            if head + 1 < num_heads { (start, head + 1) } else { (tile_end(start), 0) };
        let (page_head, tokens) = ((first_head + next_head) as u64, [next_start, tile_end(next_start)]);
        if next_head > 0 {
            next.next_head(table, step, request, page_head, tokens);
        } else {
            next.look_up(step, request, page_head, tokens[0], tokens[1]);
        }
        let (table, next) = (&*table, &*next);
        // A line of each page, so that the CPU looks up their addresses side by side, not one after another when rows are
        // fetched.
        for token in (15..TILE).step_by(16) {
            s.prefetch(next.k.codes[token]);
            s.prefetch(next.v.codes[token]);
        }
        let q = &q[head * o_len..(head + 1) * o_len];
        let o = &mut o[head * o_len..(head + 1) * o_len];
        let ml = &mut ml[head * ml_len..(head + 1) * ml_len];
        let (modes, chunks_per_group) = ([k.mode, v.mode], [k.chunks_per_group, v.chunks_per_group]);
        k.load(s, &step.k, &table.k, table.len);
        let mut first = 0;
        while first < rows {
            let num_rows = (rows - first).min(MAX_BLOCK);
            let mask = step.block_mask(request, first_head + head, first, num_rows);
            // The first block fetches for all.
            let ahead = |rows| Ahead::new(rows, first == 0, step.head_dim, per_chunk);
            let block = Block {
                step,
                mask: &mask,
                first_token: start,
                len: table.len,
                k: k.tile(&table.k),
                modes,
                chunks_per_group,
                fetched: [ahead(&table.v), ahead(&next.k)],
                num_rows,
                q: &q[first * padded_dim..(first + num_rows) * padded_dim],
            };
            let o = &mut o[first * padded_dim..(first + num_rows) * padded_dim];
            block.weigh(s, &mut scratch, &mut ml[first * 2..(first + num_rows) * 2]);
            // V's scales lie behind its codes, which have been fetched by now.
            if first == 0 {
                v.load(s, &step.v, &table.v, table.len);
            }
            block.add(s, v.tile(&table.v), &mut scratch, o);
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
    /// How chunks of K and of V are made.
    modes: [u8; 2],
    chunks_per_group: [usize; 2],
    /// Rows that are fetched meanwhile: this tile's V during q.k, the next tile's K during p.v.
    fetched: [Ahead<'a>; 2],
    num_rows: usize,
    /// `[chunk][row][lane]`.
    q: &'a [f32],
}

impl Block<'_> {
    /// Logits, and weights relative to the new maxima.
    #[inline(always)]
    fn weigh<S: Simd>(&self, s: S, scratch: &mut Scratch, ml: &mut [f32]) {
        // Rows, rows rounded up to a power of two, tokens at once in q.k.
        if S::LANES == 16 {
            match self.num_rows {
                1 => self.weigh_rows::<S, 1, 1, 8>(s, scratch, ml),
                2 => self.weigh_rows::<S, 2, 2, 8>(s, scratch, ml),
                3 => self.weigh_rows::<S, 3, 4, 4>(s, scratch, ml),
                4 => self.weigh_rows::<S, 4, 4, 4>(s, scratch, ml),
                5 => self.weigh_rows::<S, 5, 8, 2>(s, scratch, ml),
                6 => self.weigh_rows::<S, 6, 8, 2>(s, scratch, ml),
                7 => self.weigh_rows::<S, 7, 8, 2>(s, scratch, ml),
                _ => self.weigh_rows::<S, 8, 8, 2>(s, scratch, ml),
            }
        } else {
            match self.num_rows {
                1 => self.weigh_rows::<S, 1, 1, 8>(s, scratch, ml),
                2 => self.weigh_rows::<S, 2, 2, 4>(s, scratch, ml),
                3 => self.weigh_rows::<S, 3, 4, 2>(s, scratch, ml),
                4 => self.weigh_rows::<S, 4, 4, 2>(s, scratch, ml),
                5 => self.weigh_rows::<S, 5, 8, 1>(s, scratch, ml),
                6 => self.weigh_rows::<S, 6, 8, 1>(s, scratch, ml),
                7 => self.weigh_rows::<S, 7, 8, 1>(s, scratch, ml),
                _ => self.weigh_rows::<S, 8, 8, 1>(s, scratch, ml),
            }
        }
    }

    #[inline(always)]
    fn weigh_rows<S: Simd, const R: usize, const RS: usize, const TB: usize>(
        &self,
        s: S,
        scratch: &mut Scratch,
        ml: &mut [f32],
    ) {
        self.dot::<S, R, RS, TB>(s, &mut scratch.weights);
        s.run(Softmax::<RS> {
            rule: &self.step.rule,
            mask: self.mask,
            first_token: self.first_token,
            len: self.len,
            logits: &mut scratch.weights.0,
            ml,
            rescale: &mut scratch.rescale,
        });
    }

    #[inline(always)]
    fn dot<S: Simd, const R: usize, const RS: usize, const TB: usize>(&self, s: S, logits: &mut Weights) {
        // Not of the padded length, which may be a vector longer than the row is readable.
        let n = self.step.head_dim.div_ceil(S::LANES);
        let [ahead, _] = self.fetched;
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

    /// Adds the weighted values to `o`.
    #[inline(always)]
    fn add<S: Simd>(&self, s: S, v: Tile<'_>, scratch: &mut Scratch, o: &mut [f32]) {
        // Rows go through p.v by four at most: more sums do not fit into registers.
        match self.num_rows {
            1 => self.add_rows::<S, 1>(s, v, scratch, [1, 0], o),
            2 => self.add_rows::<S, 2>(s, v, scratch, [2, 0], o),
            3 => self.add_rows::<S, 4>(s, v, scratch, [3, 0], o),
            4 => self.add_rows::<S, 4>(s, v, scratch, [4, 0], o),
            5 => self.add_rows::<S, 8>(s, v, scratch, [3, 2], o),
            6 => self.add_rows::<S, 8>(s, v, scratch, [3, 3], o),
            7 => self.add_rows::<S, 8>(s, v, scratch, [4, 3], o),
            _ => self.add_rows::<S, 8>(s, v, scratch, [4, 4], o),
        }
    }

    #[inline(always)]
    fn add_rows<S: Simd, const RS: usize>(
        &self,
        s: S,
        v: Tile<'_>,
        scratch: &mut Scratch,
        parts: [usize; 2],
        o: &mut [f32],
    ) {
        let num_chunks = self.step.head_dim.div_ceil(S::LANES);
        let chunks_per_group = self.chunks_per_group[1];
        let Scratch { weights, scaled, rescale } = scratch;
        let mut pass = Pass {
            weights: weights.0.as_ptr(),
            group_stride: 0,
            tile: v,
            len: self.len,
            first: 0,
            end: num_chunks,
            chunks_per_group: num_chunks,
            ahead: self.fetched[1],
            rescale,
            o: o.as_mut_ptr(),
            o_stride: self.step.padded_dim,
        };
        // SAFETY: weights are TILE * MAX_BLOCK, RS to a token, for each group where there are several; o has as many rows as
        // the parts say; V was loaded for this tile with num_chunks chunks, in the mode that is matched.
        unsafe {
            match self.modes[1] {
                FLOATS => run_parts::<S, RS, FLOATS>(s, pass, parts),
                TWO_SCALES => run_parts::<S, RS, TWO_SCALES>(s, pass, parts),
                _ if chunks_per_group < 2 => run_parts::<S, RS, ONE_SCALE>(s, pass, parts),
                _ => {
                    pass.chunks_per_group = chunks_per_group;
                    for scales in v.scales.chunks(GROUPS * SCALE_STRIDE) {
                        s.run(ScaleWeights::<RS> {
                            weights: &weights.0,
                            scales,
                            len: self.len,
                            scaled: &mut scaled.0,
                        });
                        pass.weights = scaled.0.as_ptr().cast();
                        pass.group_stride = TILE * MAX_BLOCK;
                        pass.end =
                            (pass.first + scales.len() / SCALE_STRIDE * chunks_per_group).min(num_chunks);
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
                (_, 3) if RS == 4 && MODE == NO_SCALE => s.run(Values::<3, 4, 2, 8, 2, MODE>::new(pass)),
                (_, 3) if RS == 4 => s.run(Values::<3, 4, 4, 2, 1, MODE>::new(pass)),
                (_, 3) if MODE == NO_SCALE => s.run(Values::<3, 8, 2, 8, 2, MODE>::new(pass)),
                (_, 3) => s.run(Values::<3, 8, 4, 2, 1, MODE>::new(pass)),
                (_, 4) if RS == 4 && MODE == NO_SCALE => s.run(Values::<4, 4, 2, 8, 1, MODE>::new(pass)),
                (_, 4) if RS == 4 => s.run(Values::<4, 4, 2, 2, 1, MODE>::new(pass)),
                (_, 4) if MODE == NO_SCALE => s.run(Values::<4, 8, 2, 4, 1, MODE>::new(pass)),
                (_, 4) => s.run(Values::<4, 8, 2, 2, 1, MODE>::new(pass)),
                _ => return,
            }
            pass.weights = pass.weights.add(part);
            pass.o = pass.o.add(part * pass.o_stride);
        }
        pass.rescale = pass.rescale.get(part..).unwrap_or_default();
        pass.ahead.is_due = false;
    }
}

/// Groups of V whose scaled weights are made at once.
const GROUPS: usize = 4;

/// Vectors of the widest instance start on cache lines.
#[repr(align(64))]
struct Aligned<T>(T);

type Weights = Aligned<[f32; TILE * MAX_BLOCK]>;

/// What a block leaves for its next step.
struct Scratch {
    /// Logits that become weights.
    weights: Weights,
    /// Weights times the scales of some groups of V.
    scaled: Aligned<[[f32; TILE * MAX_BLOCK]; GROUPS]>,
    /// Factors of the sums so far.
    rescale: [f32; MAX_BLOCK],
}
