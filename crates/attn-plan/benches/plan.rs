//! Time of planning a step, from one request to very many.
//!
//! `cargo bench -p attn-plan`

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros make undocumented items"
)]

use attn_plan::{DecodeSpec, SplitConfig, SplitPlan, SplitPolicy};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use std::hint::black_box;

fn plans(c: &mut Criterion) {
    let spec = DecodeSpec::new(32, 8, 128);
    for policy in [SplitPolicy::Throughput, SplitPolicy::BatchInvariant { split_len: 1024 }] {
        let config = SplitConfig::throughput(132).with_policy(policy);
        let mut bench = c.benchmark_group(policy.to_string());
        for batch in [1usize, 16, 256, 10_000] {
            // Lengths of 1 to 16384 tokens.
            let lens: Vec<u32> =
                (1..=batch as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 18) + 1).collect();
            let mut plan = SplitPlan::default();
            bench.bench_function(BenchmarkId::from_parameter(batch), |b| {
                b.iter(|| plan.update(&spec, black_box(&lens), &config).unwrap());
            });
        }
        bench.finish();
    }
}

criterion_group!(benches, plans);
criterion_main!(benches);
