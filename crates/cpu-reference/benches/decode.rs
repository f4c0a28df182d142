//! A decode step and an append, in bytes a second: codes and scales read, and f32 input written.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros make undocumented items"
)]

use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitPlan};
use cpu_reference::case::Rng;
use cpu_reference::{Isa, Workspace};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, ScaleType};

/// kv heads, query heads a kv head, head_dim, kv_len.
const SHAPES: [[u32; 4]; 3] = [[8, 4, 128, 8192], [8, 1, 128, 8192], [3, 3, 64, 4096]];

fn noise(len: usize) -> Vec<f32> {
    let mut rng = Rng::new(1);
    let noise: Vec<f32> = (0..65_521).map(|_| rng.gaussian()).collect();
    noise.iter().copied().cycle().take(len).collect()
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    for [num_kv_heads, gqa_group, head_dim, kv_len] in SHAPES {
        let format = CacheFormat::new(num_kv_heads, head_dim, 32, 32, ScaleType::F16).unwrap();
        let layout = CacheLayout::native(format, u64::from(kv_len / 16), 16).unwrap();
        let mut cache = CacheBuffers::zeroed(&layout).unwrap();
        let slots: Vec<i64> = (0..i64::from(kv_len)).collect();
        let x = noise((kv_len * num_kv_heads * head_dim) as usize);
        let x = FloatSlice::F32(&x);
        cpu_reference::append(&layout, &mut cache.view_mut(), x, x, &slots).unwrap();
        let mut spec = DecodeSpec::new(num_kv_heads * gqa_group, num_kv_heads, head_dim);
        (spec.q_type, spec.out_type) = (FloatType::F32, FloatType::F32);
        let q = noise(spec.q_elements(1));
        let mut out = vec![0f32; q.len()];
        let mut pages: Vec<i32> = (0..layout.num_pages() as i32).collect();
        Rng::new(2).shuffle(&mut pages);
        let kv_lens = [kv_len];
        let page_table = PageTable::padded(&pages, pages.len() as u64);
        let request = DecodeRequest { spec: &spec, kv_lens: &kv_lens, page_table };
        let plan = SplitPlan::new(
            &spec,
            &kv_lens,
            &cpu_reference::Machine::here().split_config(layout.format(), attn_plan::SplitPolicy::Throughput),
        )
        .unwrap();
        group.throughput(Throughput::Bytes(format.bytes_per_token() * u64::from(kv_len)));
        for isa in Isa::available() {
            let mut workspace = Workspace::for_isa(isa).unwrap();
            let name = format!("{num_kv_heads}x{gqa_group} d{head_dim} t{kv_len}");
            group.bench_function(BenchmarkId::new(name, isa), |bencher| {
                bencher.iter(|| {
                    let (q, out) = (FloatSlice::F32(&q), FloatSliceMut::F32(&mut out));
                    cpu_reference::decode(
                        &layout,
                        cache.view(),
                        &request,
                        &plan,
                        q,
                        out,
                        None,
                        &mut workspace,
                    )
                });
            });
        }
    }
}

fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append");
    for (tokens, group_len) in [(1, 32), (256, 8), (256, 32), (256, 128)] {
        let format = CacheFormat::new(8, 128, group_len, group_len, ScaleType::F16).unwrap();
        let layout = CacheLayout::native(format, 16, 16).unwrap();
        let mut cache = CacheBuffers::zeroed(&layout).unwrap();
        let slots: Vec<i64> = (0..tokens).collect();
        let x = noise(tokens as usize * 1024);
        let x = FloatSlice::F32(&x);
        group.throughput(Throughput::Bytes(2 * 4 * x.len() as u64));
        for isa in Isa::available() {
            let name = format!("{tokens} tokens g{group_len}");
            group.bench_function(BenchmarkId::new(name, isa), |bencher| {
                bencher.iter(|| cpu_reference::append_on(isa, &layout, &mut cache.view_mut(), x, x, &slots));
            });
        }
    }
}

criterion_group!(benches, decode, append);
criterion_main!(benches);
