//! A backend's output against the oracle: anomalies first, then the a-priori bound, element by element.

use crate::values::Values;
use attn_plan::DecodeSpec;
use cpu_reference::Arithmetic;
use cpu_reference::oracle::OracleOutput;

/// What a decode returned.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// `[batch, q_len, num_q_heads, head_dim]`.
    pub out: Values,
    /// `[batch, q_len, num_q_heads]`, if asked for.
    pub lse: Option<Values>,
}

impl Run {
    /// Where the bits of two runs differ first.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let lse = match (&self.lse, &other.lse) {
            (Some(a), Some(b)) => a.first_difference(b).map(|i| ("lse", i, a, b)),
            (None, None) => None,
            _ => return Some("lse is there in one run only".to_owned()),
        };
        let out = self.out.first_difference(&other.out).map(|i| ("out", i, &self.out, &other.out));
        let (what, i, a, b) = out.or(lse)?;
        Some(format!("{what}[{i}]: {:e} ({:#x}) and {:e} ({:#x})", a.get(i), a.bits(i), b.get(i), b.bits(i)))
    }

    /// The part of one request.
    pub fn request(&self, spec: &DecodeSpec, request: usize) -> Self {
        let part = |values: &Values, n: usize| values.part(request * n..(request + 1) * n);
        Self {
            out: part(&self.out, spec.q_elements(1)),
            lse: self.lse.as_ref().map(|lse| part(lse, spec.lse_elements(1))),
        }
    }
}

/// Compares with the oracle; returns the largest error as a share of its bound.
///
/// # Errors
/// What is wrong, in words: untouched or non-finite elements, else the element that is furthest beyond its bound.
pub fn with_oracle(
    spec: &DecodeSpec,
    oracle: &[OracleOutput],
    arithmetic: &Arithmetic,
    run: &Run,
) -> Result<f64, String> {
    let mut worst = 0f64;
    let mut wrong = Wrong::default();
    let at = |request: usize, row: usize| {
        let heads = spec.num_q_heads as usize;
        format!("request {request}, row {}, head {}", row / heads, row % heads)
    };
    let head_dim = spec.head_dim as usize;
    for (request, oracle) in oracle.iter().enumerate() {
        let bounds = oracle.bound(arithmetic);
        for (i, (&want, &bound)) in oracle.out.iter().zip(&bounds).enumerate() {
            let index = request * oracle.out.len() + i;
            let place = || format!("out[{}, channel {}]", at(request, i / head_dim), i % head_dim);
            worst = worst.max(wrong.look(&run.out, index, want, bound, place));
        }
        let Some(lse) = &run.lse else { continue };
        let bounds = oracle.lse_bound(arithmetic);
        for (i, (&want, &bound)) in oracle.lse.iter().zip(&bounds).enumerate() {
            let place = || format!("lse[{}]", at(request, i));
            worst = worst.max(wrong.look(lse, request * oracle.lse.len() + i, want, bound, place));
        }
    }
    wrong.verdict().map(|()| worst)
}

/// What was found wrong, with the first place of each kind.
#[derive(Default)]
struct Wrong {
    untouched: (usize, String),
    anomalies: (usize, String),
    beyond: (usize, f64, String),
}

impl Wrong {
    fn look(&mut self, values: &Values, i: usize, want: f64, bound: f64, place: impl Fn() -> String) -> f64 {
        let got = values.get(i);
        if values.is_untouched(i) {
            self.untouched.0 += 1;
            if self.untouched.0 == 1 {
                self.untouched.1 = place();
            }
        } else if !got.is_finite() && got != want {
            self.anomalies.0 += 1;
            if self.anomalies.0 == 1 {
                self.anomalies.1 = format!("{} is {got}, expected {want:e}", place());
            }
        } else if got != want {
            let ratio = (got - want).abs() / bound;
            // A bound that is no number proves nothing: that is a fault too.
            if ratio <= 1.0 {
                return ratio;
            }
            self.beyond.0 += 1;
            if self.beyond.0 == 1 || ratio > self.beyond.1 {
                let text = format!("{} is {got:e}, expected {want:e} within {bound:e}", place());
                (self.beyond.1, self.beyond.2) = (ratio, text);
            }
        }
        0.0
    }

    fn verdict(self) -> Result<(), String> {
        let mut text = Vec::new();
        if self.untouched.0 > 0 {
            text.push(format!("{} elements never written, first {}", self.untouched.0, self.untouched.1));
        }
        if self.anomalies.0 > 0 {
            text.push(format!("{} NaN or infinite elements, first {}", self.anomalies.0, self.anomalies.1));
        }
        if self.beyond.0 > 0 {
            text.push(format!("{} elements beyond the bound, worst {}", self.beyond.0, self.beyond.2));
        }
        if text.is_empty() { Ok(()) } else { Err(text.join("; ")) }
    }
}
