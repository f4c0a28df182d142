//! The error model of the kernels, row by row from `docs/kernel-error.md`.

use attn_kernels::key;
use attn_plan::{DecodeSpec, SplitPlan};
use cpu_reference::Arithmetic;
use kv_quant::FloatType;

/// Tokens that a warp takes at a time.
const TILE_TOKENS: f64 = 16.0;
/// A reference rises by 7 in base 2 at least, so a weight that was rescaled n times is below 2^(7 - 7 n) of the largest:
/// more than this many do not matter at any length.
const RISES: f64 = 4.0;
/// Warps whose states a block merges.
const WARPS: f64 = 4.0;
/// Lanes of stage 2 that are folded one after the other.
const MERGE_LANES: f64 = 8.0;

pub(super) fn of(kernels: key::Arithmetic, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
    let tokens = f64::from(plan.items().iter().map(|item| item.num_tokens()).max().unwrap_or(0));
    let splits = plan.request_partials().windows(2).map(|pair| match *pair {
        [start, end] => end - start,
        _ => 0,
    });
    let splits = f64::from(splits.max().unwrap_or(0));
    // Partials are folded by eight lanes, then the lanes; the sink is one more.
    let merges = WARPS + if splits > 0.0 { (splits / MERGE_LANES).ceil() + MERGE_LANES } else { 0.0 } + 1.0;
    let common = Arithmetic {
        // Base 2: the scale and log2 e are one factor, and every later number is in that base.
        logit_roundings: 8.0,
        // Rows 6: ex2.approx and rcp.approx, or tanhf, which is better.
        tanh_tiny: (-20f64).exp2(),
        // Row 9 and the exp2f of rows 13: 2^-22 both.
        exp_unit: (-22f64).exp2(),
        rescales: RISES + merges,
        ..Arithmetic::f32(spec, plan)
    };
    match kernels {
        key::Arithmetic::Mma => tensor_cores(spec, tokens, merges, common),
        // Chains of fmaf in channel and token order.
        key::Arithmetic::F32 => Arithmetic {
            dot_roundings: f64::from(spec.head_dim) + 6.0,
            sum_roundings: tokens + 4.0 * merges + 40.0,
            ..common
        },
    }
}

fn tensor_cores(spec: &DecodeSpec, tokens: f64, merges: f64, common: Arithmetic) -> Arithmetic {
    let half = FloatType::F16.unit_roundoff();
    let steps = tokens / TILE_TOKENS + RISES;
    Arithmetic {
        q_unit: if spec.q_type == FloatType::F32 { half } else { 0.0 },
        q_amax_unit: (-39f64).exp2(),
        // Code times scale, and the scale itself where it is f32.
        k_unit: 2.0 * half,
        // Scales that are brought into f16's range, with a factor of two for what is of second order.
        k_scale_tiny: (-30f64).exp2(),
        // A tensor core truncates: four units a step of 16 channels.
        dot_roundings: 4.0 * (f64::from(spec.head_dim) / 16.0 + 4.0),
        p_unit: half,
        p_tiny: (-32f64).exp2(),
        p_scale_tiny: (-24f64).exp2(),
        v_unit: 2.0 * half,
        v_scale_tiny: (-23f64).exp2(),
        // Four units a step of 16 tokens, and the sums of the weights.
        sum_roundings: 4.0 * steps + tokens + 4.0 * merges + 40.0,
        ..common
    }
}
