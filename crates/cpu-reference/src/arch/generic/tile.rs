//! The two inner loops over a tile: q.k and p.v, a block of query rows at a time.
//!
//! A block has `R` rows. Logits and weights lie token by token, `RS` (R rounded up to a power of two) to a token, so
//! that one vector holds `LANES / RS` tokens. Loops are written so that sums stay in registers: the counts of rows,
//! tokens and chunks that are taken at once come from the caller, who knows how many registers there are.

use super::rows::{LINE, SideRows, TILE};
use super::side::{SCALE_STRIDE, Tile};
use super::{Loop, Simd};
use crate::stage1::MAX_BLOCK;

/// Sums that one transposition takes.
const SUMS: usize = 8;

/// Rows that will be needed next, fetched while others are computed.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    rows: &'a SideRows,
    pub is_due: bool,
    head_dim: usize,
    /// Offset of a row's second cache line; 0 if it has one.
    second: usize,
    /// 2^16 over the row's chunks, rounded up.
    per_chunk: usize,
}

impl<'a> Ahead<'a> {
    /// `per_chunk` is [`Self::per_chunk`] of the row's chunks.
    #[inline(always)]
    pub(crate) fn new(rows: &'a SideRows, is_due: bool, head_dim: usize, per_chunk: usize) -> Self {
        Self { rows, is_due, head_dim, second: if head_dim > LINE { LINE } else { 0 }, per_chunk }
    }

    /// A division, which is done once.
    #[inline(always)]
    pub(crate) fn per_chunk(num_chunks: usize) -> usize {
        (1usize << 16).div_ceil(num_chunks.max(1))
    }

    /// Asks for rows `tokens`, modulo [`TILE`].
    #[inline(always)]
    fn fetch<S: Simd>(&self, s: S, tokens: std::ops::Range<usize>) {
        if self.is_due {
            for token in tokens {
                self.rows.prefetch(s, token, self.second, self.head_dim);
            }
        }
    }

    /// How many rows are to have been asked for when the chunks before `chunk` are done.
    #[inline(always)]
    fn due(&self, chunk: usize) -> usize {
        ((chunk * TILE * self.per_chunk) >> 16).min(TILE)
    }
}

/// Logits `[token][RS]` of a tile: q.k without softmax_scale. `TB` tokens at once; `TB * RS` is a multiple of 8.
///
/// `CPG` chunks share a scale; 0 if that is not known, and `MODE` says how a chunk is made.
pub(crate) struct Dot<'a, const R: usize, const RS: usize, const TB: usize, const CPG: usize, const MODE: u8>
{
    /// `[num_chunks][R][LANES]`.
    q: *const f32,
    num_chunks: usize,
    tile: Tile<'a>,
    len: usize,
    ahead: Ahead<'a>,
    /// `[TILE][RS]`.
    logits: *mut f32,
}

impl<'a, const R: usize, const RS: usize, const TB: usize, const CPG: usize, const MODE: u8>
    Dot<'a, R, RS, TB, CPG, MODE>
{
    /// # Safety
    /// `q` is `[num_chunks][R][LANES]`; `tile` has as many chunks and, where `CPG` is not 0, a multiple of it; `logits` has
    /// room for `TILE * RS`; `len <= TILE` and `TILE` is a multiple of `TB`.
    #[inline(always)]
    pub(crate) unsafe fn new(
        q: *const f32,
        num_chunks: usize,
        tile: Tile<'a>,
        len: usize,
        ahead: Ahead<'a>,
        logits: *mut f32,
    ) -> Self {
        Self { q, num_chunks, tile, len, ahead, logits }
    }
}

impl<S: Simd, const R: usize, const RS: usize, const TB: usize, const CPG: usize, const MODE: u8> Loop<S>
    for Dot<'_, R, RS, TB, CPG, MODE>
{
    #[inline(always)]
    fn run(self, s: S) {
        let Self { q, num_chunks, tile, len, ahead, logits } = self;
        let mut first = 0;
        while first < len {
            let mut sums = [[s.splat(0.0); R]; TB];
            ahead.fetch(s, first..first + TB);
            if CPG == 0 {
                for chunk in 0..num_chunks {
                    for t in 0..TB {
                        // SAFETY: first + t < TILE, and every row has num_chunks chunks.
                        unsafe {
                            let k = tile.values::<S, MODE>(s, first + t, chunk);
                            for r in 0..R {
                                let q = s.load(q.add((chunk * R + r) * S::LANES));
                                sums[t][r] = s.mul_add(q, k, sums[t][r]);
                            }
                        }
                    }
                }
            } else {
                let mut rows = [std::ptr::null(); TB];
                rows.copy_from_slice(&tile.codes[first..first + TB]);
                let mut q = q;
                let num_groups = num_chunks.checked_div(CPG).unwrap_or(0);
                for group in 0..num_groups {
                    for c in 0..CPG {
                        for t in 0..TB {
                            // SAFETY: as above.
                            unsafe {
                                let scale = tile.scale(s, first + t, group);
                                let k = s.mul(Tile::codes(s, rows[t], group * CPG + c), scale);
                                for r in 0..R {
                                    sums[t][r] = s.mul_add(s.load(q.add(r * S::LANES)), k, sums[t][r]);
                                }
                            }
                        }
                        // SAFETY: at most the end of q.
                        q = unsafe { q.add(R * S::LANES) };
                    }
                }
            }
            // SAFETY: logits has room for TILE * RS.
            unsafe { store_logits::<S, R, RS, TB>(s, &sums, logits.add(first * RS)) };
            first += TB;
        }
    }
}

/// Words of [`IntDot`]'s query for each row and vector: codes, offsets, scales.
pub(crate) const INT_WORDS: usize = 3;

/// [`Dot`] in integers: the query quantized too, each 32 channels on a scale of their own.
pub(crate) struct IntDot<'a, const R: usize, const RS: usize, const TB: usize> {
    /// `[num_vectors][R]` times `4 * LANES` codes, `LANES` offsets as of [`Simd::dot_codes`], `LANES` scales.
    q: *const f32,
    num_vectors: usize,
    tile: Tile<'a>,
    len: usize,
    ahead: Ahead<'a>,
    logits: *mut f32,
}

impl<'a, const R: usize, const RS: usize, const TB: usize> IntDot<'a, R, RS, TB> {
    /// # Safety
    /// As of [`Dot::new`], with vectors of `4 * LANES` codes, each 32 of which are of one group of K.
    #[inline(always)]
    pub(crate) unsafe fn new(
        q: *const f32,
        num_vectors: usize,
        tile: Tile<'a>,
        len: usize,
        ahead: Ahead<'a>,
        logits: *mut f32,
    ) -> Self {
        Self { q, num_vectors, tile, len, ahead, logits }
    }
}

impl<S: Simd, const R: usize, const RS: usize, const TB: usize> Loop<S> for IntDot<'_, R, RS, TB> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { q, num_vectors, tile, len, ahead, logits } = self;
        let mut first = 0;
        while first < len {
            let mut sums = [[s.splat(0.0); R]; TB];
            ahead.fetch(s, first..first + TB);
            for vector in 0..num_vectors {
                for t in 0..TB {
                    // SAFETY: first + t < TILE, every row has num_vectors vectors, and q has R of each.
                    unsafe {
                        let k = tile.codes[first + t].add(vector * 4 * S::LANES).cast();
                        let scale = tile.scale_of_codes(s, first + t, vector);
                        for r in 0..R {
                            let q = q.add((vector * R + r) * INT_WORDS * S::LANES);
                            let products = s.dot_codes(k, q.cast(), q.add(S::LANES).cast());
                            let products = s.mul(products, s.load(q.add(2 * S::LANES)));
                            sums[t][r] = s.mul_add(products, scale, sums[t][r]);
                        }
                    }
                }
            }
            // SAFETY: logits has room for TILE * RS.
            unsafe { store_logits::<S, R, RS, TB>(s, &sums, logits.add(first * RS)) };
            first += TB;
        }
    }
}

/// Stores the sums of the lanes of `TB` tokens' `R` rows, `[TB][RS]`.
///
/// # Safety
/// `TB * RS` f32 are writable.
#[inline(always)]
unsafe fn store_logits<S: Simd, const R: usize, const RS: usize, const TB: usize>(
    s: S,
    sums: &[[S::F; R]; TB],
    logits: *mut f32,
) {
    const { assert!((TB * RS).is_multiple_of(SUMS) && R <= RS && TILE.is_multiple_of(TB)) };
    let tokens = SUMS / RS;
    for block in 0..TB * RS / SUMS {
        let mut rows = [s.splat(0.0); SUMS];
        for t in 0..tokens {
            rows[t * RS..t * RS + R].copy_from_slice(&sums[block * tokens + t]);
        }
        // SAFETY: eight logits of this block of tokens.
        unsafe { s.store_sums(&rows, logits.add(block * SUMS)) };
    }
}

/// Weights times the scales of some groups of V, `[group][token][RS]` like the weights.
pub(crate) struct ScaleWeights<'a, const RS: usize> {
    pub weights: &'a [f32; TILE * MAX_BLOCK],
    /// [`SCALE_STRIDE`] of each group.
    pub scales: &'a [f32],
    pub len: usize,
    pub scaled: &'a mut [[f32; TILE * MAX_BLOCK]],
}

impl<S: Simd, const RS: usize> Loop<S> for ScaleWeights<'_, RS> {
    #[inline(always)]
    fn run(self, s: S) {
        assert!(self.len <= TILE && RS <= MAX_BLOCK);
        let mut at = 0;
        while at < self.len * RS {
            // SAFETY: TILE * RS is a multiple of the lanes; behind a group's scales there is room for a vector.
            unsafe {
                let weights = s.load(self.weights.as_ptr().add(at));
                for (scales, scaled) in self.scales.chunks_exact(SCALE_STRIDE).zip(&mut *self.scaled) {
                    let scale = s.load_repeated::<RS>(scales.as_ptr().add(at / RS));
                    s.store(scaled.as_mut_ptr().add(at), s.mul(weights, scale));
                }
            }
            at += S::LANES;
        }
    }
}

/// `o = o * rescale + sum p v` over a tile, for `R` rows of a block and chunks `first..end`.
///
/// Taken at once: `CB` chunks and `TU` tokens, which share `SUMS_OF` sums for each row and chunk.
pub(crate) struct Values<
    'a,
    const R: usize,
    const RS: usize,
    const CB: usize,
    const TU: usize,
    const SUMS_OF: usize,
    const MODE: u8,
> {
    pass: Pass<'a>,
}

/// What [`Values`] needs to know.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    /// `[token][RS]` for each group.
    pub weights: *const f32,
    /// From the weights of a group to those of the next.
    pub group_stride: usize,
    pub tile: Tile<'a>,
    pub len: usize,
    pub first: usize,
    pub end: usize,
    pub chunks_per_group: usize,
    /// Rows that are fetched meanwhile, spread over all chunks and tokens.
    pub ahead: Ahead<'a>,
    /// One a row.
    pub rescale: &'a [f32],
    pub o: *mut f32,
    pub o_stride: usize,
}

impl<
    'a,
    const R: usize,
    const RS: usize,
    const CB: usize,
    const TU: usize,
    const SUMS_OF: usize,
    const MODE: u8,
> Values<'a, R, RS, CB, TU, SUMS_OF, MODE>
{
    /// # Safety
    /// `weights` holds `len * RS` f32 a group (but for the rows before) of which a token's first `R` are taken; `o` has `R` rows of
    /// `o_stride` f32 and `end` chunks in each; `tile` has as many, `len <= TILE`, and `MODE` fits it.
    #[inline(always)]
    pub(crate) unsafe fn new(pass: Pass<'a>) -> Self {
        Self { pass }
    }
}

impl<
    S: Simd,
    const R: usize,
    const RS: usize,
    const CB: usize,
    const TU: usize,
    const SUMS_OF: usize,
    const MODE: u8,
> Loop<S> for Values<'_, R, RS, CB, TU, SUMS_OF, MODE>
{
    #[inline(always)]
    fn run(self, s: S) {
        let Self { mut pass } = self;
        let mut chunk = pass.first;
        // SAFETY: as promised to `new`.
        unsafe {
            while chunk < pass.end {
                let group_end = (chunk + pass.chunks_per_group).min(pass.end);
                while chunk + CB <= group_end {
                    values::<S, R, RS, CB, TU, SUMS_OF, MODE>(s, &pass, chunk);
                    chunk += CB;
                }
                while chunk < group_end {
                    values::<S, R, RS, 1, TU, SUMS_OF, MODE>(s, &pass, chunk);
                    chunk += 1;
                }
                pass.weights = pass.weights.wrapping_add(pass.group_stride);
            }
        }
    }
}

/// Chunks `chunk..chunk + CB`.
///
/// # Safety
/// As of [`Values::new`], and these chunks are below `end`.
#[inline(always)]
unsafe fn values<
    S: Simd,
    const R: usize,
    const RS: usize,
    const CB: usize,
    const TU: usize,
    const SUMS_OF: usize,
    const MODE: u8,
>(
    s: S,
    pass: &Pass<'_>,
    chunk: usize,
) {
    const { assert!(SUMS_OF <= TU && R <= RS) };
    let Pass { weights, tile, len, rescale, o, o_stride, .. } = *pass;
    let ahead = pass.ahead;
    ahead.fetch(s, ahead.due(chunk)..ahead.due(chunk + CB));
    let mut sums = [[[s.splat(0.0); CB]; R]; SUMS_OF];
    let mut token = 0;
    while token + TU <= len {
        for u in 0..TU {
            // SAFETY: token + u < len; the rest is the caller's.
            unsafe {
                let p = weights.add((token + u) * RS);
                add_values::<S, R, CB, MODE>(s, p, tile, token + u, chunk, &mut sums[u % SUMS_OF]);
            }
        }
        token += TU;
    }
    while token < len {
        // SAFETY: as above.
        unsafe {
            let p = weights.add(token * RS);
            add_values::<S, R, CB, MODE>(s, p, tile, token, chunk, &mut sums[0]);
        }
        token += 1;
    }
    for r in 0..R {
        let rescale = s.splat(rescale[r]);
        for c in 0..CB {
            let mut sum = sums[0][r][c];
            for u in 1..SUMS_OF {
                sum = s.add(sum, sums[u][r][c]);
            }
            // SAFETY: chunk + c is a chunk of row r.
            unsafe {
                let at = o.add(r * o_stride + (chunk + c) * S::LANES);
                s.store(at, s.mul_add(s.load(at), rescale, sum));
            }
        }
    }
}

/// `sums += p v` for one token. A function, not a closure: closures are not inlined into a caller's target features.
///
/// # Safety
/// `weights` holds `R` f32; the rest as of [`values`].
#[inline(always)]
unsafe fn add_values<S: Simd, const R: usize, const CB: usize, const MODE: u8>(
    s: S,
    weights: *const f32,
    tile: Tile<'_>,
    token: usize,
    chunk: usize,
    sums: &mut [[S::F; CB]; R],
) {
    let mut v = [s.splat(0.0); CB];
    for c in 0..CB {
        // SAFETY: the caller's.
        v[c] = unsafe { tile.values::<S, MODE>(s, token, chunk + c) };
    }
    for r in 0..R {
        // SAFETY: the caller's.
        let p = unsafe { s.splat(*weights.add(r)) };
        for c in 0..CB {
            sums[r][c] = s.mul_add(p, v[c], sums[r][c]);
        }
    }
}
