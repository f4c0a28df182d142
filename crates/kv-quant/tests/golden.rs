//! Golden vectors: groups of bit patterns with the scale and the codes that every backend must produce.
//!
//! `golden/groups.txt` is made by the rule as written in `docs/int8-format.md`, in exact integer and f64 arithmetic
//! that shares no code with the crate. `KV8_WRITE_GOLDEN=1 cargo test -p kv-quant --test golden` writes it anew.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure is the point")]

use half::{bf16, f16};
use kv_quant::{FloatType, ScaleType, quantize_group};
use rand::{Rng, SeedableRng, rngs::StdRng};

const TABLE: &str = include_str!("golden/groups.txt");
const HEADER: &str = "\
# One group a line: input type, scale type, group_len, input bit patterns, scale bit pattern, codes.
# Numbers are hexadecimal; codes are two's complement bytes. A scale of '-' means that it overflows its type.
";

fn value(float_type: FloatType, bits: u32) -> f32 {
    match float_type {
        FloatType::F16 => f16::from_bits(bits as u16).to_f32(),
        FloatType::Bf16 => bf16::from_bits(bits as u16).to_f32(),
        FloatType::F32 => f32::from_bits(bits),
    }
}

fn scale_value(scale_type: ScaleType, bits: u32) -> f64 {
    match scale_type {
        ScaleType::F16 => f16::from_bits(bits as u16).to_f64(),
        ScaleType::Bf16 => bf16::from_bits(bits as u16).to_f64(),
        ScaleType::F32 => f64::from(f32::from_bits(bits)),
    }
}

/// The first scale, counted up by bit pattern, whose product with 127 (exact in f64) reaches amax.
fn exact_scale(amax: f32, scale_type: ScaleType) -> Option<u32> {
    let infinity = match scale_type {
        ScaleType::F16 => 0x7c00,
        ScaleType::Bf16 => 0x7f80,
        ScaleType::F32 => 0x7f80_0000,
    };
    let (mut low, mut high) = (0u32, infinity);
    while low < high {
        let middle = low + (high - low) / 2;
        if scale_value(scale_type, middle) * 127.0 >= f64::from(amax) {
            high = middle
        } else {
            low = middle + 1
        }
    }
    (low < infinity).then_some(low)
}

/// The f32 quotient through f64 (53 bits are more than twice 24 and 2, so rounding twice is rounding once), then half
/// to even by hand.
fn exact_code(x: f32, scale: f64) -> i8 {
    if scale == 0.0 {
        return 0;
    }
    let quotient = f64::from((f64::from(x) / scale) as f32);
    let (floor, rest) = (quotient.floor(), quotient - quotient.floor());
    let is_odd = floor as i64 % 2 != 0;
    let up = rest > 0.5 || (rest == 0.5 && is_odd);
    (floor as i64 + i64::from(up)) as i8
}

fn line(float_type: FloatType, scale_type: ScaleType, bits: &[u32]) -> String {
    let values: Vec<f32> = bits.iter().map(|&bits| value(float_type, bits)).collect();
    let amax = values.iter().fold(0f32, |amax, x| amax.max(x.abs()));
    let width = float_type.bytes() * 2;
    let inputs: Vec<String> = bits.iter().map(|bits| format!("{bits:0width$x}")).collect();
    let head = format!("{float_type} {scale_type} {} {}", bits.len(), inputs.join(","));
    match exact_scale(amax, scale_type) {
        None => format!("{head} - -\n"),
        Some(scale) => {
            let scale_f64 = scale_value(scale_type, scale);
            let codes: Vec<String> =
                values.iter().map(|&x| format!("{:02x}", exact_code(x, scale_f64) as u8)).collect();
            format!("{head} {scale:0width$x} {}\n", codes.join(""), width = scale_type.bytes() * 2)
        }
    }
}

/// Groups worth fixing: zeros of both signs, one value, subnormals, the largest values, ties, scale neighbours, noise.
fn table() -> String {
    let mut rng = StdRng::seed_from_u64(127);
    let mut table = HEADER.to_string();
    for float_type in FloatType::ALL {
        let bits_of = |x: f32| match float_type {
            FloatType::F16 => u32::from(f16::from_f32(x).to_bits()),
            FloatType::Bf16 => u32::from(bf16::from_f32(x).to_bits()),
            FloatType::F32 => x.to_bits(),
        };
        let (sign, largest) = match float_type {
            FloatType::F16 => (0x8000, 0x7bff),
            FloatType::Bf16 => (0x8000, 0x7f7f),
            FloatType::F32 => (0x8000_0000, 0x7f7f_ffff),
        };
        let mut groups: Vec<Vec<u32>> = vec![
            vec![0; 8],
            vec![sign; 8],
            vec![1; 8],
            vec![1, sign | 1, 2, sign | 3, 0, sign, 5, 7],
            vec![largest; 8],
            vec![largest, sign | largest, 1, sign | 1, 0, sign, largest - 1, largest / 2],
        ];
        let mut of_values = |values: &[f32]| groups.push(values.iter().map(|&x| bits_of(x)).collect());
        of_values(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]);
        of_values(&[63.5, 0.25, 0.75, 1.25, -0.25, -0.75, 62.75, -63.25]);
        of_values(&[127.0 * 1024.0 / 2048.0, 31.75, 32.25, -0.25, 0.75, 3.25, 15.75, -47.25]);
        for exponent in [-20, -16, -14, -9, -3, 0, 4, 8] {
            // 127 steps of a power of two and its neighbours: exact, one step below, one above.
            let top = bits_of(127.0 * 2f32.powi(exponent));
            for bits in [top - 1, top, top + 1] {
                groups.push(vec![bits, sign | (bits - 3), bits / 2, 1, 0, sign | 77, top - 2, top / 3]);
            }
        }
        for group_len in [8usize, 8, 8, 16, 32, 64, 128, 80] {
            for sigma in [1f32, 1e-3, 3e-6, 700.0] {
                let normal = (0..group_len).map(|_| {
                    let sum: f32 = (0..12).map(|_| rng.random::<f32>()).sum();
                    bits_of((sum - 6.0) * sigma)
                });
                groups.push(normal.collect());
            }
        }
        for _ in 0..8 {
            // Any finite patterns at all.
            let finite = (0..8).map(|_| rng.random_range(0..=largest) | if rng.random() { sign } else { 0 });
            groups.push(finite.collect());
        }
        for scale_type in ScaleType::ALL {
            for group in &groups {
                table.push_str(&line(float_type, scale_type, group));
            }
        }
    }
    table
}

#[test]
fn the_table_is_the_rule() {
    let table = table();
    if std::env::var_os("KV8_WRITE_GOLDEN").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/groups.txt");
        std::fs::write(path, &table).unwrap();
        return;
    }
    for (got, want) in TABLE.lines().zip(table.lines()) {
        assert_eq!(got, want);
    }
    assert_eq!(TABLE.len(), table.len());
}

#[test]
fn the_crate_follows_the_table() {
    let mut num_groups = 0;
    for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split(' ').collect();
        let [float_type, scale_type, group_len, inputs, scale, codes] = fields[..] else { panic!("{line}") };
        let float_type = *FloatType::ALL.iter().find(|t| t.to_string() == float_type).unwrap();
        let scale_type = *ScaleType::ALL.iter().find(|t| t.to_string() == scale_type).unwrap();
        let hex = |text: &str| u32::from_str_radix(text, 16).unwrap();
        let values: Vec<f32> = inputs.split(',').map(|bits| value(float_type, hex(bits))).collect();
        assert_eq!(values.len().to_string(), group_len);
        let mut got = vec![99i8; values.len()];
        match quantize_group(&values, scale_type, &mut got) {
            None => assert!(scale == "-" && got.iter().all(|&code| code == 99), "{line}"),
            Some(stored) => {
                assert_eq!(stored.bits, hex(scale), "{line}");
                let got: String = got.iter().map(|&code| format!("{:02x}", code as u8)).collect();
                assert_eq!(got, codes, "{line}");
            }
        }
        num_groups += 1;
    }
    assert!(num_groups > 600, "{num_groups}");
}
