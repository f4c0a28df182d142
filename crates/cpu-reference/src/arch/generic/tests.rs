//! Every instance against f64, over whole ranges.

use super::{Simd, math};
use crate::arch::portable::Portable;

fn check<S: Simd>(s: S, name: &str) {
    let apply = |f: fn(S, S::F) -> S::F, x: &[f32]| -> Vec<f32> {
        let mut y = vec![0f32; x.len()];
        for (x, y) in x.chunks_exact(S::LANES).zip(y.chunks_exact_mut(S::LANES)) {
            // SAFETY: LANES elements each.
            unsafe { s.store(y.as_mut_ptr(), f(s, s.load(x.as_ptr()))) };
        }
        y
    };
    // Every 1009th f32 of the range, both signs for tanh.
    let step = 1009 * 16;
    let mut worst = [0f64; 2];
    for start in (0..0x42b0_0000u32).step_by(step) {
        let x: Vec<f32> = (0..16).map(|i| -f32::from_bits(start + i * 1009)).collect();
        for (x, y) in x.iter().zip(apply(math::exp, &x)) {
            let want = f64::from(*x).exp();
            if want >= f64::from(f32::MIN_POSITIVE) * 1.001 {
                worst[0] = worst[0].max(((f64::from(y) - want) / want).abs());
            } else {
                assert!(f64::from(y) <= f64::from(f32::MIN_POSITIVE) * 1.001, "{name} exp({x}) = {y}");
            }
        }
    }
    for start in (0x0080_0000..0x4300_0000u32).step_by(step) {
        let x: Vec<f32> = (0..16)
            .map(|i| f32::from_bits(start + i * 1009))
            .map(|x| if start % 2 == 0 { x } else { -x })
            .collect();
        for (x, y) in x.iter().zip(apply(math::tanh, &x)) {
            let want = f64::from(*x).tanh();
            worst[1] = worst[1].max(((f64::from(y) - want) / want).abs());
        }
    }
    let u = f64::from(f32::EPSILON) / 2.0;
    println!("{name}: exp {:.2} u, tanh {:.2} u", worst[0] / u, worst[1] / u);
    assert!(worst[0] <= 2.0 * u && worst[1] <= 6.0 * u, "{name}: {worst:?}");
    let special = [0.0, -0.0, f32::NEG_INFINITY, -1e30, -87.3, -100.0, -104.0, f32::MIN];
    let special: Vec<f32> = special.into_iter().cycle().take(16).collect();
    let y = apply(math::exp, &special);
    assert_eq!(y[..3], [1.0, 1.0, 0.0], "{name}");
    assert_eq!(y[5..8], [0.0; 3], "{name}");
}

fn check_sum<S: Simd>(s: S, name: &str) {
    let mut rows = [s.splat(0.0); 16];
    let value = |row: usize, lane: usize| (row * 100 + lane * lane) as f32;
    for (row, x) in rows.iter_mut().enumerate() {
        let lanes: Vec<f32> = (0..16).map(|lane| value(row, lane)).collect();
        // SAFETY: 16 f32.
        *x = unsafe { s.load(lanes.as_ptr()) };
    }
    let mut sums = [0f32; 16];
    // SAFETY: 16 f32.
    unsafe { s.store(sums.as_mut_ptr(), s.sum_lanes(&rows)) };
    for row in 0..S::LANES {
        assert_eq!(sums[row], (0..S::LANES).map(|lane| value(row, lane)).sum::<f32>(), "{name}");
    }
}

#[test]
fn exp_and_tanh_are_as_accurate_as_documented() {
    check(Portable, "portable");
    check_sum(Portable, "portable");
    #[cfg(target_arch = "x86_64")]
    {
        use crate::arch::x86_64::{avx2::Avx2, avx512::Avx512};
        if let Some(s) = Avx2::new() {
            check(s, "avx2");
            check_sum(s, "avx2");
        }
        if let Some(s) = Avx512::new() {
            check(s, "avx512");
            check_sum(s, "avx512");
        }
    }
}
