//! Append against the plain version of `kv_quant`: same bits, same errors, nothing written on error.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use cpu_reference::Isa;
use cpu_reference::case::{Floats, Rng};
use half::{bf16, f16};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, Error, FloatSlice, FloatType, ScaleType, Side};

/// On every instruction set that this machine has, and on the one that is chosen.
fn both(layout: &CacheLayout, k: FloatSlice<'_>, v: FloatSlice<'_>, slots: &[i64]) -> Result<(), Error> {
    let mut empty = CacheBuffers::zeroed(layout).unwrap();
    empty.as_mut_vecs().iter_mut().for_each(|buffer| buffer.fill(0xa5));
    let (mut plain, mut fast) = (empty.clone(), empty.clone());
    let want = kv_quant::append(layout, &mut plain.view_mut(), k, v, slots);
    let got = cpu_reference::append(layout, &mut fast.view_mut(), k, v, slots);
    // Errors may hold NaN, so they are compared as text.
    assert_eq!(format!("{got:?}"), format!("{want:?}"));
    assert!(plain == fast, "different bits: {layout:?}");
    for isa in Isa::available() {
        let mut fast = empty.clone();
        let got = cpu_reference::append_on(isa, layout, &mut fast.view_mut(), k, v, slots);
        assert_eq!(format!("{got:?}"), format!("{:?}", want.clone().map_err(cpu_reference::Error::Cache)));
        assert!(plain == fast, "{isa}, different bits: {layout:?}");
    }
    got
}

#[test]
fn an_instruction_set_that_is_not_there_is_refused() {
    let format = CacheFormat::new(1, 16, 16, 16, ScaleType::F16).unwrap();
    let layout = CacheLayout::nhd(format, 1, 16).unwrap();
    let mut cache = CacheBuffers::zeroed(&layout).unwrap();
    let x = [1f32; 16];
    let x = FloatSlice::F32(&x);
    for isa in Isa::ALL {
        let got = cpu_reference::append_on(isa, &layout, &mut cache.view_mut(), x, x, &[0]);
        assert_eq!(got.is_ok(), isa.is_available(), "{isa}: {got:?}");
    }
}

#[test]
fn bits_are_those_of_the_plain_version() {
    let mut rng = Rng::new(7);
    for (head_dim, groups) in [
        (64, [8, 32]),
        (128, [128, 16]),
        (24, [24, 8]),
        (20, [20, 20]),
        (256, [64, 8]),
        (72, [8, 72]),
        (17, [17, 17]),
    ] {
        for scale_type in ScaleType::ALL {
            for float_type in FloatType::ALL {
                let format = CacheFormat::new(3, head_dim, groups[0], groups[1], scale_type).unwrap();
                for tokens in [1usize, 5, 120] {
                    let layout = CacheLayout::native(format, 9, 16).unwrap();
                    let mut slots: Vec<i64> = (0..144).collect();
                    rng.shuffle(&mut slots);
                    slots.truncate(tokens);
                    slots[tokens / 2] = -1;
                    let len = tokens * 3 * head_dim as usize;
                    let mut draw = |factor: f32| -> Floats {
                        let x: Vec<f32> = (0..len)
                            .map(|i| {
                                // Groups of zeros, subnormal scales, and ordinary ones.
                                let size = [1.0, 1e-6, 0.0, 1e-3, 100.0, 1e-38][(i / 8 + i / 512) % 6];
                                rng.gaussian() * size * factor
                            })
                            .collect();
                        Floats::round(float_type, &x)
                    };
                    let (k, v) = (draw(1.0), draw(3.0));
                    both(&layout, k.as_slice(), v.as_slice(), &slots).unwrap();
                }
            }
        }
    }
}

#[test]
fn every_16_bit_pattern_gives_the_same_bits() {
    let finite: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).collect();
    let finite_bf16: Vec<bf16> =
        (0..=u16::MAX).map(bf16::from_bits).filter(|x| x.is_finite() && x.to_f32().abs() < 8e6).collect();
    for scale_type in ScaleType::ALL {
        for group_len in [8, 64] {
            let format = CacheFormat::new(1, 64, group_len, group_len, scale_type).unwrap();
            let layout = CacheLayout::lightllm(format, 1024).unwrap();
            let slots: Vec<i64> = (0..(finite.len() / 64) as i64).collect();
            let k = &finite[..slots.len() * 64];
            both(&layout, FloatSlice::F16(k), FloatSlice::F16(k), &slots).unwrap();
            let slots: Vec<i64> = (0..(finite_bf16.len() / 64) as i64).collect();
            let k = &finite_bf16[..slots.len() * 64];
            both(&layout, FloatSlice::Bf16(k), FloatSlice::Bf16(k), &slots).unwrap();
        }
    }
}

#[test]
fn errors_are_those_of_the_plain_version_and_nothing_is_written() {
    let format = CacheFormat::new(2, 64, 32, 8, ScaleType::F16).unwrap();
    let layout = CacheLayout::hnd(format, 4, 16).unwrap();
    let good = vec![1f32; 3 * 128];
    let slots = [5, 63, 0];
    let as_slice = |x: &'static [f32]| FloatSlice::F32(x);
    assert!(both(&layout, FloatSlice::F32(&good), FloatSlice::F32(&good), &slots).is_ok());
    for (value, at) in
        [(f32::NAN, 0), (f32::INFINITY, 383), (f32::NEG_INFINITY, 200), (1e7, 130), (8_319_009.0, 64)]
    {
        let mut bad = good.clone();
        bad[at] = value;
        let error = both(&layout, FloatSlice::F32(&good), FloatSlice::F32(&bad), &slots).unwrap_err();
        assert!(matches!(
            error,
            Error::NonFinite { side: Side::V, .. } | Error::ScaleOverflow { side: Side::V, .. }
        ));
        assert!(both(&layout, FloatSlice::F32(&bad), FloatSlice::F32(&good), &slots).is_err());
        // A token that is skipped may hold anything.
        let mut skipping = slots;
        skipping[at / 128] = -1;
        assert!(both(&layout, FloatSlice::F32(&bad), FloatSlice::F32(&bad), &skipping).is_ok());
    }
    let mut largest = good.clone();
    largest[70] = 8_319_008.0;
    assert!(both(&layout, FloatSlice::F32(&largest), FloatSlice::F32(&good), &slots).is_ok());
    for slots in [[5, 64, 0], [5, -2, 0], [5, 63, 5], [i64::MAX, 0, 1]] {
        assert!(both(&layout, FloatSlice::F32(&good), FloatSlice::F32(&good), &slots).is_err());
    }
    assert!(both(&layout, FloatSlice::F32(&good[..1]), FloatSlice::F32(&good), &slots).is_err());
    assert!(both(&layout, as_slice(&[]), as_slice(&[]), &[]).is_ok());
    let half = vec![f16::ONE; 3 * 128];
    assert!(both(&layout, FloatSlice::F16(&half), FloatSlice::F32(&good), &slots).is_err());
}

#[test]
fn slots_in_any_order_are_found_to_be_different() {
    let format = CacheFormat::new(1, 16, 16, 16, ScaleType::F32).unwrap();
    let layout = CacheLayout::nhd(format, 20, 16).unwrap();
    let mut slots: Vec<i64> = (0..200).rev().collect();
    let x = vec![0.5f32; 200 * 16];
    both(&layout, FloatSlice::F32(&x), FloatSlice::F32(&x), &slots).unwrap();
    slots[150] = slots[20];
    assert!(matches!(
        both(&layout, FloatSlice::F32(&x), FloatSlice::F32(&x), &slots),
        Err(Error::SlotTwice { first: 20, second: 150, .. })
    ));
}
