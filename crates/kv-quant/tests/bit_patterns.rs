//! Every f16 and every bf16 bit pattern as a member of a group: finite ones within the bound, the others refused.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use half::{bf16, f16};
use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, Error, FloatSlice, ScaleType, Side, append,
    quantization_error_bound, read_codes, read_scales,
};

const DIM: usize = 64;

/// Rows that hold all patterns: neighbours of like magnitude; the finite ones scattered over all magnitudes; each
/// of the others alone among ones.
fn rows(one: u16, is_finite: impl Fn(u16) -> bool) -> Vec<u16> {
    let ascending = 0..=u16::MAX;
    let scattered = (0..=u16::MAX).map(|i| i.wrapping_mul(40_503)); // odd, so every pattern comes once
    let mut rows: Vec<u16> = ascending.clone().chain(scattered.filter(|&bits| is_finite(bits))).collect();
    for bits in ascending.filter(|&bits| !is_finite(bits)) {
        let mut row = [one; DIM];
        row[bits as usize % DIM] = bits;
        rows.extend_from_slice(&row);
    }
    rows
}

/// Appends every row of 64 patterns alone; returns (rows written, rows refused).
fn run<T: Copy>(
    scale_type: ScaleType,
    one: u16,
    from_bits: fn(u16) -> T,
    to_f32: fn(T) -> f32,
    wrap: fn(&[T]) -> FloatSlice<'_>,
) -> (u32, u32) {
    let format = CacheFormat::new(1, DIM as u32, 8, 32, scale_type).unwrap();
    let layout = CacheLayout::native(format, 1, 1).unwrap();
    let mut cache = CacheBuffers::zeroed(&layout).unwrap();
    let zeros: Vec<T> = vec![from_bits(0); DIM];
    let (mut written, mut refused) = (0, 0);
    for bits in rows(one, |bits| to_f32(from_bits(bits)).is_finite()).chunks_exact(DIM) {
        let row: Vec<T> = bits.iter().map(|&bits| from_bits(bits)).collect();
        let values: Vec<f32> = row.iter().map(|&x| to_f32(x)).collect();
        let before = cache.clone();
        for side in [Side::K, Side::V] {
            let (k, v) = if side == Side::K { (&row, &zeros) } else { (&zeros, &row) };
            let group_len = format.group_len(side) as usize;
            match append(&layout, &mut cache.view_mut(), wrap(k), wrap(v), &[0]) {
                Ok(()) => {
                    written += 1;
                    let mut scales = vec![0f32; DIM / group_len];
                    read_scales(&layout, &cache.view(), side, 0, 0, &mut scales).unwrap();
                    let codes = read_codes(&layout, &cache.view(), side, 0, 0).unwrap();
                    for (i, (&x, &code)) in values.iter().zip(codes).enumerate() {
                        let scale = scales[i / group_len];
                        let error = (f64::from(x) - f64::from(code) * f64::from(scale)).abs();
                        assert!(
                            code != -128 && error <= quantization_error_bound(scale),
                            "{x:e} {code} {scale:e}"
                        );
                    }
                    cache = before.clone();
                }
                Err(error) => {
                    refused += 1;
                    assert_eq!(cache, before, "a refused append wrote something");
                    let bad = values.iter().position(|x| !x.is_finite());
                    match error {
                        Error::NonFinite { side: s, token: 0, head: 0, channel } => {
                            assert_eq!((s, Some(channel as usize)), (side, bad));
                        }
                        Error::ScaleOverflow {
                            side: s, token: 0, head: 0, channel, scale_type: t, ..
                        } => {
                            assert_eq!((s, t), (side, ScaleType::F16));
                            let group = &values[channel as usize..][..group_len];
                            assert!(group.iter().any(|x| x.abs() > 65504.0 * 127.0));
                            assert!(bad.is_none_or(|bad| bad >= channel as usize + group_len));
                        }
                        error => unreachable!("{error}"),
                    }
                }
            }
        }
    }
    (written, refused)
}

#[test]
fn all_patterns() {
    for scale_type in ScaleType::ALL {
        let f16s = run(scale_type, 0x3c00, f16::from_bits, f16::to_f32, |x| FloatSlice::F16(x));
        let bf16s = run(scale_type, 0x3f80, bf16::from_bits, bf16::to_f32, |x| FloatSlice::Bf16(x));
        println!("{scale_type} scales, rows (written, refused): f16 {f16s:?}, bf16 {bf16s:?}");
        // As K and as V: 992 ascending and 992 scattered rows are finite, 32 + 2048 are not.
        assert_eq!(f16s, (2 * (992 + 992), 2 * (32 + 2048)));
        // 1020 and 1020 are finite, 4 + 256 are not; f16 scales hold none of the scattered rows and not all others.
        if scale_type == ScaleType::F16 {
            assert_eq!(bf16s.0 + bf16s.1, 2 * (1020 + 1020 + 4 + 256));
            assert!(bf16s.0 > 1000, "{bf16s:?}");
        } else {
            assert_eq!(bf16s, (2 * (1020 + 1020), 2 * (4 + 256)));
        }
    }
}
