//! The strategies that `cpu-reference` offers to users, on every backend: another generator, another judge.

use super::runner::run_cases;
use crate::problem::Step;
use crate::subject::{Route, Subject};
use crate::values::Values;
use attn_backend::Descriptor;
use cpu_reference::case::{Case, CaseConfig, Floats};
use cpu_reference::strategies::{Limits, cases};
use proptest::strategy::Strategy as _;

/// The oracle's multiplications of a case at most: those with many heads get few tokens.
const BUDGET: u64 = 3_000_000;

fn floats(values: &Values) -> Floats {
    match values {
        Values::F16(x) => Floats::F16(x.clone()),
        Values::Bf16(x) => Floats::Bf16(x.clone()),
        Values::F32(x) => Floats::F32(x.clone()),
    }
}

fn values(floats: &Floats) -> Values {
    match floats {
        Floats::F16(x) => Values::F16(x.clone()),
        Floats::Bf16(x) => Values::Bf16(x.clone()),
        Floats::F32(x) => Values::F32(x.clone()),
    }
}

/// Judges `num_cases` of them.
///
/// # Errors
/// The smallest failing case that was found.
pub fn public_cases(subject: &Subject, num_cases: u32) -> Result<(), String> {
    let capability = subject.capability();
    let profile = subject.profile();
    let mut limits = Limits {
        scale_types: capability.scale_types.clone(),
        layouts: capability.layouts.clone(),
        page_lens: profile.page_lens.clone(),
        gqa_groups: profile.gqa_groups.iter().copied().filter(|gqa| *gqa <= 16).collect(),
        q_lens: profile.q_lens.clone().filter(|q_len| *q_len <= 5).collect(),
        q_types: profile.q_types.clone(),
        out_types: profile.out_types.clone(),
        tile_lens: vec![profile.tile_len],
        window: capability.window,
        soft_cap: capability.soft_cap,
        alibi: capability.alibi,
        sinks: capability.sinks,
        ..Limits::default()
    };
    if !capability.head_dims.is_empty() {
        limits.head_dims = capability.head_dims.clone();
    }
    if !capability.group_lens.is_empty() {
        limits.group_lens = capability.group_lens.clone();
    }
    let name = format!("{}: public cases", subject.name);
    run_cases(
        &name,
        num_cases,
        || cases(&limits).prop_map(affordable),
        |config| one(subject, &config.build().map_err(|error| error.to_string())?),
    )
}

/// Halves the longest requests of a case until the oracle can be asked thousands of times.
fn affordable(mut config: CaseConfig) -> CaseConfig {
    let per_token = config.num_q_heads() * config.q_len * config.head_dim;
    let cost = |lens: &[u32]| lens.iter().map(|&n| u64::from(n)).sum::<u64>() * u64::from(per_token);
    while cost(&config.kv_lens) > BUDGET {
        match config.kv_lens.iter_mut().max() {
            Some(longest) if *longest > 4 => *longest = *longest / 2 + 1,
            _ => break,
        }
    }
    config
}

fn one(subject: &Subject, case: &Case) -> Result<(), String> {
    let config = case.config.split;
    let descriptor = Descriptor::new(case.layout.clone(), case.spec.clone()).with_split(config.policy);
    if let Err(reason) = subject.covers(&descriptor) {
        subject.ledger.skipped(&subject.name, &reason);
        return Ok(());
    }
    let mut opened = subject.open(&case.layout, &case.spec, config, Route::Executor)?;
    opened.write_image(&case.cache)?;
    let step = Step {
        kv_lens: case.config.kv_lens.clone(),
        pages: case.pages.clone(),
        row_starts: case.row_starts.clone(),
        stride: case.row_stride,
        q: values(&case.q),
    };
    let run = opened.decode(&step)?;
    let lse: Option<Vec<f32>> =
        run.lse.as_ref().map(|lse| (0..lse.len()).map(|i| lse.get(i) as f32).collect());
    let arithmetic = subject.backend.arithmetic(&case.spec, &case.plan);
    case.check(&floats(&run.out), lse.as_deref(), &arithmetic).map_err(|mismatch| mismatch.to_string())?;
    subject.ledger.ran(&subject.name, "public cases", 1);
    Ok(())
}
