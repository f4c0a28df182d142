//! Constants for what a model is for: its choices. Where it expects nearly as much of two schedules, least squares do not care which it
//! takes, though one may be a quarter slower than it expects.

use super::{Data, Step, sum_of_squares, values, with_logs};
use attn_tune::CostModel;

/// Factors that a constant is moved by, the largest first.
const FACTORS: [f64; 7] = [2.5, 1.5, 1.2, 1.08, 1.03, 1.01, 1.003];
const MOST_ROUNDS: usize = 20;
/// A choice that loses so much (as a logarithm) counts as one, with the sixth power of its loss: what is aimed at is the worst.
const LOSS: f64 = 0.15;
/// What one such loss counts as, in squared residuals.
const WEIGHT: f64 = 8.0;
/// What a choice that nobody has timed counts as.
const UNTIMED: f64 = 0.17;

/// What the model's choices lose, as residuals are counted.
fn losses(data: &Data, model: &CostModel) -> f64 {
    let of_step = |step: &Step| {
        let pair = data.chosen_and_best(model, step);
        let loss = pair.map_or(UNTIMED, |[chosen, best]| (chosen.1 / best.1).ln());
        (loss / LOSS).powi(6)
    };
    WEIGHT * data.steps.iter().map(of_step).sum::<f64>()
}

/// What constants are judged by: missed times and lost choices together.
pub(super) fn cost(data: &Data, model: &CostModel) -> f64 {
    sum_of_squares(&data.residuals(model)) + losses(data, model)
}

/// Moves one constant after the other as long as choices and expected times together get better.
pub(super) fn polish(data: &Data, model: &CostModel) -> CostModel {
    let mut logs: Vec<f64> = values(model).iter().map(|value| value.max(1e-6).ln()).collect();
    let cost = |logs: &[f64]| cost(data, &with_logs(logs));
    let mut best = cost(&logs);
    for _ in 0..MOST_ROUNDS {
        let before = best;
        for factor in FACTORS {
            for constant in 0..logs.len() {
                for by in [factor.ln(), -factor.ln()] {
                    let mut moved = logs.clone();
                    moved[constant] += by;
                    let cost = cost(&moved);
                    if cost < best {
                        (logs, best) = (moved, cost);
                        break;
                    }
                }
            }
        }
        if before - best < 1e-4 * before {
            break;
        }
    }
    with_logs(&logs)
}
