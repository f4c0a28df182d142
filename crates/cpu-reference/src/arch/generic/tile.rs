//! The two inner loops over a tile: q.k and p.v, a block of query rows at a time.
//!
//! A block has `R` rows. Logits and weights lie token by token, `RS` (R rounded up to a power of two) to a token, so
//! that one vector holds `LANES / RS` tokens.

use super::Simd;
use super::rows::{SideRows, TILE, Tile};

/// Rows that will be needed next, fetched while others are computed.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    pub rows: &'a SideRows,
    pub len: usize,
    pub head_dim: usize,
}

impl Ahead<'_> {
    #[inline(always)]
    fn fetch<S: Simd>(&self, s: S, token: usize) {
        if token < self.len {
            self.rows.prefetch(s, token, self.head_dim);
        }
    }
}

/// Logits `[token][RS]` of a tile: q.k without softmax_scale.
///
/// `TB * RS == LANES`: the sums of one block of tokens fill one vector.
///
/// # Safety
/// `q` has `R` rows of `q_stride` f32, `q_stride >= num_chunks * LANES`; `tile` has as many chunks; `logits` has room for `len` rounded up to `TB`, times `RS`; `len <= TILE` and `TILE` is a multiple of `TB`.
#[inline(always)]
pub(crate) unsafe fn dot<S: Simd, const R: usize, const RS: usize, const TB: usize, const MODE: u8>(
    s: S,
    q: *const f32,
    q_stride: usize,
    num_chunks: usize,
    tile: Tile<'_>,
    len: usize,
    ahead: Ahead<'_>,
    logits: *mut f32,
) {
    // Constant, so no code; instances for the other lane count exist but are never called.
    assert!(TB * RS == S::LANES && R <= RS && TILE.is_multiple_of(TB));
    let mut first = 0;
    while first < len {
        let mut sums = [s.splat(0.0); 16];
        for t in 0..TB {
            ahead.fetch(s, first + t);
        }
        for chunk in 0..num_chunks {
            let at = chunk * S::LANES;
            let mut q_chunk = [s.splat(0.0); 8];
            for r in 0..R {
                // SAFETY: within row r.
                q_chunk[r] = unsafe { s.load(q.add(r * q_stride + at)) };
            }
            for t in 0..TB {
                let token = first + t;
                // SAFETY: first + t < TILE, and every row has num_chunks chunks.
                let k = unsafe { tile.values::<S, MODE>(s, token, chunk) };
                for r in 0..R {
                    sums[t * RS + r] = s.mul_add(q_chunk[r], k, sums[t * RS + r]);
                }
            }
        }
        // SAFETY: LANES = TB * RS logits of this block of tokens.
        unsafe { s.store(logits.add(first * RS), s.sum_lanes(&sums)) };
        first += TB;
    }
}

/// `o = o * rescale + sum p v` over a tile, for `CB` chunks from `chunk` on.
///
/// # Safety
/// `weights` holds `len * RS` f32, `o` has `R` rows of `o_stride` f32 and `chunk + CB` chunks in each; `tile` has as
/// many.
#[inline(always)]
pub(crate) unsafe fn values<S: Simd, const R: usize, const RS: usize, const CB: usize, const MODE: u8>(
    s: S,
    weights: *const f32,
    tile: Tile<'_>,
    len: usize,
    chunk: usize,
    ahead: Ahead<'_>,
    rescale: &[f32; 8],
    o: *mut f32,
    o_stride: usize,
) {
    let mut sums = [[s.splat(0.0); CB]; R];
    for token in 0..len {
        ahead.fetch(s, token);
        let mut p = [s.splat(0.0); R];
        for r in 0..R {
            // SAFETY: token < len.
            p[r] = unsafe { s.splat(*weights.add(token * RS + r)) };
        }
        for c in 0..CB {
            // SAFETY: token < len <= TILE, and the row has chunk + CB chunks.
            let v = unsafe { tile.values::<S, MODE>(s, token, chunk + c) };
            for r in 0..R {
                sums[r][c] = s.mul_add(p[r], v, sums[r][c]);
            }
        }
    }
    for r in 0..R {
        let rescale = s.splat(rescale[r]);
        for c in 0..CB {
            // SAFETY: chunk + c is a chunk of row r.
            unsafe {
                let at = o.add(r * o_stride + (chunk + c) * S::LANES);
                s.store(at, s.mul_add(s.load(at), rescale, sums[r][c]));
            }
        }
    }
}
