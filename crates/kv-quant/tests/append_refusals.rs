//! What append refuses, by name of token, head and channel, and that a refused append writes not one byte.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

mod strategies;

use half::{bf16, f16};
use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, CacheViewMut, Error, FloatSlice, FloatType, ScaleType, Side,
    append, append_row, check_append, dequantize_row, read_codes, read_scales,
};
use proptest::prelude::*;
use strategies::layout;

fn poisoned(layout: &CacheLayout) -> CacheBuffers {
    let mut cache = CacheBuffers::zeroed(layout).unwrap();
    cache.as_mut_vecs().iter_mut().for_each(|buffer| buffer.fill(0xa5));
    cache
}

fn refused(layout: &CacheLayout, k: FloatSlice<'_>, v: FloatSlice<'_>, slots: &[i64]) -> Error {
    let mut cache = poisoned(layout);
    let error = append(layout, &mut cache.view_mut(), k, v, slots).unwrap_err();
    assert_eq!(cache, poisoned(layout), "{error} wrote something");
    assert_eq!(check_append(layout, k, v, slots), Err(error.clone()));
    error
}

proptest! {
    /// One bad value anywhere: the error says where; in a skipped token it is not even looked at.
    #[test]
    fn a_bad_value_is_named(
        layout in layout(6, 5), picks in any::<[prop::sample::Index; 2]>(), side in prop::sample::select(vec![Side::K, Side::V]),
        value in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN]), skip in any::<bool>(),
    ) {
        let format = *layout.format();
        let num_tokens = layout.num_slots() as usize;
        let mut slots: Vec<i64> = (0..num_tokens as i64).rev().collect();
        let good = vec![1f32; num_tokens * format.row_elements()];
        let at = picks[0].index(good.len());
        let mut bad = good.clone();
        bad[at] = value;
        let (token, dim) = (at / format.row_elements(), format.head_dim() as usize);
        let (head, channel) = ((at / dim) as u32 % format.num_kv_heads(), (at % dim) as u32);
        let (k, v) = if side == Side::K { (&bad, &good) } else { (&good, &bad) };
        let (k, v) = (FloatSlice::F32(k), FloatSlice::F32(v));
        if skip {
            slots[token] = -1;
            let mut cache = poisoned(&layout);
            prop_assert_eq!(append(&layout, &mut cache.view_mut(), k, v, &slots), Ok(()));
            // The skipped slot keeps its poison.
            let slot = (num_tokens - 1 - token) as u64;
            prop_assert!(read_codes(&layout, &cache.view(), side, slot, head).unwrap().iter().all(|&c| c == 0xa5u8 as i8));
        } else if !value.is_finite() {
            let want = Error::NonFinite { side, token, head, channel };
            prop_assert_eq!(refused(&layout, k, v, &slots), want);
        } else if format.scale_type() == ScaleType::F16 {
            let channel = channel / format.group_len(side) * format.group_len(side);
            let want = Error::ScaleOverflow { side, token, head, channel, scale: f32::MAX / 127.0, scale_type: ScaleType::F16 };
            prop_assert_eq!(refused(&layout, k, v, &slots), want);
        } else {
            prop_assert!(append(&layout, &mut poisoned(&layout).view_mut(), k, v, &slots).is_ok());
        }
    }

    /// Rows land in their slots and nowhere else, whatever the order of the slots.
    #[test]
    fn only_the_named_slots_change(layout in layout(6, 5), slots in Just((0i64..10).collect::<Vec<_>>()).prop_shuffle(), n in 0usize..10) {
        let num_slots = layout.num_slots();
        let slots: Vec<i64> = slots.into_iter().take(n).filter(|&slot| (slot as u64) < num_slots).collect();
        let format = *layout.format();
        let k: Vec<f32> = (0..slots.len() * format.row_elements()).map(|i| (i as f32).sin()).collect();
        let mut cache = poisoned(&layout);
        append(&layout, &mut cache.view_mut(), FloatSlice::F32(&k), FloatSlice::F32(&k), &slots).unwrap();
        let (mut all, mut one) = (cache.clone(), poisoned(&layout));
        // The same rows one by one through append_row give the same bytes.
        for (token, &slot) in slots.iter().enumerate() {
            for head in 0..format.num_kv_heads() {
                for side in [Side::K, Side::V] {
                    let mut codes = vec![0u8; format.head_dim() as usize];
                    let mut scales = vec![0u8; format.num_groups(side) as usize * format.scale_type().bytes()];
                    append_row(&layout, side, FloatSlice::F32(&k), token, head, &mut codes, &mut scales).unwrap();
                    for (id, bytes) in [(kv_quant::PlaneId::Codes(side), &codes), (kv_quant::PlaneId::Scales(side), &scales)] {
                        let (buffer, range) = layout.row_bytes(id, slot as u64, head);
                        one.as_mut_vecs()[buffer][range.start as usize..range.end as usize].copy_from_slice(bytes);
                    }
                }
            }
        }
        prop_assert!(all.as_mut_vecs() == one.as_mut_vecs());
    }
}

fn small() -> CacheLayout {
    CacheLayout::nhd(CacheFormat::new(1, 16, 8, 16, ScaleType::F16).unwrap(), 3, 200).unwrap()
}

#[test]
fn lengths_and_types() {
    let layout = small();
    let x = vec![1f32; 32];
    let all = FloatSlice::F32(&x);
    assert_eq!(refused(&layout, all, all, &[0]), Error::Len { what: "k", got: 32, want: 16 });
    let want = Error::Len { what: "v", got: 31, want: 32 };
    assert_eq!(refused(&layout, all, FloatSlice::F32(&x[1..]), &[0, 1]), want);
    assert_eq!(
        refused(&layout, FloatSlice::F32(&[]), all, &[0, 1]),
        Error::Len { what: "k", got: 0, want: 32 }
    );
    let halves = vec![f16::ONE; 32];
    let want = Error::MixedTypes { k: FloatType::F32, v: FloatType::F16 };
    assert_eq!(refused(&layout, all, FloatSlice::F16(&halves), &[0, 1]), want);
    let brains = vec![bf16::ONE; 32];
    let want = Error::MixedTypes { k: FloatType::Bf16, v: FloatType::F16 };
    assert_eq!(refused(&layout, FloatSlice::Bf16(&brains), FloatSlice::F16(&halves), &[0, 1]), want);
    let none = FloatSlice::F32(&[]);
    assert_eq!(append(&layout, &mut poisoned(&layout).view_mut(), none, none, &[]), Ok(()));
}

#[test]
fn slots() {
    let layout = small();
    let x = vec![1f32; 600 * 16];
    let rows = |n: usize| FloatSlice::F32(&x[..n * 16]);
    for slot in [-2, i64::MIN, 600, 601, i64::MAX] {
        let want = Error::SlotOutOfRange { token: 1, slot, num_slots: 600 };
        assert_eq!(refused(&layout, rows(2), rows(2), &[3, slot]), want);
    }
    let twice = |slots: &[i64]| refused(&layout, rows(slots.len()), rows(slots.len()), slots);
    assert_eq!(twice(&[5, 5]), Error::SlotTwice { slot: 5, first: 0, second: 1 });
    assert_eq!(twice(&[7, -1, 3, -1, 7]), Error::SlotTwice { slot: 7, first: 0, second: 4 });
    assert_eq!(twice(&[9, 1, 2, 9, 1]), Error::SlotTwice { slot: 1, first: 1, second: 4 });
    // Longer than the list that is searched on the stack.
    let mut many: Vec<i64> = (0..600).rev().collect();
    let ok = append(&layout, &mut poisoned(&layout).view_mut(), rows(600), rows(600), &many);
    assert_eq!(ok, Ok(()));
    many[599] = 599;
    assert_eq!(twice(&many), Error::SlotTwice { slot: 599, first: 0, second: 599 });
    // Skips may repeat.
    let skips = [-1, -1, 4, -1];
    assert_eq!(append(&layout, &mut poisoned(&layout).view_mut(), rows(4), rows(4), &skips), Ok(()));
}

#[test]
fn reads() {
    let layout = small();
    let cache = poisoned(&layout);
    let view = cache.view();
    let want = Error::SlotOutOfRange { token: 0, slot: 600, num_slots: 600 };
    assert_eq!(read_codes(&layout, &view, Side::K, 600, 0).unwrap_err(), want);
    let want = Error::HeadOutOfRange { head: 1, num_kv_heads: 1 };
    assert_eq!(read_codes(&layout, &view, Side::V, 0, 1).unwrap_err(), want);
    let want = Error::Len { what: "scales", got: 1, want: 2 };
    assert_eq!(read_scales(&layout, &view, Side::K, 0, 0, &mut [0.0]), Err(want));
    let want = Error::Len { what: "out", got: 15, want: 16 };
    assert_eq!(dequantize_row(&layout, &view, Side::K, 0, 0, &mut [0.0; 15]), Err(want));
}

#[test]
fn a_view_of_another_layout_is_refused() {
    let (small, large) = (small(), CacheLayout::nhd(*small().format(), 4, 200).unwrap());
    let want = Error::BufferLen { buffer_idx: 0, got: 600 * 16, want: 800 * 16 };
    let mut cache = poisoned(&small);
    assert_eq!(read_codes(&large, &cache.view(), Side::K, 0, 0).unwrap_err(), want);
    let row = FloatSlice::F32(&[1.0; 16]);
    assert_eq!(append(&large, &mut cache.view_mut(), row, row, &[0]), Err(want.clone()));
    assert_eq!(cache.copy_page(&large, 0, 1), Err(want));
    let want = Error::PageOutOfRange { page: 3, num_pages: 3 };
    assert_eq!(cache.copy_page(&small, 3, 0), Err(want.clone()));
    assert_eq!(cache.copy_page(&small, 0, 3), Err(want));
    assert_eq!(cache, poisoned(&small));
    let want = Error::BufferCount { got: 0, want: 4 };
    assert_eq!(CacheViewMut::new(&small, Vec::new()).unwrap_err(), want);
}
