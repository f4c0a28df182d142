//! NEON: eight lanes in pairs of registers, of which there are thirty-two.
//!
//! It has run under emulation, not on a machine yet.

mod append;
mod stage1;

pub(crate) use append::Append;
pub(crate) use stage1::Stage1;

use crate::arch::generic::{Loop, Simd};
use crate::arch::portable::Portable;
use kv_quant::ScaleType;
use std::arch::aarch64::*;

/// The proof that the CPU has NEON; with `DOTPROD`, the dot products of 8-bit integers too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon<const DOTPROD: bool = false>(());

impl Neon<false> {
    /// `None` if the CPU lacks it.
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

/// Eight lanes.
#[derive(Clone, Copy)]
pub(crate) struct F8(float32x4_t, float32x4_t);

/// The sums of four rows of eight lanes.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn quad(rows: [F8; 4]) -> float32x4_t {
    // SAFETY: the caller's.
    unsafe {
        let [a, b, c, d] = rows;
        let (a, b) = (vaddq_f32(a.0, a.1), vaddq_f32(b.0, b.1));
        let (c, d) = (vaddq_f32(c.0, c.1), vaddq_f32(d.0, d.1));
        vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))
    }
}

/// Four sums of four products each.
///
/// # Safety
/// The CPU has the dot product instructions.
#[inline(always)]
unsafe fn sdot(k: int8x16_t, q: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's; registers are all that is touched. The intrinsic is not stable in Rust 1.89.
    unsafe {
        let mut sums = vdupq_n_s32(0);
        std::arch::asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {k:v}.16b, {q:v}.16b",
            sums = inout(vreg) sums,
            k = in(vreg) k,
            q = in(vreg) q,
            options(pure, nomem, nostack, preserves_flags),
        );
        sums
    }
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn run<const DOTPROD: bool, L: Loop<Neon<DOTPROD>>>(s: Neon<DOTPROD>, inner: L) {
    inner.run(s);
}

// SAFETY of every block below without a comment of its own: the value of type Neon proves the feature.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all of them, above")]
impl<const DOTPROD: bool> Simd for Neon<DOTPROD> {
    const LANES: usize = 8;
    type F = F8;
    type Integer = Neon<true>;

    #[inline(always)]
    fn integer(self) -> Option<Neon<true>> {
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(Neon(()))
    }

    #[inline(always)]
    fn run<L: Loop<Self>>(self, inner: L) {
        unsafe { run(self, inner) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F8 {
        let x = unsafe { vdupq_n_f32(x) };
        F8(x, x)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F8 {
        unsafe { F8(vld1q_f32(p), vld1q_f32(p.add(4))) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: F8) {
        unsafe {
            vst1q_f32(p, x.0);
            vst1q_f32(p.add(4), x.1);
        }
    }

    #[inline(always)]
    unsafe fn load_codes(self, p: *const i8) -> F8 {
        unsafe {
            let codes = vmovl_s8(vld1_s8(p));
            let (low, high) = (vmovl_s16(vget_low_s16(codes)), vmovl_high_s16(codes));
            F8(vcvtq_f32_s32(low), vcvtq_f32_s32(high))
        }
    }

    #[inline(always)]
    unsafe fn dot_codes(self, k: *const i8, q: *const i8, _: *const i32) -> F8 {
        unsafe {
            if DOTPROD {
                let low = sdot(vld1q_s8(k), vld1q_s8(q));
                let high = sdot(vld1q_s8(k.add(16)), vld1q_s8(q.add(16)));
                return F8(vcvtq_f32_s32(low), vcvtq_f32_s32(high));
            }
            let half = |i: usize| {
                let (k, q) = (vld1q_s8(k.add(i)), vld1q_s8(q.add(i)));
                let low = vmull_s8(vget_low_s8(k), vget_low_s8(q));
                let high = vmull_high_s8(k, q);
                vcvtq_f32_s32(vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
            };
            F8(half(0), half(16))
        }
    }

    #[inline(always)]
    unsafe fn load_by_eights(self, p: *const f32, _: usize) -> F8 {
        self.splat(unsafe { *p })
    }

    #[inline(always)]
    unsafe fn load_repeated<const N: usize>(self, p: *const f32) -> F8 {
        unsafe {
            match N {
                1 => self.load(p),
                2 => {
                    let x = vld1q_f32(p);
                    F8(vzip1q_f32(x, x), vzip2q_f32(x, x))
                }
                4 => F8(vdupq_n_f32(*p), vdupq_n_f32(*p.add(1))),
                _ => self.splat(*p),
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {
        // The intrinsic is not stable in Rust 1.89.
    }

    #[inline(always)]
    fn add(self, a: F8, b: F8) -> F8 {
        unsafe { F8(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, a: F8, b: F8) -> F8 {
        unsafe { F8(vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, a: F8, b: F8) -> F8 {
        unsafe { F8(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1)) }
    }

    #[inline(always)]
    fn div(self, a: F8, b: F8) -> F8 {
        unsafe { F8(vdivq_f32(a.0, b.0), vdivq_f32(a.1, b.1)) }
    }

    #[inline(always)]
    fn max(self, a: F8, b: F8) -> F8 {
        unsafe { F8(vmaxq_f32(a.0, b.0), vmaxq_f32(a.1, b.1)) }
    }

    #[inline(always)]
    fn min(self, a: F8, b: F8) -> F8 {
        unsafe { F8(vminq_f32(a.0, b.0), vminq_f32(a.1, b.1)) }
    }

    #[inline(always)]
    fn abs(self, x: F8) -> F8 {
        unsafe { F8(vabsq_f32(x.0), vabsq_f32(x.1)) }
    }

    #[inline(always)]
    fn mul_add(self, a: F8, b: F8, c: F8) -> F8 {
        unsafe { F8(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)) }
    }

    #[inline(always)]
    fn exp2_shifted(self, n: F8) -> F8 {
        unsafe {
            let power = [n.0, n.1].map(|n| vshlq_n_u32::<23>(vreinterpretq_u32_f32(n)));
            F8(vreinterpretq_f32_u32(power[0]), vreinterpretq_f32_u32(power[1]))
        }
    }

    #[inline(always)]
    fn select_lt(self, a: F8, b: F8, x: F8, y: F8) -> F8 {
        unsafe { F8(vbslq_f32(vcltq_f32(a.0, b.0), x.0, y.0), vbslq_f32(vcltq_f32(a.1, b.1), x.1, y.1)) }
    }

    #[inline(always)]
    unsafe fn store_sums(self, rows: &[F8; 8], p: *mut f32) {
        unsafe {
            vst1q_f32(p, quad([rows[0], rows[1], rows[2], rows[3]]));
            vst1q_f32(p.add(4), quad([rows[4], rows[5], rows[6], rows[7]]));
        }
    }

    #[inline(always)]
    fn max_lanes(self, x: F8) -> f32 {
        unsafe { vmaxvq_f32(vmaxq_f32(x.0, x.1)) }
    }

    #[inline(always)]
    unsafe fn store_codes(self, p: *mut i8, x: F8) {
        unsafe {
            // To nearest, ties to even.
            let half = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.0)), vmovn_s32(vcvtnq_s32_f32(x.1)));
            vst1_s8(p, vmovn_s16(half));
        }
    }

    #[inline(always)]
    unsafe fn round_scales_up(self, scale_type: ScaleType, amax: F8, p: *mut u8, n: usize) -> F8 {
        let mut lanes = [0f32; 8];
        unsafe {
            self.store(lanes.as_mut_ptr(), amax);
            let amax = Portable.load(lanes.as_ptr());
            Portable.store(lanes.as_mut_ptr(), Portable.round_scales_up(scale_type, amax, p, n));
            self.load(lanes.as_ptr())
        }
    }
}
