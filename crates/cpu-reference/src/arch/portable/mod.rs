//! Any CPU: arrays of eight, which compilers turn into whatever vectors there are.

mod append;
mod stage1;

pub(crate) use append::Append;
pub(crate) use stage1::Stage1;

use super::generic::{Loop, Simd};
use kv_quant::ScaleType;

/// No instructions to prove.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// Eight lanes.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(crate) struct F8([f32; 8]);

#[inline(always)]
fn each(a: F8, b: F8, f: impl Fn(f32, f32) -> f32) -> F8 {
    let mut out = a;
    for (x, y) in out.0.iter_mut().zip(b.0) {
        *x = f(*x, y);
    }
    out
}

impl Simd for Portable {
    const LANES: usize = 8;
    type F = F8;
    type Integer = Self;

    #[inline(always)]
    fn integer(self) -> Option<Self> {
        None
    }

    #[inline(never)]
    fn run<L: Loop<Self>>(self, inner: L) {
        inner.run(self);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F8 {
        F8([x; 8])
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F8 {
        // SAFETY: the caller's.
        F8(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: F8) {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(x.0) }
    }

    #[inline(always)]
    unsafe fn load_codes(self, p: *const i8) -> F8 {
        // SAFETY: the caller's.
        let codes = unsafe { p.cast::<[i8; 8]>().read_unaligned() };
        F8(codes.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_by_eights(self, p: *const f32, _: usize) -> F8 {
        // SAFETY: the caller's.
        self.splat(unsafe { *p })
    }

    #[inline(always)]
    unsafe fn load_repeated<const N: usize>(self, p: *const f32) -> F8 {
        let mut lanes = [0f32; 8];
        for (lane, x) in lanes.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *x = unsafe { *p.add(lane / N) };
        }
        F8(lanes)
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    fn add(self, a: F8, b: F8) -> F8 {
        each(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: F8, b: F8) -> F8 {
        each(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: F8, b: F8) -> F8 {
        each(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: F8, b: F8) -> F8 {
        each(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: F8, b: F8) -> F8 {
        each(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: F8, b: F8) -> F8 {
        each(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn abs(self, x: F8) -> F8 {
        F8(x.0.map(f32::abs))
    }

    #[inline(always)]
    fn mul_add(self, a: F8, b: F8, c: F8) -> F8 {
        // Two roundings: without the instruction, a fused one is a slow library call.
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn exp2_shifted(self, n: F8) -> F8 {
        F8(n.0.map(|n| f32::from_bits(n.to_bits() << 23)))
    }

    #[inline(always)]
    fn select_lt(self, a: F8, b: F8, x: F8, y: F8) -> F8 {
        let mut out = y;
        for i in 0..8 {
            out.0[i] = if a.0[i] < b.0[i] { x.0[i] } else { y.0[i] };
        }
        out
    }

    #[inline(always)]
    unsafe fn store_sums(self, rows: &[F8; 8], p: *mut f32) {
        let mut sums = F8([0.0; 8]);
        for (sum, row) in sums.0.iter_mut().zip(rows) {
            let [a, b, c, d, e, f, g, h] = row.0;
            *sum = ((a + e) + (c + g)) + ((b + f) + (d + h));
        }
        // SAFETY: the caller's.
        unsafe { self.store(p, sums) };
    }

    #[inline(always)]
    fn max_lanes(self, x: F8) -> f32 {
        x.0.iter().fold(f32::NEG_INFINITY, |a, &b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn store_codes(self, p: *mut i8, x: F8) {
        // As round(), but small: the sum's low mantissa bits are the integer.
        const SHIFT: f32 = 12_582_912.0;
        let codes = x.0.map(|x| (x + SHIFT).to_bits() as i8);
        // SAFETY: the caller's.
        unsafe { p.cast::<[i8; 8]>().write_unaligned(codes) }
    }

    #[inline(always)]
    unsafe fn round_scales_up(self, scale_type: ScaleType, amax: F8, p: *mut u8, n: usize) -> F8 {
        let mut values = F8([0.0; 8]);
        // SAFETY: the caller's.
        let stored = unsafe { std::slice::from_raw_parts_mut(p, n * scale_type.bytes()) };
        let stored = stored.chunks_exact_mut(scale_type.bytes());
        for ((value, &amax), stored) in values.0.iter_mut().zip(&amax.0).zip(stored) {
            if let Some(scale) = kv_quant::round_scale_up(amax, scale_type) {
                *value = scale.value;
                scale.write(scale_type, stored);
            }
        }
        values
    }
}
