//! exp and tanh, vectorised. Errors are stated here and checked by tests over the whole range.

use super::Simd;
use super::simd::EXP2_SHIFT;

/// `exp(x)` for `x <= 88`, at most 2 u off relative to the exact value (u = 2^-24), fused or not.
///
/// 0 below -126 ln 2, where the result would leave the normal range; so is `exp(-inf)`. `exp(0)` is exactly 1.
/// Cody-Waite reduction: `n ln2_hi` is exact since `ln2_hi` has 9 bits, then the polynomial of Cephes' expf.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    const LOWEST: f32 = -87.336_54;
    // The addition rounds to an integer, which then stands in the lowest bits.
    let shifted = s.mul_add(x, s.splat(std::f32::consts::LOG2_E), s.splat(EXP2_SHIFT));
    let n = s.sub(shifted, s.splat(EXP2_SHIFT));
    let r = s.mul_add(n, s.splat(-0.693_359_4), x);
    let r = s.mul_add(n, s.splat(2.121_944_4e-4), r);
    let mut y = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        y = s.mul_add(y, r, s.splat(coefficient));
    }
    let y = s.add(s.mul_add(s.mul(r, r), y, r), s.splat(1.0));
    s.select_lt(x, s.splat(LOWEST), s.splat(0.0), s.mul(y, s.exp2_shifted(shifted)))
}

/// `tanh(x)` for finite `x`, at most 6 u off relative to the exact value.
///
/// An odd polynomial (Cephes' tanhf) below 0.625, `1 - 2 / (exp(2|x|) + 1)` above.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let size = s.min(s.abs(x), s.splat(10.0));
    let square = s.mul(size, size);
    let mut p = s.splat(-5.704_988_7e-3);
    for coefficient in [2.063_909e-2, -5.373_971_5e-2, 0.133_314_42, -0.333_332_8] {
        p = s.mul_add(p, square, s.splat(coefficient));
    }
    let near = s.mul_add(s.mul(p, square), size, size);
    let exp = exp(s, s.add(size, size));
    let far = s.sub(s.splat(1.0), s.div(s.splat(2.0), s.add(exp, s.splat(1.0))));
    let y = s.select_lt(size, s.splat(0.625), near, far);
    s.select_lt(x, s.splat(0.0), s.sub(s.splat(0.0), y), y)
}
