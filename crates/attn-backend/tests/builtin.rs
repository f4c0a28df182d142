//! Every backend of this build passes its trial over descriptors of every kind. What it refuses is printed;
//! `KV8_REQUIRE_GPU=1` makes a missing GPU a failure.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a failure is the point")]

use attn_backend::{BackendId, Descriptor, Refusal, Registry, SelectError, SelectOptions, TrialMode, select};
use attn_plan::{DecodeSpec, SplitPolicy};
use kv_quant::{CacheFormat, CacheLayout, FloatType, LayoutKind, PlaneId, ScaleType, Side};
use std::time::Duration;

fn layout(kind: LayoutKind, format: CacheFormat, page_len: u32) -> CacheLayout {
    let num_pages = 4096 / u64::from(page_len).max(16);
    match kind {
        LayoutKind::LightLlm => CacheLayout::lightllm(format, 4096),
        LayoutKind::Hnd => CacheLayout::hnd(format, num_pages, page_len),
        LayoutKind::Nhd => CacheLayout::nhd(format, num_pages, page_len),
        LayoutKind::Native => CacheLayout::native(format, num_pages, page_len),
        LayoutKind::Custom => {
            // Two layers in one native buffer: twice the page stride.
            let native = CacheLayout::native(format, num_pages, page_len).unwrap();
            let planes = PlaneId::ALL.map(|id| {
                let plane = *native.plane(id);
                kv_quant::Plane { page_stride: 2 * plane.page_stride, ..plane }
            });
            CacheLayout::custom(format, num_pages, page_len, planes)
        }
    }
    .unwrap()
}

/// A walk through all choices in which each pair of neighbouring ones meets.
fn descriptors() -> Vec<Descriptor> {
    let kinds = [
        (LayoutKind::LightLlm, 1),
        (LayoutKind::Native, 16),
        (LayoutKind::Hnd, 64),
        (LayoutKind::Nhd, 16),
        (LayoutKind::Native, 1),
        (LayoutKind::Custom, 32),
        (LayoutKind::Hnd, 128),
        (LayoutKind::Native, 24),
    ];
    let dims = [64, 128, 96, 256, 192, 80];
    let heads = [(8, 1), (3, 3), (2, 4), (1, 7), (2, 5), (4, 12), (1, 64)];
    let groups = [8, 32, 16, 0, 64];
    let q_lens = [1, 1, 4, 2, 8, 1, 3];
    (0..40)
        .map(|i| {
            let ((kind, page_len), dim) = (kinds[i % kinds.len()], dims[i % dims.len()]);
            let (num_kv_heads, gqa) = heads[i % heads.len()];
            let group = groups[i % groups.len()];
            let group = if group == 0 || dim % group != 0 { dim } else { group };
            let v_group = if i % 3 == 0 && kind != LayoutKind::LightLlm { dim } else { group };
            let scale_type = ScaleType::ALL[i % 3];
            let format = CacheFormat::new(num_kv_heads, dim, group, v_group, scale_type).unwrap();
            assert!(format.num_groups(Side::K) > 0);
            let num_q_heads = num_kv_heads * gqa;
            let spec = DecodeSpec {
                q_len: q_lens[i % q_lens.len()],
                window: [None, Some(70), None, Some(1)][i % 4],
                soft_cap: [None, None, Some(30.0)][i % 3],
                alibi_slopes: (i % 5 == 2)
                    .then(|| (0..num_q_heads).map(|head| 0.5f32.powi(1 + head as i32 % 8)).collect()),
                sinks: (i % 4 == 1).then(|| (0..num_q_heads).map(|head| 2.0 - head as f32 * 0.5).collect()),
                q_type: FloatType::ALL[i % 3],
                out_type: FloatType::ALL[(i / 3) % 3],
                want_lse: i % 2 == 0,
                ..DecodeSpec::new(num_q_heads, num_kv_heads, dim)
            };
            let split = match i % 3 {
                1 => SplitPolicy::BatchInvariant { split_len: [64, 256, 192][i % 7 % 3] },
                _ => SplitPolicy::Throughput,
            };
            Descriptor::new(layout(kind, format, page_len), spec).with_split(split)
        })
        .collect()
}

#[test]
fn every_builtin_backend_passes_its_trial() {
    let registry = Registry::builtin();
    let mut failures = Vec::new();
    for backend in registry.backend_ids() {
        let (mut passed, mut compared, mut worst, mut slowest) = (0, 0, 0.0f64, Duration::ZERO);
        for descriptor in descriptors() {
            let options = SelectOptions { trial: TrialMode::Thread, ..SelectOptions::named(backend.clone()) };
            match select(&registry, &descriptor, &options) {
                Ok(selection) => {
                    let evidence = selection.evidence.unwrap();
                    passed += 1;
                    compared += evidence.num_compared;
                    worst = worst.max(evidence.worst_share);
                    slowest = slowest.max(evidence.elapsed);
                }
                Err(SelectError::NamedRefused { refusal: Refusal::Unavailable { reason }, .. }) => {
                    println!("skipped: {backend}: unavailable: {reason}");
                    let required =
                        std::env::var("KV8_REQUIRE_GPU").is_ok_and(|value| value != "0" && !value.is_empty());
                    assert!(!required, "{backend} is required: {reason}");
                    break;
                }
                Err(SelectError::NamedRefused { refusal: refusal @ Refusal::Unsupported { .. }, .. }) => {
                    assert_ne!(backend, BackendId::CPU, "the CPU does everything: {refusal}");
                    println!("refused: {backend}: {descriptor}: {refusal}");
                }
                Err(error) => failures.push(error.to_string()),
            }
        }
        println!(
            "{backend}: {passed} descriptors, {compared} values compared, worst error {worst:.3} of its bound, \
             slowest trial {slowest:?}"
        );
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
