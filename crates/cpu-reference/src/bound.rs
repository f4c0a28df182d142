//! How far a correct backend may be from the oracle: an a-priori bound from the error model of its arithmetic.

use crate::oracle::OracleOutput;
use attn_plan::{DecodeSpec, SplitPlan};
use kv_quant::FloatType;

/// The error model of one backend. Relative errors are unit roundoffs (half the distance from 1 to the next value);
/// absolute ones are the smallest step of a type that can underflow, 0 where the type is f32 or the operand exact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arithmetic {
    /// Relative rounding of q where it is rounded before q.k; 0 if q is used as given.
    pub q_unit: f64,
    /// Error of a q element relative to the largest magnitude of its row (q quantized to integers); usually 0.
    pub q_amax_unit: f64,
    /// Absolute rounding of q (subnormals of its type).
    pub q_tiny: f64,
    /// Relative rounding of a dequantized K element as an operand of q.k; 0 if code and scale enter exactly.
    pub k_unit: f64,
    /// Absolute rounding of a K operand.
    pub k_tiny: f64,
    /// Roundings in f32 on the longest path through one q.k sum, scale factors included.
    pub dot_roundings: f64,
    /// Relative error of the exponential (of tanh too), beyond the rounding of its argument.
    pub exp_unit: f64,
    /// Relative rounding of a softmax weight as an operand of p.v.
    pub p_unit: f64,
    /// Absolute rounding of a weight, relative to the largest weight of its tile.
    pub p_tiny: f64,
    /// Relative rounding of a dequantized V element as an operand of p.v.
    pub v_unit: f64,
    /// Absolute rounding of a V operand.
    pub v_tiny: f64,
    /// Roundings in f32 on the longest path of the sum over tokens: within a tile, between tiles, between splits.
    pub sum_roundings: f64,
    /// Relative rounding of a stored partial state; 0 for f32 (its store is exact).
    pub partial_unit: f64,
    /// Type of the output.
    pub out_type: FloatType,
}

impl Arithmetic {
    /// f32 throughout, operands exact, over a plan: the model of the CPU backend's accurate mode.
    pub fn f32(spec: &DecodeSpec, plan: &SplitPlan) -> Self {
        let longest = plan.items().iter().map(|item| item.num_tokens()).max().unwrap_or(0);
        let splits =
            plan.request_partials().windows(2).map(|w| w.iter().rev().fold(0, |a, &b| a.max(b) - a.min(b)));
        let splits = splits.max().unwrap_or(0);
        Self {
            q_unit: 0.0,
            q_amax_unit: 0.0,
            q_tiny: 0.0,
            k_unit: 0.0,
            k_tiny: 0.0,
            dot_roundings: f64::from(spec.head_dim) + 6.0,
            exp_unit: 1.0 / (1u64 << 22) as f64,
            p_unit: 0.0,
            p_tiny: 0.0,
            v_unit: 0.0,
            v_tiny: 0.0,
            sum_roundings: f64::from(longest) + 2.0 * f64::from(longest) + 2.0 * f64::from(splits) + 8.0,
            partial_unit: 0.0,
            out_type: spec.out_type,
        }
    }
}

impl OracleOutput {
    /// Largest allowed `|out - oracle|` for each element, `[q_len, num_q_heads, head_dim]`.
    pub fn bound(&self, arithmetic: &Arithmetic) -> Vec<f64> {
        let a = arithmetic;
        let u = FloatType::F32.unit_roundoff();
        let gamma = |n: f64| n * u / (1.0 - n * u);
        let mut bounds = Vec::with_capacity(self.out.len());
        for (row, out) in self.rows.iter().zip(self.out.chunks_exact(self.head_dim)) {
            let delta = |token: &crate::oracle::Token| {
                token.abs_dot * (gamma(a.dot_roundings) + a.q_unit + a.k_unit)
                    + token.abs_k * (a.q_amax_unit * row.q_amax + a.q_tiny)
                    + token.abs_q * a.k_tiny
                    + 4.0 * u * (token.s.abs() + row.m.abs() + token.alibi.abs() + token.raw.abs())
                    + a.exp_unit
            };
            for (d, &o) in out.iter().enumerate() {
                let (mut spread, mut mass, mut absolute, mut v_max) = (0.0, 0.0, 0.0, 0f64);
                for token in &row.tokens {
                    let first = (token.t * self.num_kv_heads + row.kv_head) * self.head_dim;
                    let v = self.v.get(first + d).copied().unwrap_or(0.0);
                    let e = delta(token).exp_m1();
                    spread += token.p * e * (v - o).abs();
                    mass += token.p * e;
                    absolute += token.p * v.abs();
                    v_max = v_max.max(v.abs());
                }
                let relative = a.p_unit + a.v_unit + a.partial_unit + 2.0 * gamma(a.sum_roundings) + 4.0 * u;
                let tokens = row.tokens.len() as f64;
                bounds.push(
                    1.01 * (spread / (1.0 - mass).max(1e-3) + absolute * relative)
                        + a.out_type.unit_roundoff() * o.abs()
                        + a.out_type.tiny()
                        + tokens * (a.p_tiny + f64::from(f32::MIN_POSITIVE)) * v_max
                        + a.v_tiny,
                );
            }
        }
        bounds
    }

    /// Largest allowed `|lse - oracle|` for each row, `[q_len, num_q_heads]`.
    pub fn lse_bound(&self, arithmetic: &Arithmetic) -> Vec<f64> {
        let _ = arithmetic;
        self.lse.iter().map(|lse| 1e-5 * lse.abs() + 1e-5).collect()
    }
}
