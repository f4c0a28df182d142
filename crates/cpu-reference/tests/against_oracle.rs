//! The CPU backend against the oracle, within the bound.

use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitPlan};
use cpu_reference::{Arithmetic, Workspace, oracle};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, ScaleType};

#[test]
fn a_plain_batch_is_within_the_bound() {
    let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16).unwrap();
    let layout = CacheLayout::native(format, 40, 16).unwrap();
    let mut cache = CacheBuffers::zeroed(&layout).unwrap();
    let tokens = 640;
    let noise = |i: usize| ((i.wrapping_mul(2654435761) >> 7) % 1000) as f32 / 500.0 - 1.0;
    let k: Vec<f32> = (0..tokens * 128).map(noise).collect();
    let v: Vec<f32> = (0..tokens * 128).map(|i| noise(i + 77)).collect();
    let slots: Vec<i64> = (0..tokens as i64).collect();
    cpu_reference::append(&layout, &mut cache.view_mut(), FloatSlice::F32(&k), FloatSlice::F32(&v), &slots)
        .unwrap();
    let mut spec = DecodeSpec::new(6, 2, 64);
    (spec.q_type, spec.out_type, spec.q_len) = (FloatType::F32, FloatType::F32, 2);
    let pages: Vec<i32> = (0..40).rev().collect();
    let kv_lens = [300, 0, 1, 640];
    let request = DecodeRequest { spec: &spec, kv_lens: &kv_lens, page_table: PageTable::padded(&pages, 0) };
    let pages4: Vec<i32> = pages.repeat(4);
    let request = DecodeRequest { page_table: PageTable::padded(&pages4, 40), ..request };
    request.check(&layout).unwrap();
    let plan = SplitPlan::new(&spec, &kv_lens, &cpu_reference::split_config()).unwrap();
    let q: Vec<f32> = (0..spec.q_elements(4)).map(|i| noise(i + 5)).collect();
    let mut out = vec![f32::NAN; q.len()];
    let mut lse = vec![f32::NAN; spec.lse_elements(4)];
    let mut workspace = Workspace::new();
    cpu_reference::decode(
        &layout,
        cache.view(),
        &request,
        &plan,
        FloatSlice::F32(&q),
        FloatSliceMut::F32(&mut out),
        Some(&mut lse),
        &mut workspace,
    )
    .unwrap();
    let want = oracle::decode_request(&layout, &cache.view(), &request, FloatSlice::F32(&q)).unwrap();
    let arithmetic = Arithmetic::f32(&spec, &plan);
    for (i, oracle) in want.iter().enumerate() {
        let bound = oracle.bound(&arithmetic);
        for ((got, want), bound) in out[i * oracle.out.len()..].iter().zip(&oracle.out).zip(&bound) {
            assert!((f64::from(*got) - want).abs() <= *bound, "{got} {want} {bound:e}");
        }
        for (got, want) in lse[i * oracle.lse.len()..].iter().zip(&oracle.lse) {
            assert!(f64::from(*got) == *want || (f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
        }
    }
}
