//! Signal to quantization noise on Gaussian data, and what truncation toward zero would cost.
//!
//! `cargo test -p kv-quant --test sqnr -- --nocapture` prints the table of `docs/int8-format.md`.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use half::f16;
use kv_quant::{ScaleType, quantize_group};
use rand::{Rng, SeedableRng, rngs::StdRng};

const NUM_SAMPLES: usize = 1 << 20;

/// Standard normal values (Box-Muller), the same on every run.
fn gaussian() -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(8);
    let mut values = Vec::with_capacity(NUM_SAMPLES);
    while values.len() < NUM_SAMPLES {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
        values.push((radius * angle.cos()) as f32);
        values.push((radius * angle.sin()) as f32);
    }
    values
}

/// (signal to noise in dB, gain `<x, x'> / <x, x>`).
fn measure(values: &[f32], group_len: usize, quantize: impl Fn(&[f32], &mut [i8]) -> f32) -> (f64, f64) {
    let mut codes = vec![0i8; group_len];
    let (mut signal, mut noise, mut product) = (0f64, 0f64, 0f64);
    for group in values.chunks_exact(group_len) {
        let scale = f64::from(quantize(group, &mut codes));
        for (&x, &code) in group.iter().zip(&codes) {
            let (x, back) = (f64::from(x), f64::from(code) * scale);
            signal += x * x;
            noise += (x - back) * (x - back);
            product += x * back;
        }
    }
    (10.0 * (signal / noise).log10(), product / signal)
}

fn ours(scale_type: ScaleType) -> impl Fn(&[f32], &mut [i8]) -> f32 {
    move |group, codes| quantize_group(group, scale_type, codes).unwrap().value
}

/// The rule this crate does not have: scale to nearest, codes cut toward zero (a plain cast).
fn truncated(group: &[f32], codes: &mut [i8]) -> f32 {
    let amax = group.iter().fold(0f32, |amax, x| amax.max(x.abs()));
    let scale = f16::from_f32(amax / 127.0).to_f32();
    codes.iter_mut().zip(group).for_each(|(code, x)| *code = (x / scale) as i8);
    scale
}

#[test]
fn gaussian_data() {
    let values = gaussian();
    println!(
        "| group_len | f16 scale | bf16 scale | f32 scale | truncated | gain f16 | gain f32 | gain truncated |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (group_len, least) in [(8, 48.0), (16, 46.5), (32, 45.4), (64, 44.5), (128, 43.7)] {
        let of = |scale_type| measure(&values, group_len, ours(scale_type));
        let (f16, gain) = of(ScaleType::F16);
        let (bf16, (f32, gain_f32)) = (of(ScaleType::Bf16).0, of(ScaleType::F32));
        let (truncated, shrunk) = measure(&values, group_len, truncated);
        print!("| {group_len} | {f16:.2} | {bf16:.2} | {f32:.2} | {truncated:.2} ");
        println!("| {gain:.5} | {gain_f32:.5} | {shrunk:.4} |");
        assert!(f16 >= least, "group_len {group_len}: {f16:.3} dB");
        assert!(f32 >= f16 - 0.01 && bf16 >= f16 - 0.8, "{f16} {bf16} {f32}");
        // Rounding the scale up brings the largest value of a group, coded 127, back up to 2^-10 too large.
        assert!((gain_f32 - 1.0).abs() < 3e-5 && (0.0..2e-4).contains(&(gain - 1.0)), "{gain_f32} {gain}");
        assert!(truncated < f16 - 5.9 && shrunk < 0.996, "{truncated} {shrunk}");
    }
}

#[test]
fn tiny_values_keep_their_accuracy_under_f16_scales() {
    // Scales are subnormal here; rounded to nearest they would be up to half a step too small and codes would clip.
    let values: Vec<f32> = gaussian().iter().map(|x| x * 1e-3).collect();
    for (sigma, least) in [(1e-3f32, 47.0), (3e-4, 45.0), (1e-4, 40.0)] {
        let scaled: Vec<f32> = values.iter().map(|x| x / 1e-3 * sigma).collect();
        let (db, _) = measure(&scaled, 8, ours(ScaleType::F16));
        println!("sigma {sigma:e}: {db:.2} dB");
        assert!(db >= least, "sigma {sigma:e}: {db:.2} dB");
    }
}
