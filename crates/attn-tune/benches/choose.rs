//! What a look-up costs on the hot path: `cargo bench -p attn-tune`.
#![allow(missing_docs, clippy::expect_used, clippy::panic, reason = "a benchmark")]

#[path = "../tests/common/mod.rs"]
mod common;

use attn_tune::{RunKey, StaticKey};
use common::{PROFILE, shape, tuner};
use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;

fn choose(c: &mut Criterion) {
    let tuner = tuner(PROFILE);
    let shape = shape();
    let key: StaticKey = "d128 k8 v8 f16 gqa4 q1 records-paged throughput".parse().expect("a key");
    let chooser = tuner.chooser(key, shape);
    let near = RunKey { batch: 8, num_kv_heads: 8, kv_tokens: 16384, longest: 2048 };
    let far = RunKey { batch: 1, num_kv_heads: 1, kv_tokens: 64, longest: 64 };
    c.bench_function("measured", |b| b.iter(|| chooser.choose(black_box(&near))));
    c.bench_function("modelled", |b| b.iter(|| chooser.choose(black_box(&far))));

    // As many points as the whole grid has of one key, and the key with the most candidates.
    let key: StaticKey = "d128 k8 v8 f16 gqa4 q1 planes-scattered throughput".parse().expect("a key");
    let mut tuner = tuner;
    let point = chooser.points()[0].1;
    for batch in (0..9).map(|log| 1u32 << log) {
        for longest in (9..18).map(|log| 1u32 << log) {
            for share in [1, 4] {
                let kv_tokens = u64::from(batch) * u64::from(longest) / share;
                let run =
                    RunKey { batch, num_kv_heads: 8, kv_tokens: kv_tokens.max(u64::from(longest)), longest };
                tuner.learn(key, run, point);
            }
        }
    }
    let chooser = tuner.chooser(key, shape);
    c.bench_function("measured, the whole grid", |b| b.iter(|| chooser.choose(black_box(&near))));
    let far = RunKey { num_kv_heads: 8, ..far };
    c.bench_function("modelled, the whole grid", |b| b.iter(|| chooser.choose(black_box(&far))));
}

criterion_group!(benches, choose);
criterion_main!(benches);
