//! All that is asked of one case.

use crate::case::{Case, Rows};
use crate::compare::{self, Run};
use crate::numbers::Numbers;
use crate::poison::Fill;
use crate::problem::Problem;
use crate::subject::{Opened, Route, Subject};
use attn_backend::Descriptor;
use attn_plan::SplitPolicy;
use cpu_reference::oracle;

/// The axis of the ledger on which the backend's own variants are counted.
pub const VARIANT: &str = "variant";

/// What came of a case that is not wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Executed; the largest error as a share of its bound.
    Right(f64),
    /// Not executed.
    Skipped(String),
}

/// Runs a case on a backend and checks: appended bytes, the result against the oracle, the same bits again, the same
/// bits over zeros instead of poison, the same bits in other company (batch-invariant policy), an unchanged cache.
///
/// # Errors
/// The first thing that is wrong.
pub fn judge(subject: &Subject, suite: &str, case: &Case) -> Result<Verdict, String> {
    let problem = Problem::new(case);
    judge_problem(subject, suite, &problem).map_err(|error| format!("{error}\n  in {case:?}"))
}

/// As [`judge`], of a problem that is made already.
///
/// # Errors
/// The first thing that is wrong.
pub fn judge_problem(subject: &Subject, suite: &str, problem: &Problem) -> Result<Verdict, String> {
    let case = &problem.case;
    let descriptor =
        Descriptor::new(problem.layout.clone(), problem.spec.clone()).with_split(case.config.policy);
    if let Err(reason) = subject.covers(&descriptor) {
        subject.ledger.skipped(&subject.name, &reason);
        return Ok(Verdict::Skipped(reason));
    }
    let route = if case.seed.is_multiple_of(2) { Route::Session } else { Route::Executor };
    let mut opened = subject.open(&problem.layout, &problem.spec, case.config, route)?;
    fill(&mut opened, problem)?;
    let run = opened.decode(&problem.step)?;

    let request = problem.request();
    let expected =
        oracle::decode_request(&problem.layout, &problem.image.view(), &request, problem.step.q.as_slice())
            .map_err(|error| format!("the oracle: {error}"))?;
    let plan = opened.split_plan(&problem.step)?;
    let arithmetic = subject.backend.arithmetic(&problem.spec, &plan);
    let worst = compare::with_oracle(&problem.spec, &expected, &arithmetic, &run)?;

    let again = opened.decode(&problem.step)?;
    if let Some(difference) = run.difference(&again) {
        return Err(format!("the same step twice differs at {difference}"));
    }
    if let SplitPolicy::BatchInvariant { .. } = case.config.policy {
        other_company(&mut opened, problem, &run)?;
    }
    opened.compare_image(&problem.image).map_err(|error| format!("decode changed the cache: {error}"))?;
    if case.seed % 4 == 1 {
        let zeros = Problem::with_fill(case, Fill::Zeros);
        opened.write_image(&zeros.image)?;
        let clean = opened.decode(&zeros.step)?;
        if let Some(difference) = run.difference(&clean) {
            return Err(format!("dead memory shows in the result: {difference}"));
        }
    }
    enter(subject, suite, case, worst);
    if let Some(variant) = subject.backend.variant(&descriptor) {
        subject.ledger.covered(&subject.name, VARIANT, variant);
    }
    Ok(Verdict::Right(worst))
}

/// Fills the cache: by append where the data are tokens, and then the bytes must be those of the rule.
pub(super) fn fill(opened: &mut Opened, problem: &Problem) -> Result<(), String> {
    let Some(tokens) = &problem.tokens else { return opened.write_image(&problem.image) };
    opened.write_image(&problem.dead)?;
    opened.append(tokens)?;
    opened.compare_image(&problem.image).map_err(|error| format!("append: {error}"))
}

/// Each request alone, and the batch backwards with one request doubled: every request keeps its bits.
fn other_company(opened: &mut Opened, problem: &Problem, run: &Run) -> Result<(), String> {
    let (spec, batch) = (&problem.spec, problem.step.kv_lens.len());
    if batch == 0 {
        return Ok(());
    }
    let alone = Numbers::new(problem.case.seed, 5).below(batch);
    let mut backwards: Vec<usize> = (0..batch).rev().collect();
    backwards.push(alone);
    for requests in [vec![alone], backwards] {
        let other = opened.decode(&problem.step.select(spec, &requests))?;
        for (position, &request) in requests.iter().enumerate() {
            let (first, second) = (run.request(spec, request), other.request(spec, position));
            if let Some(difference) = first.difference(&second) {
                return Err(format!(
                    "request {request} at position {position} of a batch of {} has other bits: {difference}",
                    requests.len()
                ));
            }
        }
    }
    Ok(())
}

fn enter(subject: &Subject, suite: &str, case: &Case, worst: f64) {
    let (ledger, name) = (&subject.ledger, subject.name.as_str());
    ledger.ran(name, suite, 1);
    ledger.error_ratio(name, worst, || {
        let Case { head_dim, k_group_len, v_group_len, q_type, out_type, .. } = case;
        format!("d{head_dim} gk{k_group_len} gv{v_group_len} {q_type}->{out_type} {:?}", case.data)
    });
    let tile = case.config.tile_len;
    ledger.covered(name, "head_dim", case.head_dim);
    ledger.covered(name, "group", format!("{}/{}", case.k_group_len, case.v_group_len));
    ledger.covered(name, "gqa", case.gqa_group);
    ledger.covered(name, "q_len", case.q_len);
    ledger.covered(name, "page_len", case.page_len);
    ledger.covered(name, "layout", case.layout);
    ledger.covered(name, "scale", case.scale_type);
    ledger.covered(name, "in/q/out", format!("{}/{}/{}", case.in_type, case.q_type, case.out_type));
    ledger.covered(name, "rows", if case.rows == Rows::Padded { "padded" } else { "scattered" });
    for &kv_len in &case.kv_lens {
        ledger.covered(name, "kv_len", length_class(kv_len, tile));
    }
    for (feature, on) in [
        ("window", case.window.is_some()),
        ("soft_cap", case.soft_cap.is_some()),
        ("alibi", case.alibi),
        ("sinks", case.sinks),
        ("lse", case.want_lse),
        ("shared pages", case.shares_prefix),
        ("batch-invariant", case.config.policy != SplitPolicy::Throughput),
    ] {
        if on {
            ledger.covered(name, "feature", feature);
        }
    }
}

fn length_class(kv_len: u32, tile: u32) -> String {
    match kv_len {
        0..=2 => kv_len.to_string(),
        _ if kv_len.is_multiple_of(tile) => "edge".to_owned(),
        _ if kv_len % tile == 1 => "edge+1".to_owned(),
        _ if kv_len % tile == tile - 1 => "edge-1".to_owned(),
        3..=63 => "3..64".to_owned(),
        64..=1023 => "64..1024".to_owned(),
        1024..=8191 => "1024..8192".to_owned(),
        _ => "8192..".to_owned(),
    }
}
