//! AVX2 with FMA and F16C: eight lanes, sixteen registers.

mod append;
pub(super) mod scales;
mod stage1;

pub(crate) use append::Append;
pub(crate) use stage1::Stage1;

use crate::arch::generic::{Loop, Simd};
use kv_quant::ScaleType;
use std::arch::x86_64::*;

/// The proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// `None` if the CPU lacks one of the features.
    pub(crate) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

/// Stores the first `n` (1 to 8) 16-bit scales.
///
/// # Safety
/// `n` of them are writable at `p`.
#[inline(always)]
unsafe fn store_bits(p: *mut u8, bits: __m128i, n: usize) {
    // SAFETY: exactly 2 n bytes are written, 16 where n is 8.
    unsafe {
        match n {
            4 => _mm_storel_epi64(p.cast(), bits),
            8 => _mm_storeu_si128(p.cast(), bits),
            _ => {
                let mut all = [0u16; 8];
                _mm_storeu_si128(all.as_mut_ptr().cast(), bits);
                std::ptr::copy_nonoverlapping(all.as_ptr().cast(), p, 2 * n);
            }
        }
    }
}

/// -1 where `127 * scale < amax`, so that subtracting it is the step up; the product is exact for 16-bit scales.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn below(scale: __m256, amax: __m256) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        let product = _mm256_mul_ps(scale, _mm256_set1_ps(127.0));
        _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(product, amax))
    }
}

/// See [`Simd::round_scales_up`].
///
/// # Safety
/// `n` scales are writable at `p`, and the CPU has AVX2, FMA and F16C.
#[inline(always)]
pub(super) unsafe fn round_scales_up(scale_type: ScaleType, amax: __m256, p: *mut u8, n: usize) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        let quotient = _mm256_div_ps(amax, _mm256_set1_ps(127.0));
        match scale_type {
            ScaleType::F16 => {
                let nearest = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(quotient);
                let step = below(_mm256_cvtph_ps(nearest), amax);
                let step = _mm_packs_epi32(_mm256_castsi256_si128(step), _mm256_extracti128_si256::<1>(step));
                let bits = _mm_sub_epi16(nearest, step);
                store_bits(p, bits, n);
                _mm256_cvtph_ps(bits)
            }
            ScaleType::Bf16 => {
                // Round half to even by integers: scales are finite and not negative.
                let bits = _mm256_castps_si256(quotient);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
                let nearest = _mm256_slli_epi32::<16>(_mm256_srli_epi32::<16>(bits));
                let step = _mm256_slli_epi32::<16>(below(_mm256_castsi256_ps(nearest), amax));
                let bits = _mm256_sub_epi32(nearest, step);
                let high = _mm256_srli_epi32::<16>(bits);
                let packed =
                    _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high));
                store_bits(p, packed, n);
                _mm256_castsi256_ps(bits)
            }
            ScaleType::F32 => {
                let rest = _mm256_fmsub_ps(quotient, _mm256_set1_ps(127.0), amax);
                let step = _mm256_cmp_ps::<_CMP_LT_OQ>(rest, _mm256_setzero_ps());
                let bits = _mm256_sub_epi32(_mm256_castps_si256(quotient), _mm256_castps_si256(step));
                let mut all = [0u32; 8];
                _mm256_storeu_si256(all.as_mut_ptr().cast(), bits);
                std::ptr::copy_nonoverlapping(all.as_ptr().cast(), p, 4 * n);
                _mm256_castsi256_ps(bits)
            }
        }
    }
}

/// `[a0 + a2, b0 + b2, a1 + a3, b1 + b3]` in each half.
///
/// A function, not a closure: closures do not have the caller's target features, and are not inlined for it.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn pair(a: __m256, b: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)) }
}

/// The sums of four rows' halves, `[a, b, c, d]` in each half.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn quad(a: __m256, b: __m256, c: __m256, d: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        let (ab, cd) = (_mm256_castps_pd(pair(a, b)), _mm256_castps_pd(pair(c, d)));
        let (low, high) = (_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
        _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn run<L: Loop<Avx2>>(s: Avx2, inner: L) {
    inner.run(s);
}

// SAFETY of every block below without a comment of its own: the value of type Avx2 proves the features.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all of them, above")]
impl Simd for Avx2 {
    const LANES: usize = 8;
    type F = __m256;
    type Integer = Self;

    #[inline(always)]
    fn integer(self) -> Option<Self> {
        None
    }

    #[inline(always)]
    fn run<L: Loop<Self>>(self, inner: L) {
        unsafe { run(self, inner) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(p, x) }
    }

    #[inline(always)]
    unsafe fn load_codes(self, p: *const i8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn dot_codes(self, k: *const i8, q: *const i8, _: *const i32) -> __m256 {
        unsafe {
            let (k, q) = (_mm256_loadu_si256(k.cast()), _mm256_loadu_si256(q.cast()));
            // |k| is at most 128 and |q| 127: two products are at most 32512, within 16 bits.
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(k), _mm256_sign_epi8(q, k));
            _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn load_by_eights(self, p: *const f32, _: usize) -> __m256 {
        unsafe { _mm256_broadcast_ss(&*p) }
    }

    #[inline(always)]
    unsafe fn load_repeated<const N: usize>(self, p: *const f32) -> __m256 {
        unsafe {
            let x = _mm256_loadu_ps(p);
            match N {
                1 => x,
                2 => _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
                4 => _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
                _ => _mm256_broadcast_ss(&*p),
            }
        }
    }

    #[inline(always)]
    unsafe fn widen_scales(
        self,
        scale_type: ScaleType,
        rows: *const *const u8,
        offset: usize,
        n: usize,
        out: *mut f32,
        stride: usize,
    ) {
        unsafe { scales::widen(scale_type, rows, offset, n, out, stride) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn abs(self, x: __m256) -> __m256 {
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn exp2_shifted(self, n: __m256) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(n))) }
    }

    #[inline(always)]
    fn select_lt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }

    #[inline(always)]
    unsafe fn store_sums(self, rows: &[__m256; 8], p: *mut f32) {
        unsafe {
            // Each 128-bit half of `low` holds the sums of that half of rows 0 to 3.
            let low = quad(rows[0], rows[1], rows[2], rows[3]);
            let high = quad(rows[4], rows[5], rows[6], rows[7]);
            let sums = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(low, high),
                _mm256_permute2f128_ps::<0x31>(low, high),
            );
            _mm256_storeu_ps(p, sums);
        }
    }

    #[inline(always)]
    fn max_lanes(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    unsafe fn store_codes(self, p: *mut i8, x: __m256) {
        unsafe {
            let wide = _mm256_cvtps_epi32(x);
            let half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(half, half));
        }
    }

    #[inline(always)]
    unsafe fn store_codes_of_four(self, p: *mut i8, x: [__m256; 4]) {
        unsafe {
            let [a, b, c, d] = x;
            let ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            let cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
            // Packing works in halves: quarters of four codes come out as a0 b0 c0 d0 a1 b1 c1 d1.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let codes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
            _mm256_storeu_si256(p.cast(), codes);
        }
    }

    #[inline(always)]
    unsafe fn round_scales_up(self, scale_type: ScaleType, amax: __m256, p: *mut u8, n: usize) -> __m256 {
        unsafe { round_scales_up(scale_type, amax, p, n) }
    }
}
