//! Shaped rounding: never worse than nearest where queries look, same scales, codes that append stores unchanged.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, Error, FloatSlice, FloatType, QueryMoments, ScaleType,
    ShapedRounding, Side, append, read_codes, read_scales, rotate_heads,
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Queries that look along few directions: `[tokens, num_q_heads, dim]`.
fn queries(rng: &mut StdRng, tokens: usize, num_q_heads: usize, dim: usize) -> Vec<f32> {
    let sizes: Vec<f32> = (0..dim).map(|i| 4.0 * 0.8f32.powi(i as i32)).collect();
    let mut q: Vec<f32> = (0..tokens * num_q_heads)
        .flat_map(|_| sizes.iter().map(|size| size * rng.random_range(-1f32..1.0)).collect::<Vec<_>>())
        .collect();
    rotate_heads(&mut q, dim as u32).unwrap();
    q
}

/// What append makes of `k`: codes and scales of every head of every token.
fn stored(format: CacheFormat, k: &[f32]) -> (Vec<i8>, Vec<f32>) {
    let tokens = k.len() / format.row_elements();
    let layout = CacheLayout::native(format, 1, tokens as u32).unwrap();
    let mut cache = CacheBuffers::zeroed(&layout).unwrap();
    let slots: Vec<i64> = (0..tokens as i64).collect();
    append(&layout, &mut cache.view_mut(), FloatSlice::F32(k), FloatSlice::F32(k), &slots).unwrap();
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for slot in 0..tokens as u64 {
        for head in 0..format.num_kv_heads() {
            codes.extend(read_codes(&layout, &cache.view(), Side::K, slot, head).unwrap());
            let mut of_head = vec![0f32; format.num_groups(Side::K) as usize];
            read_scales(&layout, &cache.view(), Side::K, slot, head, &mut of_head).unwrap();
            scales.extend(of_head);
        }
    }
    (codes, scales)
}

/// Sums of `e^T (C + ridge) e` over all rows, C by its mean diagonal, e the error of codes against `k`.
fn seen(format: CacheFormat, moments: &QueryMoments, k: &[f32], codes: &[i8], scales: &[f32]) -> Vec<f64> {
    let (dim, group_len) = (format.head_dim() as usize, format.group_len(Side::K) as usize);
    let heads = format.num_kv_heads() as usize;
    let errors: Vec<f64> = (0..k.len())
        .map(|i| f64::from(codes[i]) * f64::from(scales[i / group_len]) - f64::from(k[i]))
        .collect();
    let of_row = |(row, e): (usize, &[f64])| {
        let c = &moments.sums()[row % heads * dim * dim..][..dim * dim];
        let mean = (0..dim).map(|i| c[i * dim + i]).sum::<f64>() / dim as f64;
        let product = |i: usize| (0..dim).map(|j| c[i * dim + j] / mean * e[j]).sum::<f64>() + 0.1 * e[i];
        (0..dim).map(|i| e[i] * product(i)).sum()
    };
    errors.chunks_exact(dim).enumerate().map(of_row).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn queries_see_no_more_than_of_nearest_codes_and_scales_stay(
        seed in any::<u64>(),
        (dim, group_len) in prop::sample::select(vec![(16u32, 8u32), (32, 16), (64, 8), (64, 32), (64, 64), (128, 128), (256, 8)]),
        scale_type in prop::sample::select(ScaleType::ALL.to_vec()),
        exponent in -30i32..12,
        zeroed in any::<bool>(),
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        let format = CacheFormat::new(2, dim, group_len, dim, scale_type).unwrap();
        let q = queries(&mut rng, 40, 4, dim as usize);
        let moments = QueryMoments::from_sample(&q, 4, 2, dim).unwrap();
        let shaped = ShapedRounding::new(Side::K, &moments, &format).unwrap();
        let size = 2f32.powi(exponent);
        let mut k: Vec<f32> = (0..3 * format.row_elements()).map(|_| size * rng.random_range(-1f32..1.0)).collect();
        if zeroed {
            k[..group_len as usize].fill(0.0);
        }
        let mut changed = k.clone();
        shaped.shape(&mut changed).unwrap();
        let (near_codes, near_scales) = stored(format, &k);
        let (codes, scales) = stored(format, &changed);
        // Bit by bit: the largest magnitude of a group is left alone.
        prop_assert_eq!(&scales, &near_scales);
        prop_assert!(codes.iter().all(|code| *code != -128));
        let shaped_sums = seen(format, &moments, &k, &codes, &scales);
        for (shaped, near) in shaped_sums.iter().zip(seen(format, &moments, &k, &near_codes, &near_scales)) {
            prop_assert!(*shaped <= near * (1.0 + 1e-4), "{} {}", shaped, near);
        }
    }
}

#[test]
fn directions_that_queries_see_get_a_fraction_of_the_error() {
    let mut rng = StdRng::seed_from_u64(7);
    for (group_len, scale_type) in [(8, ScaleType::F16), (64, ScaleType::F16), (64, ScaleType::Bf16)] {
        let format = CacheFormat::new(1, 64, group_len, 64, scale_type).unwrap();
        let moments = QueryMoments::from_sample(&queries(&mut rng, 200, 3, 64), 3, 1, 64).unwrap();
        let shaped = ShapedRounding::new(Side::K, &moments, &format).unwrap();
        let k: Vec<f32> = (0..100 * 64).map(|_| rng.random_range(-1f32..1.0)).collect();
        let mut changed = k.clone();
        shaped.shape(&mut changed).unwrap();
        // Other queries than those of the sample.
        let others = queries(&mut rng, 100, 1, 64);
        let energy = |k_stored: &[f32]| {
            let (codes, scales) = stored(format, k_stored);
            let mut sum = 0.0;
            for (row, (codes, k)) in codes.chunks_exact(64).zip(k.chunks_exact(64)).enumerate() {
                for q in others.chunks_exact(64) {
                    let scale = |c: usize| scales[row * (64 / group_len as usize) + c / group_len as usize];
                    let error = |c: usize| f64::from(codes[c]) * f64::from(scale(c)) - f64::from(k[c]);
                    sum += (0..64).map(|c| f64::from(q[c]) * error(c)).sum::<f64>().powi(2);
                }
            }
            sum
        };
        let (near, shaped) = (energy(&k), energy(&changed));
        assert!(shaped < 0.4 * near, "group {group_len} {scale_type}: {shaped} of {near}");
    }
}

#[test]
fn queries_that_look_everywhere_alike_get_nearest_codes() {
    let format = CacheFormat::new(1, 16, 16, 16, ScaleType::F16).unwrap();
    let mut q = vec![0f32; 16 * 16];
    (0..16).for_each(|i| q[i * 17] = 1.0);
    let k: Vec<f32> = (0..16 * 16).map(|i| (i as f32 * 0.73).sin()).collect();
    // Nobody looks at all, or a sample that was broken: the same.
    for q in [q, vec![0.0; 16], vec![f32::NAN; 16]] {
        let moments = QueryMoments::from_sample(&q, 1, 1, 16).unwrap();
        let mut changed = k.clone();
        ShapedRounding::new(Side::K, &moments, &format).unwrap().shape(&mut changed).unwrap();
        assert_eq!(stored(format, &changed), stored(format, &k));
    }
}

#[test]
fn what_append_refuses_is_left_for_it_to_refuse() {
    let format = CacheFormat::new(1, 16, 8, 8, ScaleType::F16).unwrap();
    let q: Vec<f32> = (0..64).map(|i| (i as f32).sin()).collect();
    let moments = QueryMoments::from_sample(&q, 1, 1, 16).unwrap();
    let shaped = ShapedRounding::new(Side::K, &moments, &format).unwrap();
    for bad in [f32::NAN, f32::INFINITY, 1e9] {
        let mut k = vec![0.3f32; 16];
        k[3] = bad;
        let mut changed = k.clone();
        shaped.shape(&mut changed).unwrap();
        assert!(changed.iter().zip(&k).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    assert!(matches!(shaped.shape(&mut [0.0; 17]), Err(Error::Len { what: "x", .. })));
    let floats = CacheFormat::unquantized(1, 16, FloatType::F32).unwrap();
    assert!(matches!(ShapedRounding::new(Side::K, &moments, &floats), Err(Error::NoCodes(_))));
    let two = CacheFormat::new(2, 16, 8, 8, ScaleType::F16).unwrap();
    assert!(matches!(ShapedRounding::new(Side::K, &moments, &two), Err(Error::Len { what: "moments", .. })));
}
