//! The documented bound, in exact arithmetic, over all input types, scale types and group lengths.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use half::{bf16, f16};
use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatType, GROUP_LENS, ScaleType, Side, append,
    dequantize_row, max_code, quantization_error_bound, quantize_group, quantize_value, read_codes,
    read_scales,
};
use proptest::prelude::*;

/// Owned input of any type.
enum Rows {
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Rows {
    fn new(values: &[f32], float_type: FloatType) -> Self {
        match float_type {
            FloatType::F16 => {
                Rows::F16(values.iter().map(|&x| f16::from_f32(x.clamp(-65504.0, 65504.0))).collect())
            }
            FloatType::Bf16 => Rows::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            FloatType::F32 => Rows::F32(values.to_vec()),
        }
    }

    fn slice(&self) -> FloatSlice<'_> {
        match self {
            Rows::F16(x) => FloatSlice::F16(x),
            Rows::Bf16(x) => FloatSlice::Bf16(x),
            Rows::F32(x) => FloatSlice::F32(x),
        }
    }
}

/// Finite values of one magnitude or of many, with zeros; `f16` scales hold all of them.
fn values(len: usize) -> impl Strategy<Value = Vec<f32>> {
    let value = |exponents: std::ops::Range<i32>| {
        (exponents, -1f32..1.0).prop_map(|(exponent, x)| x * 2f32.powi(exponent)).boxed()
    };
    let any_exponent = || prop_oneof![4 => value(-40..23), 1 => Just(0f32), 1 => value(-149..-20)];
    prop_oneof![
        (-30i32..22).prop_flat_map(move |e| prop::collection::vec(value(e..e + 1), len)),
        prop::collection::vec(any_exponent(), len),
        // Small whole multiples of a power of two: quotients that end in .5 are ordinary here.
        (-20i32..10).prop_flat_map(move |e| {
            let multiple = (-127i32..=127).prop_map(move |n| n as f32 * 2f32.powi(e) / 2.0);
            prop::collection::vec(multiple, len)
        }),
        Just(vec![0f32; len]),
    ]
}

fn case() -> impl Strategy<Value = (FloatType, ScaleType, u32, u32, Vec<f32>)> {
    let group_lens = GROUP_LENS.to_vec();
    (
        prop::sample::select(FloatType::ALL.to_vec()),
        prop::sample::select(ScaleType::ALL.to_vec()),
        prop::sample::select(group_lens),
        1u32..4,
    )
        .prop_flat_map(|(float_type, scale_type, group_len, groups)| {
            let head_dim = (group_len * groups).clamp(16, 256) / group_len * group_len;
            values(head_dim as usize).prop_map(move |x| (float_type, scale_type, group_len, head_dim, x))
        })
}

proptest! {
    #[test]
    fn every_value_is_within_the_bound((float_type, scale_type, group_len, head_dim, x) in case()) {
        let format = CacheFormat::new(1, head_dim, group_len, group_len, scale_type).unwrap();
        let layout = CacheLayout::native(format, 1, 1).unwrap();
        let mut cache = CacheBuffers::zeroed(&layout).unwrap();
        let rows = Rows::new(&x, float_type);
        append(&layout, &mut cache.view_mut(), rows.slice(), rows.slice(), &[0]).unwrap();
        for side in [Side::K, Side::V] {
            let codes = read_codes(&layout, &cache.view(), side, 0, 0).unwrap();
            let mut scales = vec![0f32; format.num_groups(side) as usize];
            read_scales(&layout, &cache.view(), side, 0, 0, &mut scales).unwrap();
            for (i, &code) in codes.iter().enumerate() {
                let (x, scale) = (f64::from(rows.slice().get(i).unwrap()), scales[i / group_len as usize]);
                prop_assert!((-127..=127).contains(&code));
                // Exact: the product has 31 bits and lies within a factor of two of x unless the code is 0.
                let error = (x - f64::from(code) * f64::from(scale)).abs();
                let bound = quantization_error_bound(scale);
                prop_assert!(error <= bound, "{float_type} {scale_type} x {x:e} code {code} scale {scale:e}");
            }
            for (codes, (&scale, group)) in
                codes.chunks(group_len as usize).zip(scales.iter().zip(0..format.num_groups(side) as usize))
            {
                let values = (0..codes.len()).map(|i| rows.slice().get(group * codes.len() + i).unwrap());
                if values.clone().all(|x| x == 0.0) {
                    prop_assert!(scale.to_bits() == 0 && codes.iter().all(|&code| code == 0));
                } else {
                    prop_assert!(scale > 0.0);
                }
            }
        }
    }

    /// Quantizing what was dequantized gives the same codes and the same scale wherever the largest code is 127.
    ///
    /// With f16 scales that is whenever the scale is normal (2^-14 and up), since then the scale is at most 2^-10
    /// above amax / 127; with bf16 scales the largest code can be 126. With f32 scales `code * scale` is itself
    /// rounded, so the codes stay and the scale may move by its last bit.
    #[test]
    fn own_output_is_a_fixed_point((_, scale_type, group_len, _, x) in case()) {
        let len = group_len.min(x.len() as u32) as usize;
        let mut codes = vec![0i8; len];
        let scale = quantize_group(&x[..len], scale_type, &mut codes).unwrap();
        let back: Vec<f32> = codes.iter().map(|&code| f32::from(code) * scale.value).collect();
        let mut again = vec![0i8; len];
        let second = quantize_group(&back, scale_type, &mut again).unwrap();
        let largest = codes.iter().map(|code| code.unsigned_abs()).max().unwrap();
        if scale_type == ScaleType::F16 && scale.value >= 2f32.powi(-14) {
            prop_assert_eq!(largest, 127);
        }
        if largest == 127 || scale.value == 0.0 {
            prop_assert_eq!(&again, &codes);
            let drift = second.bits.abs_diff(scale.bits);
            prop_assert!(drift <= u32::from(scale_type == ScaleType::F32 && largest > 0), "{drift}");
        }
    }
}

#[test]
fn the_worked_example_of_the_documentation() {
    // docs/int8-format.md, section 1.
    let mut codes = [0i8; 4];
    let scale = quantize_group(&[1.0, -0.5, 0.25, 0.003], ScaleType::F16, &mut codes).unwrap();
    assert_eq!((scale.bits, scale.value), (0x2009, 1033.0 / 131_072.0));
    assert_eq!(codes, [127, -63, 32, 0]);
}

#[test]
fn bf16_scales_are_not_always_a_fixed_point() {
    // amax / 127 just above 1: the scale is 1 + 2^-7, the largest code 126, and 126 / 127 of that rounds up to less.
    let x = [127.01f32; 8];
    let mut codes = [0i8; 8];
    let scale = quantize_group(&x, ScaleType::Bf16, &mut codes).unwrap();
    assert_eq!((scale.value, codes[0]), (1.0078125, 126));
    let second = quantize_group(&[126.0 * scale.value; 8], ScaleType::Bf16, &mut codes).unwrap();
    assert_eq!((second.value, codes[0]), (1.0, 127));
}

#[test]
fn the_bound_is_nearly_reached() {
    // A quotient that f32 rounds down onto 126.5, and the tie then to even: half a step and 2^-18 of one.
    let scale = f32::from_bits(0x3f80_0001);
    let tie = 126.5f32;
    let worst = (0..2000u32)
        .map(|i| f32::from_bits((tie * scale).to_bits() + i))
        .take_while(|x| x / scale <= tie)
        .map(|x| f64::from(x) - 126.0 * f64::from(scale))
        .fold(0f64, f64::max);
    assert!(worst > 0.5 * f64::from(scale), "{worst}");
    assert!(worst <= quantization_error_bound(scale));
    assert_eq!(quantization_error_bound(0.0), 0.0);
    assert_eq!(quantization_error_bound(1.0), 0.5 + 127.0 / 16_777_216.0);
}

#[test]
fn ties_go_to_even() {
    for (x, code) in [
        (0.5, 0),
        (1.5, 2),
        (2.5, 2),
        (3.5, 4),
        (125.5, 126),
        (126.5, 126),
        (-0.5, 0),
        (-1.5, -2),
        (-2.5, -2),
    ] {
        for scale in [1f32, 0.25, 1024.0, 2f32.powi(-24), 2f32.powi(-130)] {
            assert_eq!(quantize_value(x * scale, scale), code, "{x} * {scale:e}");
        }
    }
    // The nearest f32 to either side of a tie is no tie.
    assert_eq!(quantize_value(2.5f32.next_up(), 1.0), 3);
    assert_eq!(quantize_value(3.5f32.next_down(), 1.0), 3);
}

#[test]
fn codes_never_leave_127() {
    assert_eq!(max_code(), 127);
    for x in [127f32, 127.4, 128.0, 1e30, f32::MAX] {
        assert_eq!((quantize_value(x, 1.0), quantize_value(-x, 1.0)), (127, -127));
    }
    assert_eq!(quantize_value(5.0, 0.0), 0, "a scale of 0 has no other code");
}

#[test]
fn minus_128_is_read_as_minus_128() {
    let format = CacheFormat::new(1, 16, 16, 16, ScaleType::F16).unwrap();
    let layout = CacheLayout::hnd(format, 1, 1).unwrap();
    let mut cache = CacheBuffers::zeroed(&layout).unwrap();
    let rows = vec![1f32; 16];
    append(&layout, &mut cache.view_mut(), FloatSlice::F32(&rows), FloatSlice::F32(&rows), &[0]).unwrap();
    cache.as_mut_vecs()[0][5] = 0x80;
    let mut scale = [0f32];
    read_scales(&layout, &cache.view(), Side::K, 0, 0, &mut scale).unwrap();
    let mut out = vec![0f32; 16];
    dequantize_row(&layout, &cache.view(), Side::K, 0, 0, &mut out).unwrap();
    assert_eq!(read_codes(&layout, &cache.view(), Side::K, 0, 0).unwrap()[5], -128);
    assert_eq!(out[5], -128.0 * scale[0]);
    assert_eq!(out[4], 127.0 * scale[0]);
}
