//! Time of quantizing a group and of appending tokens, as throughput of input values.
//!
//! `cargo bench -p kv-quant`

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros make undocumented items"
)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, CachePool, FloatSlice, ScaleType, append, quantize_group,
};
use std::hint::black_box;

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7).sin() * (1.0 + (i % 13) as f32)).collect()
}

fn groups(c: &mut Criterion) {
    let mut bench = c.benchmark_group("quantize_group");
    for group_len in [8usize, 32, 128] {
        let (x, mut codes) = (values(group_len), vec![0i8; group_len]);
        bench.throughput(Throughput::Elements(group_len as u64));
        bench.bench_function(BenchmarkId::from_parameter(group_len), |b| {
            b.iter(|| quantize_group(black_box(&x), ScaleType::F16, black_box(&mut codes)));
        });
    }
    bench.finish();
}

/// 64 tokens of 8 heads of 128 channels, f16 in, over the layouts.
fn tokens(c: &mut Criterion) {
    let mut bench = c.benchmark_group("append_64_tokens");
    for group_len in [8u32, 32, 128] {
        let format = CacheFormat::new(8, 128, group_len, group_len, ScaleType::F16).unwrap();
        let x: Vec<f16> = values(64 * 8 * 128).into_iter().map(f16::from_f32).collect();
        let x = FloatSlice::F16(&x);
        let slots: Vec<i64> = (0..64).collect();
        bench.throughput(Throughput::Elements(2 * 64 * 8 * 128));
        for layout in [
            CacheLayout::lightllm(format, 64).unwrap(),
            CacheLayout::hnd(format, 4, 16).unwrap(),
            CacheLayout::native(format, 4, 16).unwrap(),
        ] {
            let mut cache = CacheBuffers::zeroed(&layout).unwrap();
            let id = BenchmarkId::new(layout.kind().to_string(), group_len);
            bench.bench_function(id, |b| {
                b.iter(|| append(&layout, &mut cache.view_mut(), black_box(x), x, &slots).unwrap());
            });
        }
    }
    bench.finish();
}

/// One decode step of 64 sequences through the pool: books and quantizing.
fn pool(c: &mut Criterion) {
    let format = CacheFormat::new(8, 128, 8, 8, ScaleType::F16).unwrap();
    let mut pool = CachePool::new(CacheLayout::native(format, 256, 16).unwrap()).unwrap();
    let sequences: Vec<_> = (0..64).map(|_| (pool.allocate(), 1u32)).collect();
    let x: Vec<f16> = values(64 * 8 * 128).into_iter().map(f16::from_f32).collect();
    let x = FloatSlice::F16(&x);
    c.bench_function("pool_step_of_64_sequences", |b| {
        b.iter(|| {
            pool.append_batch(&sequences, black_box(x), x).unwrap();
            // Back again, so that the pool never fills.
            sequences.iter().for_each(|&(sequence, _)| pool.truncate(sequence, 0).unwrap());
        });
    });
}

criterion_group!(benches, groups, tokens, pool);
criterion_main!(benches);
