//! Logits to weights: scale, soft-cap, ALiBi, mask, running maximum, exp. One tile of a block of rows.

use super::{Loop, Simd, math, rows::TILE};

/// What a block of query rows needs beyond q: one entry a row.
#[derive(Clone, Copy)]
pub(crate) struct BlockMask {
    /// Visible tokens of the sequence, half-open.
    pub visible: [(u32, u32); 8],
    /// Position of the row's own token.
    pub position: [i64; 8],
    /// ALiBi slope.
    pub slope: [f32; 8],
}

/// The same for all rows of a step.
#[derive(Clone, Copy)]
pub(crate) struct LogitRule {
    pub softmax_scale: f32,
    pub soft_cap: Option<f32>,
    pub alibi: bool,
}

/// `a[lane % RS]` as a vector.
#[inline(always)]
fn spread<S: Simd, const RS: usize>(s: S, a: &[f32; 8]) -> S::F {
    let mut lanes = [0f32; 16];
    for (lane, x) in lanes.iter_mut().enumerate().take(S::LANES) {
        *x = a[lane % RS];
    }
    // SAFETY: 16 f32, at least LANES.
    unsafe { s.load(lanes.as_ptr()) }
}

#[inline(always)]
fn fold<S: Simd, const RS: usize>(s: S, x: S::F, start: f32, f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    let mut lanes = [0f32; 16];
    // SAFETY: 16 f32, at least LANES.
    unsafe { s.store(lanes.as_mut_ptr(), x) };
    let mut folded = [start; 8];
    for (lane, &x) in lanes.iter().enumerate().take(S::LANES) {
        folded[lane % RS] = f(folded[lane % RS], x);
    }
    folded
}

/// Turns a tile's logits into weights relative to the new maxima, in place, and updates `(m, l)`.
pub(crate) struct Softmax<'a, const RS: usize> {
    pub rule: &'a LogitRule,
    pub mask: &'a BlockMask,
    pub first_token: u32,
    pub len: usize,
    /// `[TILE][RS]`, of which the tokens `first_token..first_token + len` are set.
    pub logits: &'a mut [f32; TILE * 8],
    /// `(m, l)` of each row, of which there are at most `RS`.
    pub ml: &'a mut [f32],
    /// Filled with the factor by which each row's `o` so far is to be scaled.
    pub rescale: &'a mut [f32; 8],
}

impl<S: Simd, const RS: usize> Loop<S> for Softmax<'_, RS> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { rule, mask, first_token, len, logits, ml, rescale } = self;
        let (mut m, mut l) = ([f32::NEG_INFINITY; 8], [0f32; 8]);
        let num_rows = (ml.len() / 2).min(RS);
        for (r, ml) in ml.chunks_exact(2).enumerate().take(num_rows) {
            (m[r], l[r]) = (ml[0], ml[1]);
        }
        *rescale = softmax::<S, RS>(s, rule, mask, num_rows, first_token, len, logits, &mut m, &mut l);
        for (r, ml) in ml.chunks_exact_mut(2).enumerate().take(num_rows) {
            ml.copy_from_slice(&[m[r], l[r]]);
        }
    }
}

/// Returns the factors of `o`.
#[inline(always)]
fn softmax<S: Simd, const RS: usize>(
    s: S,
    rule: &LogitRule,
    mask: &BlockMask,
    num_rows: usize,
    first_token: u32,
    len: usize,
    logits: &mut [f32; TILE * 8],
    m: &mut [f32; 8],
    l: &mut [f32; 8],
) -> [f32; 8] {
    let per_vector = S::LANES / RS;
    let num_vectors = len.div_ceil(per_vector);
    let tile_end = first_token + len as u32;
    let mut unmasked = len.is_multiple_of(per_vector);
    for r in 0..num_rows {
        unmasked &= mask.visible[r].0 <= first_token && mask.visible[r].1 >= tile_end;
    }
    let scale = s.splat(rule.softmax_scale);
    let mut max = s.splat(f32::NEG_INFINITY);
    if unmasked && rule.soft_cap.is_none() && !rule.alibi {
        // Two maxima, since one would be a chain that takes longer than the products.
        let mut other = max;
        for i in 0..num_vectors {
            // SAFETY: num_vectors * LANES <= TILE * RS.
            unsafe {
                let at = logits.as_mut_ptr().add(i * S::LANES);
                let x = s.mul(s.load(at), scale);
                s.store(at, x);
                (max, other) = (other, s.max(max, x));
            }
        }
        max = s.max(max, other);
    } else {
        max = special::<S, RS>(s, rule, mask, first_token, num_vectors, tile_end, logits);
    }
    let tile_max = fold::<S, RS>(s, max, f32::NEG_INFINITY, f32::max);
    let (mut rescale, mut base) = ([1f32; 8], [0f32; 8]);
    for r in 0..num_rows {
        let new = m[r].max(tile_max[r]);
        // Nothing visible so far: any base will do, since every weight is exp(-inf).
        base[r] = if new == f32::NEG_INFINITY { 0.0 } else { new };
        if new > m[r] {
            rescale[r] = m[r] - new;
            m[r] = new;
        } else {
            rescale[r] = 0.0;
        }
    }
    // exp(0) is exactly 1 and exp(-inf) exactly 0.
    let rescale = fold::<S, RS>(s, math::exp(s, spread::<S, RS>(s, &rescale)), 0.0, f32::max);
    let base = spread::<S, RS>(s, &base);
    let mut sum = s.splat(0.0);
    for i in 0..num_vectors {
        // SAFETY: as above.
        unsafe {
            let at = logits.as_mut_ptr().add(i * S::LANES);
            let p = math::exp(s, s.sub(s.load(at), base));
            s.store(at, p);
            sum = s.add(sum, p);
        }
    }
    let sum = fold::<S, RS>(s, sum, 0.0, |a, b| a + b);
    for r in 0..num_rows {
        l[r] = l[r] * rescale[r] + sum[r];
    }
    rescale
}

/// Scale, soft-cap, ALiBi and mask of a tile; returns the maxima, lane by lane. Apart, so that the ordinary case stays
/// small.
#[inline(always)]
fn special<S: Simd, const RS: usize>(
    s: S,
    rule: &LogitRule,
    mask: &BlockMask,
    first_token: u32,
    num_vectors: usize,
    tile_end: u32,
    logits: &mut [f32; TILE * 8],
) -> S::F {
    let in_tile = |t: u32| (t.clamp(first_token, tile_end) - first_token) as f32;
    let (mut start, mut end, mut distance) = ([0f32; 8], [0f32; 8], [0f32; 8]);
    for r in 0..RS {
        start[r] = in_tile(mask.visible[r].0);
        end[r] = in_tile(mask.visible[r].1);
        distance[r] = (i64::from(first_token) - mask.position[r]) as f32;
    }
    let mut lane_token = [0f32; 16];
    for (lane, x) in lane_token.iter_mut().enumerate() {
        *x = (lane / RS) as f32;
    }
    // SAFETY: 16 f32, at least LANES.
    let lane_token = unsafe { s.load(lane_token.as_ptr()) };
    let [start, end, distance] = [start, end, distance].map(|a| spread::<S, RS>(s, &a));
    let slope = spread::<S, RS>(s, &mask.slope);
    let scale = s.splat(rule.softmax_scale);
    let nothing = s.splat(f32::NEG_INFINITY);
    let mut max = nothing;
    for i in 0..num_vectors {
        // SAFETY: num_vectors * LANES <= TILE * RS.
        unsafe {
            let at = logits.as_mut_ptr().add(i * S::LANES);
            let mut x = s.mul(s.load(at), scale);
            if let Some(cap) = rule.soft_cap {
                let cap = s.splat(cap);
                x = s.mul(cap, math::tanh(s, s.div(x, cap)));
            }
            let token = s.add(lane_token, s.splat((i * (S::LANES / RS)) as f32));
            if rule.alibi {
                x = s.mul_add(slope, s.add(distance, token), x);
            }
            x = s.select_lt(token, start, nothing, s.select_lt(token, end, x, nothing));
            s.store(at, x);
            max = s.max(max, x);
        }
    }
    max
}
