//! The cases, by name of the suite.

use crate::bench::case::Case;
use anyhow::{Result, bail};
use attn_plan::SplitPolicy;
use kv_quant::{FloatType, LayoutKind, ScaleType};

const LLAMA: (u32, u32, u32) = (32, 8, 128);

/// Sizes of the peers' first table.
const TABLE: [(usize, u32); 10] = [
    (1, 1024),
    (1, 8192),
    (1, 131_072),
    (8, 2048),
    (8, 8192),
    (32, 2048),
    (32, 8192),
    (64, 8192),
    (128, 2048),
    (128, 8192),
];

type Suite = (&'static str, fn() -> Vec<Case>);

const SUITES: [Suite; 10] = [
    ("smoke", smoke),
    ("table", table),
    ("lightllm", lightllm),
    ("grid", grid),
    ("group128", group128),
    ("variants", variants),
    ("ragged", ragged),
    ("invariant", invariant),
    ("append", append),
    ("error", error),
];

/// The suites of these names, all but the smoke test if there are none.
pub fn named(names: &[String]) -> Result<Vec<(&'static str, Vec<Case>)>> {
    for name in names {
        if !SUITES.iter().any(|(known, _)| known == name) {
            let known: Vec<&str> = SUITES.iter().map(|(known, _)| *known).collect();
            bail!("no suite {name:?}; there are {}", known.join(", "));
        }
    }
    let wanted =
        |name: &str| if names.is_empty() { name != "smoke" } else { names.iter().any(|n| n == name) };
    Ok(SUITES.iter().filter(|(name, _)| wanted(name)).map(|(name, cases)| (*name, cases())).collect())
}

/// Every decode step of the suites: what is tuned before anything else, so that the benchmark shows what was measured.
pub fn steps() -> Vec<Case> {
    let suites = SUITES.iter().filter(|(name, _)| *name != "smoke");
    let mut steps: Vec<Case> = suites.flat_map(|(_, cases)| cases()).collect();
    steps.retain(|case| case.append_tokens.is_none());
    steps
}

fn smoke() -> Vec<Case> {
    let checked = |case: Case| Case { is_checked: true, ..case };
    vec![
        checked(Case::new(LLAMA, 1, 1024, LayoutKind::Native, 16)),
        checked(Case::new(LLAMA, 8, 2048, LayoutKind::LightLlm, 1)),
        checked(Case::new(LLAMA, 32, 2048, LayoutKind::Hnd, 16)),
    ]
}

/// The peers' table in each layout, shuffled slots and pages of 16.
fn table() -> Vec<Case> {
    let layouts =
        [(LayoutKind::LightLlm, 1), (LayoutKind::Native, 1), (LayoutKind::Native, 16), (LayoutKind::Hnd, 16)];
    let mut cases = Vec::new();
    for (layout, page_len) in layouts {
        for (batch, kv_len) in TABLE {
            let is_checked = kv_len <= 8192 && batch <= 64;
            cases.push(Case { is_checked, ..Case::new(LLAMA, batch, kv_len, layout, page_len) });
        }
    }
    cases
}

/// The other sizes at which LightLLM's kernel was measured, in its own buffers.
fn lightllm() -> Vec<Case> {
    let mut cases = Vec::new();
    for batch in [1, 8, 16, 32, 64, 128] {
        for kv_len in [1024, 2048, 8192, 16_384] {
            if !TABLE.contains(&(batch, kv_len)) {
                cases.push(Case::new(LLAMA, batch, kv_len, LayoutKind::LightLlm, 1));
            }
        }
    }
    cases
}

/// LightLLM's tuning grid: one kv head.
fn grid() -> Vec<Case> {
    let mut cases = Vec::new();
    for batch in [1, 8, 16, 32, 64, 128] {
        for kv_len in [1024, 2048, 8192, 16_384] {
            cases.push(Case::new((4, 1, 128), batch, kv_len, LayoutKind::LightLlm, 1));
        }
    }
    cases
}

/// Groups of 128 against one scale a cache.
fn group128() -> Vec<Case> {
    let case = |&(batch, kv_len): &(usize, u32)| Case {
        group_len: 128,
        ..Case::new(LLAMA, batch, kv_len, LayoutKind::Hnd, 16)
    };
    TABLE.iter().map(case).collect()
}

/// Head shapes, groups, scales, query lengths and masks at about the bytes of the base case.
fn variants() -> Vec<Case> {
    let at = |heads: (u32, u32, u32)| {
        // 671 MB at groups of 8, whatever the heads.
        let kv_len = (8192 * 8 * 128 / (heads.1 * heads.2)).next_multiple_of(16);
        Case { is_checked: kv_len <= 16_384, ..Case::new(heads, 32, kv_len, LayoutKind::Native, 16) }
    };
    let mut cases = vec![at(LLAMA)];
    cases.extend([(8, 8), (24, 8), (28, 4), (32, 2)].map(|(q, kv)| at((q, kv, 128))));
    cases.extend([64, 96, 192, 256].map(|dim| at((32, 8, dim))));
    cases.extend([16, 32, 64, 128].map(|group_len| Case { group_len, ..at(LLAMA) }));
    cases.extend([ScaleType::Bf16, ScaleType::F32].map(|scale_type| Case { scale_type, ..at(LLAMA) }));
    for q_len in [2, 4, 8] {
        let mut case = at(LLAMA);
        case.spec.q_len = q_len;
        cases.push(case);
    }
    let mut masked = |note: &'static str, change: fn(&mut attn_plan::DecodeSpec)| {
        let mut case = Case { note, ..at(LLAMA) };
        change(&mut case.spec);
        cases.push(case);
    };
    masked("window", |spec| spec.window = Some(8000));
    masked("soft-cap", |spec| spec.soft_cap = Some(50.0));
    masked("sinks", |spec| spec.sinks = Some(vec![0.5; spec.num_q_heads as usize]));
    cases
}

/// Log-normal lengths whose longest is tens of times the median.
fn ragged() -> Vec<Case> {
    let layouts = [(LayoutKind::LightLlm, 1), (LayoutKind::Native, 16)];
    let shapes = [(64, 1024.0), (128, 2048.0), (256, 512.0)];
    let mut cases = Vec::new();
    for (layout, page_len) in layouts {
        for (batch, median) in shapes {
            let kv_lens = crate::bench::inputs::log_normal_lens(batch, median, 1.4, 7);
            cases.push(Case { kv_lens, note: "ragged", ..Case::new(LLAMA, 1, 16, layout, page_len) });
        }
    }
    cases
}

/// The price of bits that do not depend on neighbours: each case with and without.
fn invariant() -> Vec<Case> {
    let mut cases = Vec::new();
    for (batch, kv_len) in [(8, 8192), (32, 2048), (32, 8192), (128, 2048), (128, 8192)] {
        let base = Case { note: "throughput", ..Case::new(LLAMA, batch, kv_len, LayoutKind::Native, 16) };
        cases.push(base.clone());
        for split_len in [512, 1024, 2048] {
            let policy = SplitPolicy::BatchInvariant { split_len };
            let note = match split_len {
                512 => "invariant 512",
                1024 => "invariant 1024",
                _ => "invariant 2048",
            };
            cases.push(Case { policy, note, ..base.clone() });
        }
    }
    cases
}

/// Tokens of as many requests, or of prompts: a page at a time, or to slots that lie anywhere.
fn append() -> Vec<Case> {
    let layouts = [(LayoutKind::LightLlm, 1), (LayoutKind::Native, 16), (LayoutKind::Native, 1)];
    let case = |tokens, (layout, page_len)| Case {
        append_tokens: Some(tokens),
        ..Case::new(LLAMA, 1, 16, layout, page_len)
    };
    layouts.iter().flat_map(|&layout| [128, 8192].map(|tokens| case(tokens, layout))).collect()
}

/// An output whose own rounding hides less of the kernel's error.
fn error() -> Vec<Case> {
    let f16 = |mut case: Case| {
        (case.spec.q_type, case.spec.out_type) = (FloatType::F16, FloatType::F16);
        Case { note: "f16 out", is_checked: true, ..case }
    };
    let base = || Case::new(LLAMA, 8, 2048, LayoutKind::Native, 16);
    let mut cases = vec![f16(base())];
    cases.extend([16, 32, 64, 128].map(|group_len| f16(Case { group_len, ..base() })));
    cases.extend([ScaleType::Bf16, ScaleType::F32].map(|scale_type| f16(Case { scale_type, ..base() })));
    for (heads, kv_len) in
        [((32, 8, 64), 4096), ((32, 8, 256), 512), ((28, 4, 128), 8192), ((8, 8, 128), 128)]
    {
        cases.push(f16(Case::new(heads, 8, kv_len, LayoutKind::Hnd, 16)));
    }
    cases.push(f16(Case::new(LLAMA, 32, 8192, LayoutKind::LightLlm, 1)));
    cases
}
