//! AVX-512: sixteen lanes, thirty-two registers.

mod append;
mod stage1;

pub(crate) use append::Append;
pub(crate) use stage1::Stage1;

use super::avx2;
use crate::arch::generic::{Loop, Simd};
use kv_quant::ScaleType;
use std::arch::x86_64::*;

/// The proof that the CPU has AVX-512 F, BW, VL and DQ, and what AVX2 needs; with `VNNI`, that too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const VNNI: bool = false>(());

impl Avx512<false> {
    /// `None` if the CPU lacks one of the features.
    pub(crate) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && avx2::Avx2::new().is_some();
        has.then_some(Self(()))
    }
}

/// `[a0 + a2, b0 + b2, a1 + a3, b1 + b3]` in each quarter.
///
/// A function, not a closure: closures do not have the caller's target features, and are not inlined for it.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn pair(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)) }
}

/// The sums of four rows' quarters, `[a, b, c, d]` in each quarter.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn quad(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    // SAFETY: the caller's.
    unsafe {
        let (ab, cd) = (_mm512_castps_pd(pair(a, b)), _mm512_castps_pd(pair(c, d)));
        let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    }
}

/// Adds two quarters of `a` and of `b` each: `[a0 + a2, a1 + a3, b0 + b2, b1 + b3]` by quarters.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn halves(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
#[inline(never)]
fn run<const VNNI: bool, L: Loop<Avx512<VNNI>>>(s: Avx512<VNNI>, inner: L) {
    inner.run(s);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
fn run_vnni<const VNNI: bool, L: Loop<Avx512<VNNI>>>(s: Avx512<VNNI>, inner: L) {
    inner.run(s);
}

// SAFETY of every block below without a comment of its own: the value of type Avx512 proves the features.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all of them, above")]
impl<const VNNI: bool> Simd for Avx512<VNNI> {
    const LANES: usize = 16;
    type F = __m512;
    type Integer = Avx512<true>;

    #[inline(always)]
    fn integer(self) -> Option<Avx512<true>> {
        is_x86_feature_detected!("avx512vnni").then_some(Avx512(()))
    }

    #[inline(always)]
    fn run<L: Loop<Self>>(self, inner: L) {
        unsafe { if VNNI { run_vnni(self, inner) } else { run(self, inner) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(p, x) }
    }

    #[inline(always)]
    unsafe fn load_codes(self, p: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn dot_codes(self, k: *const i8, q: *const i8, offsets: *const i32) -> __m512 {
        unsafe {
            let (k, q) = (_mm512_loadu_si512(k.cast()), _mm512_loadu_si512(q.cast()));
            if VNNI {
                let k = _mm512_xor_si512(k, _mm512_set1_epi8(-128));
                return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(offsets.cast()), k, q));
            }
            // As with AVX2; the sign goes over by a mask.
            let q = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(k), _mm512_setzero_si512(), q);
            let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(k), q);
            _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn load_by_eights(self, p: *const f32, stride: usize) -> __m512 {
        unsafe { _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(*p), _mm512_set1_ps(*p.add(stride))) }
    }

    #[inline(always)]
    unsafe fn load_repeated<const N: usize>(self, p: *const f32) -> __m512 {
        unsafe {
            let x = _mm512_loadu_ps(p);
            let order = match N {
                1 => return x,
                2 => _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                4 => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                _ => _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
            };
            _mm512_permutexvar_ps(order, x)
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
        unsafe { avx2::scales::widen(scale_type, rows, offset, n, out, stride) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn abs(self, x: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(x) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn exp2_shifted(self, n: __m512) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(n))) }
    }

    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }

    #[inline(always)]
    unsafe fn store_sums(self, rows: &[__m512; 8], p: *mut f32) {
        unsafe {
            // Each 128-bit quarter of a quad holds the sums of that quarter of its four rows.
            let a = quad(rows[0], rows[1], rows[2], rows[3]);
            let b = quad(rows[4], rows[5], rows[6], rows[7]);
            // Quarters a0 + a2, a1 + a3, b0 + b2, b1 + b3; then each pair is added.
            let ab = halves(a, b);
            let (low, high) = (_mm512_castps512_ps256(ab), _mm512_extractf32x8_ps::<1>(ab));
            let sums = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(low, high),
                _mm256_permute2f128_ps::<0x31>(low, high),
            );
            _mm256_storeu_ps(p, sums);
        }
    }

    #[inline(always)]
    fn max_lanes(self, x: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(x) }
    }

    #[inline(always)]
    unsafe fn store_codes(self, p: *mut i8, x: __m512) {
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))) }
    }

    #[inline(always)]
    unsafe fn round_scales_up(self, scale_type: ScaleType, amax: __m512, p: *mut u8, n: usize) -> __m512 {
        // Append runs on the AVX2 instance; this is here for completeness.
        unsafe {
            _mm512_castps256_ps512(avx2::round_scales_up(scale_type, _mm512_castps512_ps256(amax), p, n))
        }
    }
}
