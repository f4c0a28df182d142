//! AVX2 with FMA and F16C: eight lanes, sixteen registers.

mod stage1;

pub(crate) use stage1::Stage1;

use crate::arch::generic::Simd;
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

/// The bits of `n` (1 to 8) 16-bit scales, zeros behind them.
///
/// # Safety
/// `n` of them are readable at `p`.
#[inline(always)]
pub(super) unsafe fn load_bits(p: *const u8, n: usize) -> __m128i {
    let mut bits = [0u16; 8];
    // SAFETY: exactly 2 n bytes are read, 16 where n is 8.
    unsafe {
        match n {
            1 => bits[0] = p.cast::<u16>().read_unaligned(),
            4 => return _mm_cvtsi64_si128(p.cast::<i64>().read_unaligned()),
            8 => return _mm_loadu_si128(p.cast()),
            _ => std::ptr::copy_nonoverlapping(p, bits.as_mut_ptr().cast(), 2 * n),
        }
        _mm_loadu_si128(bits.as_ptr().cast())
    }
}

/// See [`Simd::widen_scales`].
///
/// # Safety
/// `n` scales are readable at `p`, 8 f32 writable at `out`, and the CPU has AVX2 and F16C.
#[inline(always)]
pub(super) unsafe fn widen_scales(scale_type: ScaleType, p: *const u8, n: usize, out: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        match scale_type {
            ScaleType::F16 => _mm256_storeu_ps(out, _mm256_cvtph_ps(load_bits(p, n))),
            ScaleType::Bf16 => {
                let wide = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_bits(p, n)));
                _mm256_storeu_ps(out, _mm256_castsi256_ps(wide));
            }
            ScaleType::F32 => {
                _mm256_storeu_ps(out, _mm256_setzero_ps());
                std::ptr::copy_nonoverlapping(p, out.cast::<u8>(), 4 * n);
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

// SAFETY of every block below without a comment of its own: the value of type Avx2 proves the features.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = 8;
    type F = __m256;

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
    unsafe fn load_by_eights(self, p: *const f32) -> __m256 {
        unsafe { _mm256_broadcast_ss(&*p) }
    }

    #[inline(always)]
    unsafe fn widen_scales(self, scale_type: ScaleType, p: *const u8, n: usize, out: *mut f32) {
        unsafe { widen_scales(scale_type, p, n, out) }
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
    fn round(self, x: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }

    #[inline(always)]
    fn exp2_int(self, n: __m256) -> __m256 {
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn select_lt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }

    #[inline(always)]
    fn sum_lanes(self, rows: &[__m256; 16]) -> __m256 {
        unsafe {
            // Each 128-bit half of `low` holds the sums of that half of rows 0 to 3.
            let low = quad(rows[0], rows[1], rows[2], rows[3]);
            let high = quad(rows[4], rows[5], rows[6], rows[7]);
            _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(low, high),
                _mm256_permute2f128_ps::<0x31>(low, high),
            )
        }
    }
}
