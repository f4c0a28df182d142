//! Every instance against f64, over whole ranges.

use super::{Simd, math};
use crate::arch::portable::Portable;
use half::{bf16, f16};
use kv_quant::ScaleType;

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
    let mut rows = [s.splat(0.0); 8];
    let value = |row: usize, lane: usize| (row * 100 + lane * lane) as f32;
    for (row, x) in rows.iter_mut().enumerate() {
        let lanes: Vec<f32> = (0..16).map(|lane| value(row, lane)).collect();
        // SAFETY: 16 f32.
        *x = unsafe { s.load(lanes.as_ptr()) };
    }
    let mut sums = [0f32; 8];
    // SAFETY: eight f32.
    unsafe { s.store_sums(&rows, sums.as_mut_ptr()) };
    for row in 0..8 {
        assert_eq!(sums[row], (0..S::LANES).map(|lane| value(row, lane)).sum::<f32>(), "{name}");
    }
}

fn check_repeated<S: Simd>(s: S, name: &str) {
    fn lanes<S: Simd, const N: usize>(s: S, x: &[f32; 16]) -> Vec<f32> {
        let mut lanes = vec![0f32; 16];
        // SAFETY: 16 f32 each.
        unsafe { s.store(lanes.as_mut_ptr(), s.load_repeated::<N>(x.as_ptr())) };
        lanes.truncate(S::LANES);
        lanes
    }
    let x: [f32; 16] = std::array::from_fn(|i| i as f32 + 0.5);
    let want = |n: usize| -> Vec<f32> { (0..S::LANES).map(|lane| x[lane / n]).collect() };
    assert_eq!(lanes::<S, 1>(s, &x), want(1), "{name}");
    assert_eq!(lanes::<S, 2>(s, &x), want(2), "{name}");
    assert_eq!(lanes::<S, 4>(s, &x), want(4), "{name}");
    assert_eq!(lanes::<S, 8>(s, &x), want(8), "{name}");
    let mut lanes = [0f32; 16];
    // SAFETY: 16 f32.
    unsafe { s.store(lanes.as_mut_ptr(), s.load_by_eights(x.as_ptr(), 5)) };
    for lane in 0..S::LANES {
        assert_eq!(lanes[lane], x[lane / 8 * 5], "{name}");
    }
}

/// Scales of eight rows, transposed while they are widened.
fn check_scales<S: Simd>(s: S, name: &str) {
    for scale_type in ScaleType::ALL {
        for n in 1..=8 {
            let bytes = scale_type.bytes();
            let mut rows = vec![vec![0u8; 6 + n * bytes]; 8];
            let value = |row: usize, i: usize| ((row * 8 + i) as f32 - 20.0) * 0.25;
            for (row, stored) in rows.iter_mut().enumerate() {
                for (i, stored) in stored[6..].chunks_exact_mut(bytes).enumerate() {
                    match scale_type {
                        ScaleType::F16 => stored.copy_from_slice(&f16::from_f32(value(row, i)).to_le_bytes()),
                        ScaleType::Bf16 => {
                            stored.copy_from_slice(&bf16::from_f32(value(row, i)).to_le_bytes())
                        }
                        ScaleType::F32 => stored.copy_from_slice(&value(row, i).to_le_bytes()),
                    }
                }
            }
            let pointers: Vec<*const u8> = rows.iter().map(|row| row.as_ptr()).collect();
            let mut out = vec![-1f32; 7 * 24 + 8];
            // SAFETY: eight rows of n scales behind 6 bytes; room for eight groups.
            unsafe { s.widen_scales(scale_type, pointers.as_ptr(), 6, n, out.as_mut_ptr(), 24) };
            for (i, out) in out.chunks(24).enumerate() {
                for (row, &x) in out[..8].iter().enumerate() {
                    assert_eq!(x, if i < n { value(row, i) } else { -1.0 }, "{name} {scale_type} {n}");
                }
            }
        }
    }
}

/// Integer dot products, to the bit; K may hold -128.
fn check_codes<S: Simd>(s: S, name: &str) {
    let code = |i: usize, factor: usize| ((i * factor + i * i * 7) % 256) as u8 as i8;
    for start in 0..40 {
        let mut k: Vec<i8> = (start..start + 64).map(|i| code(i, 37)).collect();
        let mut q: Vec<i8> = (start..start + 64).map(|i| code(i, 91).max(-127)).collect();
        if start == 0 {
            (k, q) = (vec![-128; 64], vec![-127; 64]);
        }
        let quads = q.chunks(4).map(|q| q.iter().map(|&q| i32::from(q)).sum::<i32>());
        let offsets: Vec<i32> = quads.map(|sum| -128 * sum).collect();
        let mut lanes = [0f32; 16];
        // SAFETY: 64 codes each, 16 offsets, 16 f32.
        unsafe { s.store(lanes.as_mut_ptr(), s.dot_codes(k.as_ptr(), q.as_ptr(), offsets.as_ptr())) };
        for lane in 0..S::LANES {
            let products = (lane * 4..lane * 4 + 4).map(|i| i32::from(k[i]) * i32::from(q[i]));
            assert_eq!(lanes[lane], products.sum::<i32>() as f32, "{name}");
        }
    }
}

fn check_all<S: Simd>(s: S, name: &str) {
    check(s, name);
    check_sum(s, name);
    check_repeated(s, name);
    check_scales(s, name);
    check_codes(s, name);
    if let Some(s) = s.integer() {
        check_codes(s, name);
    }
}

#[test]
fn every_instance_does_what_the_trait_says() {
    check_all(Portable, "portable");
    #[cfg(target_arch = "x86_64")]
    {
        use crate::arch::x86_64::{avx2::Avx2, avx512::Avx512};
        if let Some(s) = Avx2::new() {
            check_all(s, "avx2");
        }
        if let Some(s) = Avx512::new() {
            check_all(s, "avx512");
        }
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(s) = crate::arch::aarch64::neon::Neon::new() {
        check_all(s, "neon");
    }
}
