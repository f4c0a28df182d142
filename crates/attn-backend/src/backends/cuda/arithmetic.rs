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
/// Warps whose states a block merges at most.
const WARPS: f64 = 8.0;
/// Partials of a request that stage 2 folds one after the other at most.
const FEW_PARTIALS: f64 = 16.0;
/// Lanes of stage 2 that are folded one after the other.
const MERGE_LANES: f64 = 8.0;

pub(super) fn of(kernels: key::Arithmetic, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
    let tokens = f64::from(plan.items().iter().map(|item| item.num_tokens()).max().unwrap_or(0));
    let splits = plan.request_partials().windows(2).map(|pair| match *pair {
        [start, end] => end - start,
        _ => 0,
    });
    let splits = f64::from(splits.max().unwrap_or(0));
    // Few partials are folded in order, more by eight lanes, then the lanes; the sink is one more.
    let folds = if splits <= FEW_PARTIALS { splits } else { (splits / MERGE_LANES).ceil() + MERGE_LANES };
    let merges = WARPS + folds + 1.0;
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

/// Whether the head dimension has variants for groups of the whole head, whose operands are others. A spec does not say how
/// the cache is grouped: every number is the larger of the two.
fn has_whole(head_dim: u32) -> bool {
    key::INSTANCES.iter().any(|row| row.key.head_dim == head_dim && row.key.groups == key::Groups::Whole)
}

fn tensor_cores(spec: &DecodeSpec, tokens: f64, merges: f64, common: Arithmetic) -> Arithmetic {
    let half = FloatType::F16.unit_roundoff();
    let whole = has_whole(spec.head_dim);
    // One mma a tile of 16 tokens, or two.
    let steps = (tokens / TILE_TOKENS + RISES) * if whole { 2.0 } else { 1.0 };
    Arithmetic {
        q_unit: if spec.q_type == FloatType::F32 { half } else { 0.0 },
        // In whole numbers of which the row's largest magnitude is 16319.5 at least, unless it is below 2^-112.
        q_amax_unit: if whole { 0.5 / 16319.0 } else { (-39f64).exp2() },
        q_tiny: if whole { f64::from(f32::MIN_POSITIVE) } else { 0.0 },
        // Code times scale, and the scale itself where it is f32.
        k_unit: 2.0 * half,
        // Scales that are brought into f16's range, with a factor of two for what is of second order.
        k_scale_tiny: (-30f64).exp2(),
        // A tensor core truncates: four units a step of 16 channels.
        dot_roundings: 4.0 * (f64::from(spec.head_dim) / 16.0 + 4.0),
        p_unit: half,
        p_tiny: (-32f64).exp2(),
        p_scale_tiny: (-24f64).exp2(),
        // A tile with f16 scales of 256 or more has 9 bits less room for weights.
        p_wide_tiny: (-24f64).exp2(),
        // Code times scale, and an f32 scale; or a scale by its logarithm, which is less.
        v_unit: 2.0 * half,
        // A surplus of 128 in every code, added and taken out, costs the rounding of its sum.
        v_scale_tiny: if whole { (-13f64).exp2() } else { (-23f64).exp2() },
        // Four units a step of 16 tokens, and the sums of the weights.
        sum_roundings: 4.0 * steps + tokens + 4.0 * merges + 40.0,
        ..common
    }
}
