//! Append: the bytes of the one rule, and nothing else.

use crate::numbers::Numbers;
use crate::poison::{self, Fill};
use crate::problem::Tokens;
use crate::subject::{Opened, Route, Subject};
use crate::values::Values;
use attn_backend::MemoryKind;
use attn_plan::{DecodeSpec, SplitConfig};
use half::{bf16, f16};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatType, GROUP_LENS, ScaleType};

const HEAD_DIM: usize = 128;
const NUM_KV_HEADS: usize = 2;
const ROW: usize = HEAD_DIM * NUM_KV_HEADS;

/// Every finite pattern of a 16-bit type within `limit`, or as many random f32 of every exponent.
fn patterns(float_type: FloatType, limit: f32, numbers: &mut Numbers) -> Vec<f32> {
    let all: Vec<f32> = match float_type {
        FloatType::F16 => (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect(),
        FloatType::Bf16 => (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        FloatType::F32 => (0..1 << 16).map(|_| f32::from_bits(numbers.bits() as u32)).collect(),
    };
    all.into_iter().filter(|x| x.is_finite() && x.abs() <= limit).collect()
}

/// Groups in which every quotient lies at or beside a half: where rounding rules part.
fn ties(len: usize, numbers: &mut Numbers) -> Vec<f32> {
    let scale = 2f32.powi(numbers.below(20) as i32 - 10);
    let value = |i: usize, numbers: &mut Numbers| match i % 8 {
        0 => 127.0 * scale,
        _ => {
            let half = (numbers.below(253) as f32 - 126.0 + 0.5) * scale;
            f32::from_bits(half.to_bits().wrapping_add_signed(numbers.below(3) as i32 - 1))
        }
    };
    (0..len).map(|i| value(i, numbers)).collect()
}

/// K and V of as many tokens as there are values, whole tokens only, and slots in random order with skips.
fn tokens(float_type: FloatType, k: &[f32], v: &[f32], numbers: &mut Numbers) -> Tokens {
    let num_tokens = k.len().min(v.len()) / ROW;
    let mut slots: Vec<i64> = (0..num_tokens as i64).collect();
    numbers.shuffle(&mut slots);
    let (mut k, mut v) = (k[..num_tokens * ROW].to_vec(), v[..num_tokens * ROW].to_vec());
    for token in (0..num_tokens).filter(|token| token % 17 == 3) {
        slots[token] = -1;
        k[token * ROW] = f32::NAN;
        v[token * ROW + 7] = f32::INFINITY;
    }
    Tokens { k: Values::from_f32(float_type, &k), v: Values::from_f32(float_type, &v), slots }
}

fn layout_of(format: CacheFormat, num_slots: u64, choice: usize, odd: u32) -> CacheLayout {
    match choice % 4 {
        0 => CacheLayout::native(format, num_slots.div_ceil(16), 16),
        1 => CacheLayout::hnd(format, num_slots.div_ceil(u64::from(odd)), odd),
        2 => CacheLayout::nhd(format, num_slots, 1),
        _ => CacheLayout::lightllm(format, num_slots),
    }
    .expect("valid layouts")
}

fn open(
    subject: &Subject,
    layout: &CacheLayout,
    dead: &CacheBuffers,
    route: Route,
) -> Result<Opened, String> {
    let format = layout.format();
    let spec = DecodeSpec::new(format.num_kv_heads(), format.num_kv_heads(), format.head_dim());
    let mut opened = subject.open(layout, &spec, SplitConfig::throughput(1), route)?;
    opened.write_image(dead)?;
    Ok(opened)
}

/// Every finite f16 and bf16 pattern and random f32, in order and shuffled, in every group length and scale type:
/// more than a million elements, byte for byte as `kv_quant::append` writes them.
///
/// # Errors
/// The first byte that is another.
pub fn bytes(subject: &Subject) -> Result<(), String> {
    let mut numbers = Numbers::new(1, 0);
    let offered = subject.capability().group_lens;
    let mut choice = 0;
    for float_type in FloatType::ALL {
        for scale_type in ScaleType::ALL {
            let limit = scale_type.largest().min(f32::MAX / 127.0) * 127.0;
            let mut x = patterns(float_type, limit, &mut numbers);
            x.extend(ties(16 * ROW, &mut numbers));
            for group_len in GROUP_LENS.into_iter().filter(|g| offered.is_empty() || offered.contains(g)) {
                let mut shuffled = x.clone();
                numbers.shuffle(&mut shuffled);
                let tokens = tokens(float_type, &x, &shuffled, &mut numbers);
                let format =
                    CacheFormat::new(2, 128, group_len, group_len, scale_type).expect("a valid format");
                choice += 1;
                let layout = layout_of(format, tokens.slots.len() as u64 + 3, choice, subject.page_len(5, 8));
                let route = if choice % 2 == 0 { Route::Session } else { Route::Executor };
                one(subject, &layout, &tokens, route)
                    .map_err(|error| format!("{float_type} into {format} {}: {error}", layout.kind()))?;
                subject.ledger.ran(&subject.name, "append", 1);
                let elements = 2 * tokens.slots.iter().filter(|slot| **slot >= 0).count() * ROW;
                let what = format!("{}: elements of append compared byte for byte", subject.name);
                subject.ledger.tally(&what, elements as u64);
            }
        }
    }
    Ok(())
}

fn one(subject: &Subject, layout: &CacheLayout, tokens: &Tokens, route: Route) -> Result<(), String> {
    let dead = poison::dead_cache(layout, Fill::Poison);
    let mut image = dead.clone();
    let (k, v) = (tokens.k.as_slice(), tokens.v.as_slice());
    kv_quant::append(layout, &mut image.view_mut(), k, v, &tokens.slots)
        .map_err(|error| error.to_string())?;
    let mut opened = open(subject, layout, &dead, route)?;
    opened.append(tokens)?;
    opened.compare_image(&image)
}

/// Every NaN and infinity of f16 and bf16, and scales that overflow: the same typed error as `kv_quant::append`, and
/// on a host backend not a byte changed.
///
/// # Errors
/// The first pattern that is taken, or refused with another error.
pub fn non_finite(subject: &Subject) -> Result<(), String> {
    let format = CacheFormat::new(2, 128, 8, 8, ScaleType::F16).expect("a valid format");
    let layout = CacheLayout::native(format, 2, 4).expect("a valid layout");
    let dead = poison::dead_cache(&layout, Fill::Zeros);
    let is_host = subject.capability().memory.contains(&MemoryKind::Host);
    let mut numbers = Numbers::new(2, 0);
    for float_type in FloatType::ALL {
        let bad: Vec<u32> = match float_type {
            FloatType::F16 => (0x7c00..0x8000).chain(0xfc00..0x1_0000).collect(),
            FloatType::Bf16 => (0x7f80..0x8000).chain(0xff80..0x1_0000).chain([0x7f7f, 0xff7f]).collect(),
            FloatType::F32 => (0..64)
                .map(|i| 0x7f80_0000 | (i * 0x2_0001) | (i << 31))
                .chain([f32::MAX.to_bits(), (65504.0f32 * 127.0).to_bits() + 1])
                .collect(),
        };
        let mut opened = open(subject, &layout, &dead, Route::Session)?;
        for bits in bad {
            let at = numbers.below(2 * ROW);
            let mut values = [vec![0.5f32; ROW], vec![-0.5; ROW]];
            values[at / ROW][at % ROW] = 0.0;
            let [mut k, mut v] = values.map(|x| Values::from_f32(float_type, &x));
            set_bits(if at < ROW { &mut k } else { &mut v }, at % ROW, bits);
            let tokens = Tokens { k, v, slots: vec![5] };
            refused(&mut opened, &layout, &dead, &tokens, is_host)
                .map_err(|error| format!("{float_type} {bits:#x} at {at}: {error}"))?;
            subject.ledger.ran(&subject.name, "append refused", 1);
        }
    }
    Ok(())
}

fn refused(
    opened: &mut Opened,
    layout: &CacheLayout,
    dead: &CacheBuffers,
    tokens: &Tokens,
    is_host: bool,
) -> Result<(), String> {
    let (k, v) = (tokens.k.as_slice(), tokens.v.as_slice());
    let want =
        kv_quant::check_append(layout, k, v, &tokens.slots).expect_err("the suite's values are refused");
    match opened.append_slices(k, v, &tokens.slots) {
        Err(attn_backend::Error::Cache(got)) if got == want => {}
        Err(other) => return Err(format!("expected {want}, got {other}")),
        Ok(()) => return Err(format!("taken, expected {want}")),
    }
    if is_host { opened.compare_image(dead) } else { opened.write_image(dead) }
}

fn set_bits(values: &mut Values, i: usize, bits: u32) {
    match values {
        Values::F16(x) => x[i] = f16::from_bits(bits as u16),
        Values::Bf16(x) => x[i] = bf16::from_bits(bits as u16),
        Values::F32(x) => x[i] = f32::from_bits(bits),
    }
}
