//! A kernel's result against the oracle and its bound.

use super::{Case, CaseConfig, Floats};
use crate::Arithmetic;
use crate::oracle::OracleOutput;

/// The worst element of a result that is beyond its bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// `out` or `lse`.
    pub what: &'static str,
    /// Which request.
    pub request: usize,
    /// Which new token.
    pub q_idx: usize,
    /// Which query head.
    pub head: usize,
    /// Which channel; 0 for lse.
    pub channel: usize,
    /// The kernel's value.
    pub got: f64,
    /// The oracle's value.
    pub want: f64,
    /// The largest allowed difference.
    pub bound: f64,
    /// How many elements are beyond their bounds.
    pub violations: usize,
    /// How to build the case again.
    pub config: CaseConfig,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, request, q_idx, head, channel, got, want, bound, violations, config } = self;
        write!(
            f,
            "{what}[request {request}, new token {q_idx}, head {head}, channel {channel}] is {got:e}; the oracle \
             says {want:e} within {bound:e}; {violations} elements are beyond their bounds; {config:?}"
        )
    }
}

impl std::error::Error for Mismatch {}

/// How far beyond its bound a value is: at most 1 is right, NaN is infinitely wrong.
pub(crate) fn excess(got: f64, want: f64, bound: f64) -> f64 {
    // Equal infinities (lse of nothing) are right.
    if got == want {
        return 0.0;
    }
    let excess = (got - want).abs() / bound;
    if excess.is_nan() || bound.is_nan() { f64::INFINITY } else { excess }
}

pub(super) fn check(
    case: &Case,
    expected: Option<&[OracleOutput]>,
    out: &Floats,
    lse: Option<&[f32]>,
    arithmetic: &Arithmetic,
) -> Result<(), Box<Mismatch>> {
    let mut worst: Option<(f64, Mismatch)> = None;
    let mut violations = 0;
    let blank = |what, want: f64| Mismatch {
        what,
        request: 0,
        q_idx: 0,
        head: 0,
        channel: 0,
        got: f64::NAN,
        want,
        bound: 0.0,
        violations: 1,
        config: case.config.clone(),
    };
    let Some(expected) = expected else { return Err(Box::new(blank("oracle", f64::NAN))) };
    let out = out.to_f32();
    let (heads, head_dim) = (case.spec.num_q_heads as usize, case.spec.head_dim as usize);
    let per_request = case.spec.q_elements(1);
    for (request, oracle) in expected.iter().enumerate() {
        let out_bound = oracle.bound(arithmetic);
        let lse_bound = oracle.lse_bound(arithmetic);
        let outs = oracle.out.iter().zip(&out_bound).enumerate().map(|(i, (&want, &bound))| {
            let got = out.get(request * per_request + i).map_or(f64::NAN, |&x| f64::from(x));
            ("out", i / head_dim, i % head_dim, got, want, bound)
        });
        let lses = oracle.lse.iter().zip(&lse_bound).enumerate().filter_map(|(i, (&want, &bound))| {
            let got = lse?.get(request * oracle.lse.len() + i).map_or(f64::NAN, |&x| f64::from(x));
            Some(("lse", i, 0, got, want, bound))
        });
        for (what, row, channel, got, want, bound) in outs.chain(lses) {
            let excess = excess(got, want, bound);
            if excess <= 1.0 {
                continue;
            }
            violations += 1;
            if worst.as_ref().is_none_or(|(other, _)| excess > *other) {
                let (q_idx, head) = (row / heads, row % heads);
                let mismatch = Mismatch { request, q_idx, head, channel, got, bound, ..blank(what, want) };
                worst = Some((excess, mismatch));
            }
        }
    }
    match worst {
        Some((_, mismatch)) => Err(Box::new(Mismatch { violations, ..mismatch })),
        None => Ok(()),
    }
}
