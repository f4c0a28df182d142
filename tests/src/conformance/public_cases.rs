//! The strategies that `cpu-reference` offers to users, on every backend: another generator, another judge.

use crate::case::Profile;
use crate::count;
use crate::problem::Step;
use crate::subject::{Route, Subject};
use crate::values::Values;
use attn_backend::Descriptor;
use cpu_reference::case::{Case, Floats};
use cpu_reference::strategies::{Limits, cases};
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

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
    let profile = Profile::new(&capability, subject.tile_len(), u64::MAX);
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
    let config = Config {
        cases: num_cases,
        max_shrink_iters: 200,
        failure_persistence: count::persistence("public_cases"),
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&cases(&limits), |config| {
        let case = config.build().map_err(|error| TestCaseError::fail(error.to_string()))?;
        one(subject, &case).map_err(TestCaseError::fail)
    });
    outcome.map_err(|error| match error {
        TestError::Fail(reason, case) => format!("{reason}\n  shrunk to {case:?}"),
        TestError::Abort(reason) => format!("aborted: {reason}"),
    })
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
