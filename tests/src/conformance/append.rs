//! Append: the bytes of the one rule, and nothing else.

use crate::numbers::Numbers;
use crate::poison::{self, Fill};
use crate::problem::Tokens;
use crate::subject::{Opened, Route, Subject};
use crate::values::Values;
use attn_backend::MemoryKind;
use attn_plan::{DecodeSpec, SplitConfig};
use half::{bf16, f16};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatType, ScaleType};
use std::sync::atomic::{AtomicUsize, Ordering};

const NUM_KV_HEADS: u32 = 2;
/// A row of the refused appends.
const ROW: usize = 64 * NUM_KV_HEADS as usize;

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

/// K and V of as many tokens as there are rows, and slots in random order. The tokens that are skipped are extra ones, of
/// bad values: every value of `k` and `v` is appended.
fn tokens(float_type: FloatType, row: usize, k: Vec<f32>, v: Vec<f32>, numbers: &mut Numbers) -> Tokens {
    let (mut skipped_k, mut skipped_v) = (Vec::new(), Vec::new());
    let mut slots: Vec<i64> = (0..(k.len() / row) as i64).collect();
    numbers.shuffle(&mut slots);
    let mut with_skips = Vec::new();
    for (slot, (k, v)) in slots.into_iter().zip(k.chunks_exact(row).zip(v.chunks_exact(row))) {
        if slot % 17 == 3 {
            with_skips.push(-1);
            skipped_k.extend((0..row).map(|i| if i == 0 { f32::NAN } else { 1.0 }));
            skipped_v.extend((0..row).map(|i| if i == 7 { f32::INFINITY } else { 1.0 }));
        }
        with_skips.push(slot);
        skipped_k.extend(k);
        skipped_v.extend(v);
    }
    let [k, v] = [skipped_k, skipped_v].map(|x| Values::from_f32(float_type, &x));
    Tokens { k, v, slots: with_skips }
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

/// Head dimensions, one a round; a head of each number of lanes is among the first three.
const HEAD_DIMS: [u32; 5] = [64, 128, 256, 96, 192];

/// One append: types, format, layout, and the number that decides its order.
struct Job {
    float_type: FloatType,
    format: CacheFormat,
    choice: usize,
}

/// Every finite f16 and bf16 pattern and random f32, in order and shuffled, in every group length and scale type:
/// millions of elements a round, byte for byte as `kv_quant::append` writes them.
///
/// # Errors
/// The first byte that is another.
pub fn bytes(subject: &Subject, num_rounds: usize) -> Result<(), String> {
    let profile = subject.profile();
    let mut jobs = Vec::new();
    for round in 0..num_rounds {
        let head_dim = HEAD_DIMS[round % HEAD_DIMS.len()];
        for float_type in FloatType::ALL {
            for scale_type in ScaleType::ALL {
                for group_len in profile.groups_of(head_dim) {
                    let format = CacheFormat::new(NUM_KV_HEADS, head_dim, group_len, group_len, scale_type);
                    let format = format.expect("a valid format");
                    jobs.push(Job { float_type, format, choice: jobs.len() });
                }
            }
        }
    }
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let run = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                run(subject, job)?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<(), String>>| {
            thread.join().unwrap_or_else(|_| Err("panicked".to_owned()))
        };
        threads.into_iter().try_for_each(join)
    })
}

fn run(subject: &Subject, job: &Job) -> Result<(), String> {
    let Job { float_type, format, choice } = *job;
    let mut numbers = Numbers::new(1, choice as u64);
    let row = format.row_elements();
    let limit = format.scale_type().largest().min(f32::MAX / 127.0) * 127.0;
    let mut x = patterns(float_type, limit, &mut numbers);
    x.extend(ties(4096, &mut numbers));
    // Whole tokens only: the last one is filled up from the front, so that no pattern is left out.
    let missing = x.len().next_multiple_of(row) - x.len();
    x.extend_from_within(..missing);
    let mut shuffled = x.clone();
    numbers.shuffle(&mut shuffled);
    let tokens = tokens(float_type, row, x, shuffled, &mut numbers);
    let layout = layout_of(format, tokens.slots.len() as u64 + 3, choice, subject.page_len(5, 8));
    let route = if choice.is_multiple_of(2) { Route::Session } else { Route::Executor };
    one(subject, &layout, &tokens, route)
        .map_err(|error| format!("{float_type} into {format} {}: {error}", layout.kind()))?;
    subject.ledger.ran(&subject.name, "append", 1);
    let elements = 2 * tokens.slots.iter().filter(|slot| **slot >= 0).count() * row;
    let what = format!("{}: elements of append compared byte for byte", subject.name);
    subject.ledger.tally(&what, elements as u64);
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
    let format = CacheFormat::new(NUM_KV_HEADS, 64, 8, 8, ScaleType::F16).expect("a valid format");
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
