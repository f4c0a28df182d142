//! Stored scales of eight rows to f32, transposed: a group's scales of neighbouring tokens become neighbours.

use crate::arch::generic::Simd;
use crate::arch::portable::Portable;
use kv_quant::ScaleType;
use std::arch::x86_64::*;

/// `N` (1 to 8) 16-bit scales; what lies behind them is unspecified.
///
/// # Safety
/// `N` of them are readable at `p`.
#[inline(always)]
unsafe fn load<const N: usize>(p: *const u8) -> __m128i {
    // SAFETY: exactly 2 N bytes are read.
    unsafe {
        match N {
            1 => _mm_cvtsi32_si128(i32::from(p.cast::<u16>().read_unaligned())),
            2 => _mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()),
            4 => _mm_loadl_epi64(p.cast()),
            8 => _mm_loadu_si128(p.cast()),
            _ => {
                let mut bits = [0u16; 8];
                std::ptr::copy_nonoverlapping(p, bits.as_mut_ptr().cast(), 2 * N);
                _mm_loadu_si128(bits.as_ptr().cast())
            }
        }
    }
}

/// Eight rows of `N` 16-bit scales, transposed: vector `i` holds scale `i` of all rows. Only the first `N` are of use.
///
/// # Safety
/// As of [`load`], `offset` bytes into each of eight rows. The CPU has AVX2.
#[inline(always)]
unsafe fn transposed<const N: usize>(rows: *const *const u8, offset: usize) -> [__m128i; 8] {
    // SAFETY: the caller's.
    unsafe {
        let row = |i: usize| (*rows.add(i)).add(offset);
        let x = [
            load::<N>(row(0)),
            load::<N>(row(1)),
            load::<N>(row(2)),
            load::<N>(row(3)),
            load::<N>(row(4)),
            load::<N>(row(5)),
            load::<N>(row(6)),
            load::<N>(row(7)),
        ];
        // Pairs, quadruples, and all eight rows of scales 0 to 3; then the same of 4 to 7.
        let (a, b) = (_mm_unpacklo_epi16(x[0], x[1]), _mm_unpacklo_epi16(x[2], x[3]));
        let (c, d) = (_mm_unpacklo_epi16(x[4], x[5]), _mm_unpacklo_epi16(x[6], x[7]));
        let (low, high) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
        let mut out = [_mm_setzero_si128(); 8];
        out[0] = _mm_unpacklo_epi64(low, high);
        out[1] = _mm_unpackhi_epi64(low, high);
        let (low, high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
        out[2] = _mm_unpacklo_epi64(low, high);
        out[3] = _mm_unpackhi_epi64(low, high);
        if N > 4 {
            let (a, b) = (_mm_unpackhi_epi16(x[0], x[1]), _mm_unpackhi_epi16(x[2], x[3]));
            let (c, d) = (_mm_unpackhi_epi16(x[4], x[5]), _mm_unpackhi_epi16(x[6], x[7]));
            let (low, high) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
            out[4] = _mm_unpacklo_epi64(low, high);
            out[5] = _mm_unpackhi_epi64(low, high);
            let (low, high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
            out[6] = _mm_unpacklo_epi64(low, high);
            out[7] = _mm_unpackhi_epi64(low, high);
        }
        out
    }
}

/// # Safety
/// As of [`Simd::widen_scales`] for `n = N`; the type is f16 or bf16; the CPU has AVX2 and F16C.
#[inline(always)]
unsafe fn widen_n<const N: usize>(
    is_f16: bool,
    rows: *const *const u8,
    offset: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let bits = transposed::<N>(rows, offset);
        for (i, &bits) in bits.iter().enumerate().take(N) {
            let wide = if is_f16 {
                _mm256_cvtph_ps(bits)
            } else {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
            };
            _mm256_storeu_ps(out.add(i * stride), wide);
        }
    }
}

/// See [`Simd::widen_scales`].
///
/// # Safety
/// Its, and the CPU has AVX2 and F16C.
#[inline(always)]
pub(crate) unsafe fn widen(
    scale_type: ScaleType,
    rows: *const *const u8,
    offset: usize,
    n: usize,
    out: *mut f32,
    stride: usize,
) {
    let is_f16 = match scale_type {
        ScaleType::F16 => true,
        ScaleType::Bf16 => false,
        // SAFETY: the caller's.
        ScaleType::F32 => return unsafe { Portable.widen_scales(scale_type, rows, offset, n, out, stride) },
    };
    // SAFETY: the caller's.
    unsafe {
        match n {
            1 => widen_n::<1>(is_f16, rows, offset, out, stride),
            2 => widen_n::<2>(is_f16, rows, offset, out, stride),
            3 => widen_n::<3>(is_f16, rows, offset, out, stride),
            4 => widen_n::<4>(is_f16, rows, offset, out, stride),
            5 => widen_n::<5>(is_f16, rows, offset, out, stride),
            6 => widen_n::<6>(is_f16, rows, offset, out, stride),
            7 => widen_n::<7>(is_f16, rows, offset, out, stride),
            _ => widen_n::<8>(is_f16, rows, offset, out, stride),
        }
    }
}
