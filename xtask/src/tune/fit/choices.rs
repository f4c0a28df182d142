//! Constants for what a model is for: its choices. Where it expects nearly as much of two schedules, least squares do not care which it
//! takes, though one may be a quarter slower than it expects.

use super::{Data, Step, sum_of_squares, values, with_logs};
use attn_tune::CostModel;

/// Factors that a constant is moved by, the largest first.
const FACTORS: [f64; 7] = [2.5, 1.5, 1.2, 1.08, 1.03, 1.01, 1.003];
const MOST_ROUNDS: usize = 20;
/// A choice that loses so much (as a logarithm) counts as one, with the sixth power of its loss: what is aimed at is the worst.
const LOSS: f64 = 0.15;
/// A constant that has moved by a factor of e counts as this many times that are missed as usual: those that few choices turn on would
/// wander off.
const HOLD: f64 = 1000.0;
/// What one such loss counts as, in squared residuals.
const WEIGHT: f64 = 8.0;
/// Choices of which so much more is expected than of the least (as a share) count by 1 / e of it: near ties turn with the next run.
const NEAR: f64 = 0.01;
/// What a choice that nobody has timed counts as.
const UNTIMED: f64 = 0.17;

/// What the model's choices lose, as residuals are counted.
fn losses(data: &Data, model: &CostModel) -> f64 {
    let of_step = |step: &Step| {
        let Some((_, best)) = step.best() else { return 0.0 };
        let predict = model.step(&data.machines[step.machine], &step.key, &step.shape, &step.run);
        let expected: Vec<f64> = step.few.iter().map(|(choice, _)| predict(choice)).collect();
        let least = expected.iter().copied().fold(f64::INFINITY, f64::min);
        let (mut weights, mut sum) = (0.0, 0.0);
        for ((_, timed), expected) in step.few.iter().zip(&expected) {
            let weight = (-(expected / least - 1.0) / NEAR).exp();
            let loss = timed.map_or(UNTIMED, |(_, us)| (us / best).ln().max(0.0));
            weights += weight;
            sum += weight * (loss / LOSS).powi(6);
        }
        sum / weights
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
    let begin = logs.clone();
    let residuals = data.residuals(model);
    let hold = HOLD * sum_of_squares(&residuals) / residuals.len().max(1) as f64;
    let cost = |logs: &[f64]| {
        let moved: f64 = logs.iter().zip(&begin).map(|(log, begin)| (log - begin) * (log - begin)).sum();
        cost(data, &with_logs(logs)) + hold * moved
    };
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
