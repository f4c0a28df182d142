//! How far a correct backend may be from the oracle: an a-priori bound from the error model of its arithmetic.
//!
//! Nothing here is tuned: the sums come from the oracle, the unit roundoffs from the backend. The derivation, step by
//! step in the order of our operations, is in `docs/error-bound.md`.

use crate::oracle::{OracleOutput, Row, Token};
use attn_plan::{DecodeSpec, SplitPlan};
use kv_quant::FloatType;

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;
/// Below this an f32 result may have been flushed to zero.
const FLUSH: f64 = f32::MIN_POSITIVE as f64;
/// A scale from which on products with codes may leave f16's range.
const WIDE_SCALE: f64 = 256.0;
const LARGEST_CODE: f64 = 128.0;

/// The error model of one backend.
///
/// A `*_unit` is a relative error (for a rounding: half the distance from 1 to the next value), a `*_tiny` an absolute
/// one (for an operand type that underflows: half its smallest step). An operand that is used as given has 0 in both.
/// `*_roundings` count f32 roundings on the longest path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arithmetic {
    /// q where it is rounded before q.k.
    pub q_unit: f64,
    /// Error of a q element relative to the largest magnitude of its row (q quantized to integers).
    pub q_amax_unit: f64,
    /// Absolute error of a q operand.
    pub q_tiny: f64,
    /// A K operand of q.k, if code times scale is rounded to a narrower type.
    pub k_unit: f64,
    /// Absolute error of a K operand.
    pub k_tiny: f64,
    /// The same, as a share of the largest K scale of the token's row: for backends that bring scales into the range of
    /// a narrower type.
    pub k_scale_tiny: f64,
    /// f32 roundings on the longest path through one q.k, scales and softmax_scale included.
    pub dot_roundings: f64,
    /// Further roundings of a finished logit, e.g. 2 for a change to base 2.
    pub logit_roundings: f64,
    /// Relative error of tanh (soft-cap).
    pub tanh_unit: f64,
    /// Absolute error of tanh, for approximations that are not relatively accurate near 0.
    pub tanh_tiny: f64,
    /// Relative error of the exponential for the argument it is given.
    pub exp_unit: f64,
    /// Largest number of times that a weight is rescaled because a later maximum is larger: tiles and splits.
    pub rescales: f64,
    /// A softmax weight as an operand of p.v, where the sum of weights is not of the rounded ones.
    pub p_unit: f64,
    /// Absolute error of a weight operand, weights being at most 1.
    pub p_tiny: f64,
    /// The same for a weight times its token's largest V scale, as a share of the largest such product.
    pub p_scale_tiny: f64,
    /// Absolute error of a weight operand, weights being at most 1, where a row has V scales of 256 or more: on values that
    /// were brought below 2^15.
    pub p_wide_tiny: f64,
    /// A V operand of p.v.
    pub v_unit: f64,
    /// Absolute error of a V operand.
    pub v_tiny: f64,
    /// The same, as a share of the largest V scale of the token's row.
    pub v_scale_tiny: f64,
    /// f32 roundings on the longest path of the sums over tokens: within a tile, between tiles, between splits.
    pub sum_roundings: f64,
    /// A stored partial state; 0 for f32.
    pub partial_unit: f64,
    /// Relative error of the logarithm in lse.
    pub ln_unit: f64,
    /// Type of the output.
    pub out_type: FloatType,
}

impl Arithmetic {
    /// f32 throughout with exact operands, sums in any order, over a plan: the mildest model of an f32 backend.
    pub fn f32(spec: &DecodeSpec, plan: &SplitPlan) -> Self {
        let facts = PlanFacts::of(plan);
        Self {
            q_unit: 0.0,
            q_amax_unit: 0.0,
            q_tiny: 0.0,
            k_unit: 0.0,
            k_tiny: 0.0,
            k_scale_tiny: 0.0,
            // Product, sum, code times an f32 scale, softmax_scale.
            dot_roundings: f64::from(spec.head_dim) + 3.0,
            logit_roundings: 0.0,
            tanh_unit: 4.0 * U,
            tanh_tiny: 0.0,
            exp_unit: 4.0 * U,
            rescales: facts.longest + facts.splits,
            p_unit: 0.0,
            p_tiny: 0.0,
            p_scale_tiny: 0.0,
            p_wide_tiny: 0.0,
            v_unit: 0.0,
            v_tiny: 0.0,
            v_scale_tiny: 0.0,
            // Token by token a rescale, a product and a sum; split by split likewise; normalizer and product.
            sum_roundings: 2.0 * facts.longest + 3.0 * facts.splits + 6.0,
            partial_unit: 0.0,
            ln_unit: 4.0 * U,
            out_type: spec.out_type,
        }
    }

    /// The CPU backend in its accurate mode, over a plan: f32 with exact operands, sums in lanes and tiles.
    pub fn host(spec: &DecodeSpec, plan: &SplitPlan) -> Self {
        let facts = PlanFacts::of(plan);
        let tile = f64::from(crate::split::tile_len(plan));
        let tiles = (facts.longest / tile).ceil();
        Self {
            dot_roundings: (f64::from(spec.head_dim) / crate::stage1::MIN_LANES as f64).ceil() + 7.0,
            rescales: tiles + facts.splits,
            // A weight times V's scale is the first.
            sum_roundings: 1.0 + tile.min(facts.longest) + 2.0 + 2.0 * tiles + 3.0 * facts.splits + 6.0,
            ..Self::f32(spec, plan)
        }
    }
}

impl Arithmetic {
    /// The CPU backend with integer dot products for q.k: each 32 channels of q rounded to 127ths of their largest
    /// magnitude. The scale's own rounding, and the quotient's, are within the added thousandth.
    pub fn host_int8(spec: &DecodeSpec, plan: &SplitPlan) -> Self {
        let q_amax_unit = 0.5 / 127.0 * 1.001;
        // Scales below the normal range lose their relative accuracy.
        Self { q_amax_unit, q_tiny: FLUSH, ..Self::host(spec, plan) }
    }
}

/// What of a plan an error depends on.
struct PlanFacts {
    /// Tokens of the longest item.
    longest: f64,
    /// Partial states of the most split request, one for a sink added.
    splits: f64,
}

impl PlanFacts {
    fn of(plan: &SplitPlan) -> Self {
        let longest = plan.items().iter().map(|item| item.num_tokens()).max().unwrap_or(0);
        let mut splits = 0;
        for pair in plan.request_partials().windows(2) {
            if let [start, end] = *pair {
                splits = splits.max(end - start);
            }
        }
        Self { longest: f64::from(longest), splits: f64::from(splits) + 1.0 }
    }
}

/// gamma_n of Higham: the relative error of n roundings in a row.
fn gamma(roundings: f64) -> f64 {
    let nu = roundings * U;
    if nu < 0.5 { nu / (1.0 - nu) } else { f64::INFINITY }
}

/// One weight of a row and how far it may be off.
struct Weight {
    /// Which token; `None` for the sink.
    t: Option<usize>,
    p: f64,
    /// `|ln(computed weight / exact weight)|`, up to a factor common to the row.
    delta: f64,
    /// `ln p`, which does not underflow.
    ln_p: f64,
}

impl Weight {
    /// `p * (exp(delta + more) - 1)`, safe from overflow times underflow.
    fn gain(&self, more: f64) -> f64 {
        ((self.ln_p + self.delta + more).exp() - self.p).max(0.0)
    }

    /// `p * exp(-delta - more)`.
    fn floor(&self, more: f64) -> f64 {
        (self.ln_p - self.delta - more).exp()
    }
}

impl Arithmetic {
    /// Largest error of a logit.
    fn logit_error(&self, row: &Row, token: &Token) -> f64 {
        let operands = (1.0 + gamma(self.dot_roundings)) * (1.0 + self.q_unit) * (1.0 + self.k_unit) - 1.0;
        let mut error = token.abs_dot * operands
            + token.abs_k * (self.q_amax_unit * row.q_amax + self.q_tiny) * (1.0 + self.k_unit)
            + token.abs_q * (self.k_tiny + self.k_scale_tiny * token.k_scale) * (1.0 + self.q_unit)
            + row.flush;
        if let Some(cap) = row.soft_cap {
            // |tanh| <= 1 and |c tanh(x/c)| <= |x|: the division and the product are two roundings of that.
            let size = token.raw.abs().min(cap);
            error += size * (2.0 * U + self.tanh_unit) + cap * self.tanh_tiny;
        }
        if token.alibi != 0.0 {
            error += 2.0 * U * token.alibi.abs() + U * (token.s.abs() + error);
        }
        error + self.logit_roundings * U * (token.s.abs() + error)
    }

    fn weights(&self, row: &Row, lse: f64) -> Vec<Weight> {
        // The subtraction of the maximum and every later change of maximum round their own difference, and these
        // differences add up to s - m.
        let weight = |t: Option<usize>, s: f64, logit_error: f64| {
            let exponent = U * (1.0 + self.logit_roundings) * ((s - row.m).abs() + 2.0 * logit_error);
            let delta = logit_error + exponent + (1.0 + self.rescales) * self.exp_unit * 1.01;
            Weight { t, p: (s - lse).exp(), delta, ln_p: s - lse }
        };
        let mut weights: Vec<Weight> = row
            .tokens
            .iter()
            .map(|token| weight(Some(token.t), token.s, self.logit_error(row, token)))
            .collect();
        weights.extend(row.sink.map(|sink| weight(None, sink, self.logit_roundings * U * sink.abs())));
        weights
    }
}

impl OracleOutput {
    /// Largest allowed `|out - oracle|` for each element, `[q_len, num_q_heads, head_dim]`.
    pub fn bound(&self, arithmetic: &Arithmetic) -> Vec<f64> {
        let mut bounds = Vec::with_capacity(self.out.len());
        let rows = self.rows.iter().zip(&self.lse).zip(self.out.chunks_exact(self.head_dim));
        for ((row, &lse), out) in rows {
            let weights = arithmetic.weights(row, lse);
            let top = weights.iter().max_by(|a, b| a.p.total_cmp(&b.p));
            let top_delta = top.map_or(0.0, |w| w.delta);
            let top_t = top.and_then(|w| w.t);
            // The sum of the weights can shrink to these, at most; the second with the top weight as the unit.
            let floor: f64 = weights.iter().map(|w| w.floor(0.0)).sum();
            let floor_by_top: f64 =
                weights.iter().map(|w| if w.t == top_t { w.p } else { w.floor(top_delta) }).sum();
            let mut sums = vec![Sums::default(); out.len()];
            let no_values = vec![0.0; out.len()];
            for weight in &weights {
                // Exponentials once a weight, not once an element.
                let gain = weight.gain(0.0);
                let gain_by_top = if weight.t == top_t { 0.0 } else { weight.gain(top_delta) };
                let values = weight.t.map_or(no_values.as_slice(), |t| self.values(row, t));
                for ((sums, &o), &v) in sums.iter_mut().zip(out).zip(values) {
                    sums.add(weight.p, gain, gain_by_top, v, o);
                }
            }
            let from_scales = self.error_of_scales(arithmetic, row, &weights, floor);
            let num_tokens = row.tokens.len() as f64;
            let elements = sums.iter().zip(out);
            bounds.extend(elements.map(|(sums, &o)| {
                element_bound(arithmetic, num_tokens, from_scales, sums, o, [floor, floor_by_top])
            }));
        }
        bounds
    }

    /// What the absolute errors that go with the scales of V add to any channel of a row.
    fn error_of_scales(&self, a: &Arithmetic, row: &Row, weights: &[Weight], floor: f64) -> f64 {
        if a.p_scale_tiny == 0.0 && a.p_wide_tiny == 0.0 && a.v_scale_tiny == 0.0 {
            return 0.0;
        }
        let (mut sum, mut largest, mut top_scale) = (0.0, 0f64, 0f64);
        for weight in weights {
            let at = weight.t.map(|t| t * self.num_kv_heads + row.kv_head);
            let scale = at.and_then(|at| self.v_scales.get(at)).copied().unwrap_or(0.0);
            let product = (weight.p + weight.gain(0.0)) * scale;
            sum += product;
            largest = largest.max(product);
            top_scale = top_scale.max(scale);
        }
        // No weight is more than the whole.
        let within = |x: f64, most: f64| if x / floor <= most { x / floor } else { most };
        let wide = if top_scale >= WIDE_SCALE { a.p_wide_tiny * WIDE_SCALE * LARGEST_CODE } else { 0.0 };
        row.tokens.len() as f64 * (a.p_scale_tiny * within(largest, top_scale) + wide)
            + a.v_scale_tiny * within(sum, top_scale)
    }

    /// One V row; empty if there is none.
    fn values(&self, row: &Row, t: usize) -> &[f64] {
        let first = (t * self.num_kv_heads + row.kv_head) * self.head_dim;
        self.v.get(first..first + self.head_dim).unwrap_or_default()
    }

    /// Largest allowed `|lse - oracle|` for each row, `[q_len, num_q_heads]`; 0 where lse is -inf.
    pub fn lse_bound(&self, arithmetic: &Arithmetic) -> Vec<f64> {
        let a = arithmetic;
        let bound = |(row, &lse): (&Row, &f64)| {
            if lse == f64::NEG_INFINITY {
                return 0.0;
            }
            let weights = a.weights(row, lse);
            let up = weights.iter().map(|w| w.p + w.gain(0.0)).sum::<f64>().ln();
            let down = -weights.iter().map(|w| w.floor(0.0)).sum::<f64>().ln();
            let num_tokens = row.tokens.len() as f64;
            let sum = up.max(down) + 1.01 * gamma(a.sum_roundings) + num_tokens * (FLUSH + a.p_tiny);
            let ln = (lse - row.m).abs() + sum;
            sum + a.ln_unit * ln + U * (1.0 + 2.0 * a.logit_roundings) * (lse.abs() + row.m.abs() + sum)
        };
        self.rows.iter().zip(&self.lse).map(bound).collect()
    }
}

/// What the tokens of a row add up to for one channel.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// `sum p (exp(delta) - 1) |v - O|`.
    spread: f64,
    /// The same with the top weight as the unit.
    spread_by_top: f64,
    /// `max |v - O|`.
    hull: f64,
    /// `sum p exp(delta) |v|`.
    mass: f64,
    /// `max |v|`.
    v_max: f64,
}

impl Sums {
    fn add(&mut self, p: f64, gain: f64, gain_by_top: f64, v: f64, o: f64) {
        let distance = (v - o).abs();
        self.hull = self.hull.max(distance);
        self.v_max = self.v_max.max(v.abs());
        self.spread += gain * distance;
        self.spread_by_top += gain_by_top * distance;
        self.mass += (p + gain) * v.abs();
    }
}

fn element_bound(
    a: &Arithmetic,
    num_tokens: f64,
    from_scales: f64,
    sums: &Sums,
    o: f64,
    [floor, floor_by_top]: [f64; 2],
) -> f64 {
    let Sums { spread, spread_by_top, hull, mass, v_max } = *sums;
    // Whatever the weights are, the exact sum of values is a convex combination of them.
    let from_weights = [spread / floor, spread_by_top / floor_by_top, hull]
        .into_iter()
        .filter(|x| !x.is_nan())
        .fold(f64::INFINITY, f64::min);
    let mass = (mass / floor).min(v_max);
    let mass = if mass.is_nan() { v_max } else { mass };
    let relative = a.p_unit + a.v_unit + a.partial_unit + 2.0 * gamma(a.sum_roundings);
    let underflow = num_tokens * ((a.p_tiny + FLUSH) * v_max + FLUSH) + a.v_tiny;
    let before_out = from_weights + 1.01 * mass * relative + underflow + from_scales;
    before_out + a.out_type.unit_roundoff() * (o.abs() + before_out) + (a.out_type.tiny() / 2.0).max(FLUSH)
}
