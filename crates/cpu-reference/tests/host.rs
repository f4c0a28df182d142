//! What the CPU backend promises beyond accuracy: reproducible bits, batch invariance, exact cases, typed refusals.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use attn_plan::{DecodeRequest, PageTable, SplitConfig, SplitPlan, SplitPolicy};
use cpu_reference::case::{Case, CaseConfig, Data};
use cpu_reference::{Error, Isa, Workspace};
use kv_quant::{FloatSlice, FloatSliceMut, FloatType, LayoutKind};

fn bits(case: &Case, isa: Isa) -> (Vec<u32>, Vec<u32>) {
    let (out, lse) = case.run(&mut Workspace::for_isa(isa).unwrap()).unwrap();
    (out.to_f32().iter().map(|x| x.to_bits()).collect(), lse.iter().map(|x| x.to_bits()).collect())
}

fn in_pool<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

#[test]
fn bits_depend_on_neither_threads_nor_repetition() {
    for layout in [LayoutKind::Nhd, LayoutKind::Native] {
        let config =
            CaseConfig { kv_lens: vec![700, 3, 64], layout, num_kv_heads: 4, ..CaseConfig::default() };
        let case = config.build().unwrap();
        for isa in Isa::available() {
            let one = in_pool(1, || bits(&case, isa));
            for threads in [2, 3, 8] {
                for _ in 0..5 {
                    assert!(
                        in_pool(threads, || bits(&case, isa)) == one,
                        "{isa} {layout}, {threads} threads"
                    );
                }
            }
        }
    }
}

#[test]
fn a_request_does_not_feel_its_neighbours_under_the_batch_invariant_policy() {
    let split = SplitConfig::throughput(3).with_policy(SplitPolicy::BatchInvariant { split_len: 128 });
    let alone =
        CaseConfig { kv_lens: vec![500], split, q_len: 2, window: Some(300), ..CaseConfig::default() };
    let alone = alone.build().unwrap();
    for isa in Isa::available() {
        let want = bits(&alone, isa);
        for batch in [2, 3, 7, 17] {
            // The same cache and request, asked for several times over with other lengths between.
            let kv_lens: Vec<u32> = (0..batch).map(|i| if i % 2 == 1 { 500 } else { i * 31 }).collect();
            let pages: Vec<i32> = alone.pages.repeat(batch as usize);
            let page_table = PageTable::padded(&pages, alone.row_stride.unwrap());
            let request = DecodeRequest { spec: &alone.spec, kv_lens: &kv_lens, page_table };
            let q = alone.q.to_f32().repeat(batch as usize);
            let (mut out, mut lse) =
                (vec![0f32; q.len()], vec![0f32; alone.spec.lse_elements(batch as usize)]);
            let workers = SplitConfig { num_workers: 1 + batch, ..split };
            let plan = SplitPlan::new(&alone.spec, &kv_lens, &workers).unwrap();
            let mut workspace = Workspace::for_isa(isa).unwrap();
            let (q, out_slice) = (FloatSlice::F32(&q), FloatSliceMut::F32(&mut out));
            let (layout, view) = (&alone.layout, alone.cache.view());
            cpu_reference::decode(
                layout,
                view,
                &request,
                &plan,
                q,
                out_slice,
                Some(&mut lse),
                &mut workspace,
            )
            .unwrap();
            let per_request = [want.0.len(), want.1.len()];
            for request in (1..batch as usize).step_by(2) {
                let out = &out[request * per_request[0]..(request + 1) * per_request[0]];
                let lse = &lse[request * per_request[1]..(request + 1) * per_request[1]];
                assert!(
                    out.iter().map(|x| x.to_bits()).eq(want.0.iter().copied()),
                    "{isa}, {request} of {batch}"
                );
                assert!(
                    lse.iter().map(|x| x.to_bits()).eq(want.1.iter().copied()),
                    "{isa}, {request} of {batch}"
                );
            }
        }
    }
}

#[test]
fn exact_cases_are_exact() {
    for isa in Isa::available() {
        for seed in 0..20 {
            let config = CaseConfig { seed, kv_lens: vec![256, 64], ..CaseConfig::default() };
            // Equal weights, integer values and a power of two of them: no rounding anywhere.
            let case = CaseConfig { data: Data::Mean, ..config.clone() }.build().unwrap();
            let (out, _) = case.run(&mut Workspace::for_isa(isa).unwrap()).unwrap();
            let want = case.expected().unwrap().into_iter().flat_map(|o| o.out);
            // The mean of 256 or 64 integers; the oracle's weights are rounded in f64.
            let want = want.map(|x| (x * 256.0).round() / 256.0);
            assert!(out.to_f32().iter().map(|&x| f64::from(x)).eq(want), "{isa}: mean");
            // One token takes all: its V row comes out, to the bit, for the head that it was planted for.
            let case = CaseConfig { data: Data::OneHot, gqa_group: 1, ..config.clone() }.build().unwrap();
            let (out, _) = case.run(&mut Workspace::for_isa(isa).unwrap()).unwrap();
            let want: Vec<f32> =
                case.expected().unwrap().into_iter().flat_map(|o| o.out).map(|x| x as f32).collect();
            assert!(out.to_f32() == want, "{isa}: one-hot");
            // V is one number.
            let case = CaseConfig { data: Data::Ones, ..config }.build().unwrap();
            let (out, lse) = case.run(&mut Workspace::for_isa(isa).unwrap()).unwrap();
            case.check(&out, Some(&lse), &case.host_arithmetic()).unwrap();
        }
    }
}

#[test]
fn an_empty_batch_and_empty_requests_are_ordinary() {
    for sinks in [false, true] {
        for kv_lens in [vec![], vec![0], vec![0, 0, 0]] {
            let case = CaseConfig { kv_lens, sinks, q_len: 2, ..CaseConfig::default() }.build().unwrap();
            for isa in Isa::available() {
                let (out, lse) = case.run(&mut Workspace::for_isa(isa).unwrap()).unwrap();
                assert!(out.to_f32().iter().all(|x| *x == 0.0));
                let sink = |i: usize| case.spec.sinks.as_ref().map_or(f32::NEG_INFINITY, |x| x[i % x.len()]);
                assert!(lse.iter().enumerate().all(|(i, &x)| x == sink(i)));
            }
        }
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let case = CaseConfig::default().build().unwrap();
    let mut workspace = Workspace::new();
    let q = case.q.to_f32();
    let mut out = vec![0f32; q.len()];
    let request = case.request();
    let (layout, view) = (&case.layout, case.cache.view());
    let mut run =
        |request: &DecodeRequest<'_>, plan: &SplitPlan, q: FloatSlice<'_>, out: &mut [f32], lse: usize| {
            let mut lse = vec![0f32; lse];
            let out = FloatSliceMut::F32(out);
            cpu_reference::decode(layout, view, request, plan, q, out, Some(&mut lse), &mut workspace)
        };
    let lse = case.spec.lse_elements(1);
    assert!(run(&request, &case.plan, FloatSlice::F32(&q), &mut out, lse).is_ok());
    let short = run(&request, &case.plan, FloatSlice::F32(&q[1..]), &mut out, lse);
    assert!(matches!(short, Err(Error::Len { what: "q", .. })));
    let short = run(&request, &case.plan, FloatSlice::F32(&q), &mut out[1..].to_vec(), lse);
    assert!(matches!(short, Err(Error::Len { what: "out", .. })));
    let short = run(&request, &case.plan, FloatSlice::F32(&q), &mut out, lse + 1);
    assert!(matches!(short, Err(Error::Len { what: "lse", .. })));
    let half = vec![half::f16::ONE; q.len()];
    let mixed = run(&request, &case.plan, FloatSlice::F16(&half), &mut out, lse);
    assert!(matches!(mixed, Err(Error::FloatType { what: "q", want: FloatType::F32, .. })));
    let other = SplitPlan::new(&case.spec, &[100, 100], &case.config.split).unwrap();
    let batch = run(&request, &other, FloatSlice::F32(&q), &mut out, lse);
    assert!(matches!(batch, Err(Error::PlanBatch { plan: 2, batch: 1 })));
    let longer = SplitPlan::new(&case.spec, &[101], &case.config.split).unwrap();
    let range = run(&request, &longer, FloatSlice::F32(&q), &mut out, lse);
    assert!(matches!(range, Err(Error::PlanRange { request: 0, kv_len: 100, token_end: 101 })));
    let mut spec = case.spec.clone();
    spec.num_kv_heads = 1;
    let mismatch =
        run(&DecodeRequest { spec: &spec, ..request }, &case.plan, FloatSlice::F32(&q), &mut out, lse);
    assert!(matches!(mismatch, Err(Error::Request(attn_plan::Error::CacheMismatch { .. }))));
}

/// The validator refuses such tables; below it they must still not read outside the cache.
#[test]
fn bad_page_indices_read_as_zeros() {
    let case = CaseConfig { page_len: 4, ..CaseConfig::default() }.build().unwrap();
    for bad in [-1, i32::MIN, i32::MAX, case.layout.num_pages() as i32] {
        let mut broken = case.clone();
        broken.pages.iter_mut().for_each(|page| *page = bad);
        for isa in Isa::available() {
            let (out, _) = broken.run(&mut Workspace::for_isa(isa).unwrap()).unwrap();
            assert!(out.to_f32().iter().all(|x| *x == 0.0));
        }
        broken.pages.clear();
        let (out, _) = broken.run(&mut Workspace::new()).unwrap();
        assert!(out.to_f32().iter().all(|x| *x == 0.0));
    }
    // A view of other buffers than the layout's.
    let other = CaseConfig { kv_lens: vec![5], ..CaseConfig::default() }.build().unwrap();
    let mut workspace = Workspace::new();
    let mut out = vec![0f32; case.q.len()];
    let out = FloatSliceMut::F32(&mut out);
    let (view, q) = (other.cache.view(), case.q.as_slice());
    let short =
        cpu_reference::decode(&case.layout, view, &case.request(), &case.plan, q, out, None, &mut workspace);
    assert!(matches!(short, Err(Error::Cache(kv_quant::Error::BufferLen { .. }))));
}

#[test]
fn instruction_sets_have_names() {
    for isa in Isa::ALL {
        assert_eq!(isa.to_string(), isa.name());
        assert_eq!(Isa::available().contains(&isa), isa.is_available());
        match Workspace::for_isa(isa) {
            Ok(_) => assert!(isa.is_available()),
            Err(error) => assert!(error.to_string().contains("portable"), "{error}"),
        }
    }
    assert!(Isa::available().contains(&Isa::best()));
}
