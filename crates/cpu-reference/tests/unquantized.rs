//! Decode over a cache of unquantized floats, against the oracle over the same floats.
#![allow(clippy::unwrap_used, reason = "a test: what cannot go on must fail loudly")]

use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitPlan};
use cpu_reference::{Isa, Workspace, oracle};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType};

fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin() * 2.0).collect()
}

#[test]
fn floats_are_read_as_they_are() {
    // 24 channels are no whole vector; 70 tokens are a tile and a part; 9 rows a kv head are a block of 8 and one more.
    for (head_dim, q_len) in [(64, 3), (24, 3), (16, 1), (64, 9)] {
        for float_type in FloatType::ALL {
            let format = CacheFormat::unquantized(2, head_dim, float_type).unwrap();
            for layout in
                [CacheLayout::native(format, 8, 16).unwrap(), CacheLayout::nhd(format, 8, 16).unwrap()]
            {
                check(&layout, q_len);
            }
        }
    }
}

fn check(layout: &CacheLayout, q_len: u32) {
    let head_dim = layout.format().head_dim();
    let (kv_lens, pages) = ([70u32, 33], [5, 0, 3, 7, 1, 2, 4, 6, -1, -1]);
    let mut cache = CacheBuffers::zeroed(layout).unwrap();
    let spec = DecodeSpec {
        q_len,
        q_type: FloatType::F32,
        out_type: FloatType::F32,
        want_lse: true,
        ..DecodeSpec::new(6, 2, head_dim)
    };
    let request = DecodeRequest { spec: &spec, kv_lens: &kv_lens, page_table: PageTable::padded(&pages, 5) };
    for (i, &kv_len) in kv_lens.iter().enumerate() {
        let slots: Vec<i64> =
            (0..kv_len).map(|t| request.page_table.slot(i, t, layout.page_len()).unwrap() as i64).collect();
        let rows = slots.len() * layout.format().row_elements();
        let (k, v) = (wave(rows, 0.37 + i as f32), wave(rows, 0.11 + i as f32));
        cpu_reference::append(
            layout,
            &mut cache.view_mut(),
            FloatSlice::F32(&k),
            FloatSlice::F32(&v),
            &slots,
        )
        .unwrap();
    }
    let q = wave(spec.q_elements(2), 0.71);
    let want = oracle::decode_request(layout, &cache.view(), &request, FloatSlice::F32(&q)).unwrap();
    let plan = SplitPlan::new(
        &spec,
        &kv_lens,
        &cpu_reference::Machine::here().split_config(layout.format(), attn_plan::SplitPolicy::Throughput),
    )
    .unwrap();
    for isa in Isa::available() {
        let mut workspace = Workspace::for_isa(isa).unwrap();
        let mut out = vec![f32::NAN; q.len()];
        let mut lse = vec![f32::NAN; spec.lse_elements(2)];
        let (q, out_slice) = (FloatSlice::F32(&q), FloatSliceMut::F32(&mut out));
        cpu_reference::decode(
            layout,
            cache.view(),
            &request,
            &plan,
            q,
            out_slice,
            Some(&mut lse),
            &mut workspace,
        )
        .unwrap();
        let exact = want.iter().flat_map(|one| one.out.iter());
        for (got, exact) in out.iter().zip(exact) {
            assert!((f64::from(*got) - exact).abs() < 1e-5, "{isa}, {}: {got} {exact}", layout.format());
        }
        for (got, exact) in lse.iter().zip(want.iter().flat_map(|one| one.lse.iter())) {
            assert!((f64::from(*got) - exact).abs() < 1e-5, "{isa}, {}: lse {got} {exact}", layout.format());
        }
    }
}
