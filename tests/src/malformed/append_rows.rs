//! Appends and reads that must be refused before a byte is written.

use super::bench::{Bench, Seen};
use super::rows;
use half::{bf16, f16};
use kv_quant::{CacheFormat, CacheLayout, Error, FloatSlice, ScaleType, Side, dequantize_row, read_codes};

fn append_as<'a>(bench: &'a mut Bench, k: FloatSlice<'a>, v: FloatSlice<'a>) -> Seen {
    kv_quant::append(&bench.layout, &mut bench.cache.view_mut(), k, v, &bench.slots).into()
}

fn row(bench: &Bench, slot: u64, head: u32, len: usize) -> Seen {
    dequantize_row(&bench.layout, &bench.cache.view(), Side::V, slot, head, &mut vec![0.0; len]).into()
}

fn scales(bench: &Bench, len: usize) -> Seen {
    kv_quant::read_scales(&bench.layout, &bench.cache.view(), Side::K, 0, 0, &mut vec![0.0; len]).into()
}

rows! {
    "k is one element short" => Seen::Quant(Error::Len { what: "k", .. }), |b| { b.k.pop(); b.append() };
    "k is one element long" => Seen::Quant(Error::Len { what: "k", .. }), |b| { b.k.push(0.0); b.append() };
    "k is empty" => Seen::Quant(Error::Len { what: "k", got: 0, .. }), |b| { b.k.clear(); b.append() };
    "v is one element short" => Seen::Quant(Error::Len { what: "v", .. }), |b| { b.v.pop(); b.append() };
    "v is one token short" => Seen::Quant(Error::Len { what: "v", .. }), |b| { b.v.truncate(128); b.append() };
    "v is empty" => Seen::Quant(Error::Len { what: "v", got: 0, .. }), |b| { b.v.clear(); b.append() };
    "one slot too few" => Seen::Quant(Error::Len { what: "k", .. }), |b| { b.slots.pop(); b.append() };
    "one slot too many" => Seen::Quant(Error::Len { what: "k", .. }), |b| { b.slots.push(-1); b.append() };
    "no slots but tokens" => Seen::Quant(Error::Len { want: 0, .. }), |b| { b.slots.clear(); b.append() };
    "k in f16, v in bf16" => Seen::Quant(Error::MixedTypes { .. }), |b| {
        let (k, v) = (vec![f16::ONE; b.k.len()], vec![bf16::ONE; b.v.len()]);
        append_as(&mut b.clone(), FloatSlice::F16(&k), FloatSlice::Bf16(&v))
    };
    "k in f32, v in f16" => Seen::Quant(Error::MixedTypes { .. }), |b| {
        let (k, v) = (b.k.clone(), vec![f16::ONE; b.v.len()]);
        append_as(&mut b.clone(), FloatSlice::F32(&k), FloatSlice::F16(&v))
    };
    "slot one past the end" => Seen::Quant(Error::SlotOutOfRange { token: 0, slot: 32, num_slots: 32 }),
        |b| { b.slots[0] = 32; b.append() };
    "slot -2" => Seen::Quant(Error::SlotOutOfRange { token: 1, slot: -2, .. }),
        |b| { b.slots[1] = -2; b.append() };
    "slot i64::MIN" => Seen::Quant(Error::SlotOutOfRange { slot: i64::MIN, .. }),
        |b| { b.slots[2] = i64::MIN; b.append() };
    "slot i64::MAX" => Seen::Quant(Error::SlotOutOfRange { slot: i64::MAX, .. }),
        |b| { b.slots[2] = i64::MAX; b.append() };
    "slot beyond 32 bits" => Seen::Quant(Error::SlotOutOfRange { .. }),
        |b| { b.slots[0] = (1 << 32) + 3; b.append() };
    "one slot twice" => Seen::Quant(Error::SlotTwice { slot: 30, first: 0, second: 2 }),
        |b| { b.slots[2] = 30; b.append() };
    "all slots alike" => Seen::Quant(Error::SlotTwice { slot: 5, first: 0, second: 1 }),
        |b| { b.slots.fill(5); b.append() };
    "K NaN in the first channel" => Seen::Quant(Error::NonFinite { side: Side::K, token: 0, head: 0, channel: 0 }),
        |b| { b.k[0] = f32::NAN; b.append() };
    "K NaN in the last channel of the last token"
        => Seen::Quant(Error::NonFinite { side: Side::K, token: 2, head: 1, channel: 31 }),
        |b| { b.k[191] = f32::NAN; b.append() };
    "V infinite" => Seen::Quant(Error::NonFinite { side: Side::V, token: 2, head: 0, channel: 9 }),
        |b| { b.v[128 + 9] = f32::INFINITY; b.append() };
    "V negative infinite" => Seen::Quant(Error::NonFinite { side: Side::V, token: 0, head: 1, channel: 8 }),
        |b| { b.v[32 + 8] = f32::NEG_INFINITY; b.append() };
    "V signalling NaN" => Seen::Quant(Error::NonFinite { side: Side::V, .. }),
        |b| { b.v[3] = f32::from_bits(0x7f80_0001); b.append() };
    "V negative NaN beside a large value" => Seen::Quant(Error::NonFinite { side: Side::V, channel: 4, .. }),
        |b| { b.v[3] = 1e30; b.v[4] = f32::from_bits(0xffc0_0000); b.append() };
    "K scale overflows f16" => Seen::Quant(Error::ScaleOverflow { side: Side::K, token: 0, head: 0, channel: 8, .. }),
        |b| { b.k[8] = 65504.0 * 127.5; b.append() };
    "V scale overflows f16 by the rounding up" => Seen::Quant(Error::ScaleOverflow { side: Side::V, .. }),
        |b| { b.v[0] = f32::from_bits((65504.0f32 * 127.0).to_bits() + 1); b.append() };
    "V is f32::MAX" => Seen::Quant(Error::ScaleOverflow { side: Side::V, token: 2, head: 1, channel: 24, .. }),
        |b| { b.v[191] = -f32::MAX; b.append() };
    "f16 input infinite" => Seen::Quant(Error::NonFinite { side: Side::K, token: 0, head: 0, channel: 1 }), |b| {
        let mut k = vec![f16::ONE; b.k.len()];
        k[1] = f16::NEG_INFINITY;
        let v = vec![f16::ONE; b.v.len()];
        append_as(&mut b.clone(), FloatSlice::F16(&k), FloatSlice::F16(&v))
    };
    "bf16 input NaN" => Seen::Quant(Error::NonFinite { side: Side::V, token: 0, head: 0, channel: 31 }), |b| {
        let k = vec![bf16::ONE; b.k.len()];
        let mut v = vec![bf16::ONE; b.v.len()];
        v[31] = bf16::NAN;
        append_as(&mut b.clone(), FloatSlice::Bf16(&k), FloatSlice::Bf16(&v))
    };
    "the error names the earliest bad token" => Seen::Quant(Error::NonFinite { side: Side::V, token: 0, .. }), |b| {
        b.v[5] = f32::NAN;
        b.k[140] = f32::NAN;
        b.append()
    };
    "row of a slot past the end" => Seen::Quant(Error::SlotOutOfRange { slot: 32, .. }), |b| row(b, 32, 0, 32);
    "row of slot u64::MAX" => Seen::Quant(Error::SlotOutOfRange { .. }), |b| row(b, u64::MAX, 0, 32);
    "row of a head past the end" => Seen::Quant(Error::HeadOutOfRange { head: 2, num_kv_heads: 2 }),
        |b| row(b, 0, 2, 32);
    "row into too short an output" => Seen::Quant(Error::Len { what: "out", got: 31, want: 32 }),
        |b| row(b, 0, 0, 31);
    "row into too long an output" => Seen::Quant(Error::Len { what: "out", got: 33, want: 32 }),
        |b| row(b, 0, 0, 33);
    "scales into too short an output" => Seen::Quant(Error::Len { what: "scales", got: 3, want: 4 }),
        |b| scales(b, 3);
    "scales into too long an output" => Seen::Quant(Error::Len { what: "scales", got: 5, want: 4 }),
        |b| scales(b, 5);
    "codes of a head past the end" => Seen::Quant(Error::HeadOutOfRange { head: u32::MAX, .. }),
        |b| read_codes(&b.layout, &b.cache.view(), Side::K, 0, u32::MAX).into();
    "f32 scale never overflows, but NaN is still refused" => Seen::Quant(Error::NonFinite { .. }), |b| {
        let format = CacheFormat::new(2, 32, 8, 8, ScaleType::F32).expect("valid");
        b.layout = CacheLayout::lightllm(format, 32).expect("valid");
        b.cache = kv_quant::CacheBuffers::zeroed(&b.layout).expect("small");
        let mut bench = b.clone();
        bench.v[133] = f32::NAN;
        *b = Bench::new();
        bench.append()
    };
}
