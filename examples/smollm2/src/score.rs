//! How far predictions over one cache are from those over another: perplexity, KL divergence, top-1 agreement.

use crate::model::Model;
use crate::sample::argmax;
use anyhow::Result;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Rows of logits held at a time.
const ROWS: usize = 128;

/// Sums over predicted tokens; natural logarithms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Predictions.
    pub tokens: u64,
    /// Sum of -log p(next token).
    pub nll: f64,
    /// The same of the reference.
    pub nll_reference: f64,
    /// Sum of squared differences of the two, for the standard error.
    pub nll_change_squared: f64,
    /// Sum of KL(reference || this).
    pub kl: f64,
    /// Predictions whose likeliest token is the reference's.
    pub top1: u64,
}

impl Score {
    /// Adds another part.
    pub fn add(&mut self, other: &Score) {
        self.tokens += other.tokens;
        self.nll += other.nll;
        self.nll_reference += other.nll_reference;
        self.nll_change_squared += other.nll_change_squared;
        self.kl += other.kl;
        self.top1 += other.top1;
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }

    /// exp of the mean negative log likelihood.
    pub fn perplexity(&self) -> f64 {
        self.mean(self.nll).exp()
    }

    /// The reference's.
    pub fn perplexity_reference(&self) -> f64 {
        self.mean(self.nll_reference).exp()
    }

    /// Relative change of perplexity, in percent.
    pub fn change_percent(&self) -> f64 {
        100.0 * (self.mean(self.nll - self.nll_reference).exp() - 1.0)
    }

    /// Standard error of [`Self::change_percent`], from the scatter of the differences token by token.
    pub fn change_error_percent(&self) -> f64 {
        let mean = self.mean(self.nll - self.nll_reference);
        let variance = (self.mean(self.nll_change_squared) - mean * mean).max(0.0);
        100.0 * (variance / self.tokens.max(1) as f64).sqrt()
    }

    /// Mean KL divergence in nats.
    pub fn mean_kl(&self) -> f64 {
        self.mean(self.kl)
    }

    /// Share of predictions with the reference's likeliest token.
    pub fn top1_agreement(&self) -> f64 {
        self.top1 as f64 / self.tokens.max(1) as f64
    }
}

/// The reference's hidden rows over a window; logits are made again where they are needed: `[n, vocab]` of them would be
/// 200 MB a window.
pub struct Reference {
    hidden: Vec<f32>,
}

struct Row {
    log_sum: f64,
    nll: f64,
}

fn row(logits: &[f32], next: u32) -> Row {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 =
        logits.chunks(256).map(|part| f64::from(part.iter().map(|x| (x - max).exp()).sum::<f32>())).sum();
    let log_sum = f64::from(max) + sum.ln();
    Row { log_sum, nll: log_sum - f64::from(logits.get(next as usize).copied().unwrap_or(f32::NEG_INFINITY)) }
}

impl Reference {
    /// From the hidden rows of a window, `[n, width]`.
    pub fn new(hidden: Vec<f32>) -> Self {
        Self { hidden }
    }

    /// Scores each of `others` (hidden rows of the same window under another cache) against the reference. `tokens` are
    /// the window's; every token but the last predicts the one after it.
    pub fn score(&self, model: &Model, tokens: &[u32], others: &[Vec<f32>]) -> Result<Vec<Score>> {
        let (width, vocab) = (model.config().width, model.config().vocab_len);
        let mut scores = vec![Score::default(); others.len()];
        for (chunk_idx, hidden) in self.hidden.chunks(ROWS * width).enumerate() {
            let next = tokens.get(chunk_idx * ROWS + 1..).unwrap_or_default();
            let reference = model.logits(hidden)?;
            // p and its log-sum, once for all others.
            let rows: Vec<(Row, Vec<f32>)> = reference
                .par_chunks_exact(vocab)
                .zip(next.par_iter())
                .map(|(logits, &next)| {
                    let row = row(logits, next);
                    let p = logits.iter().map(|x| (x - row.log_sum as f32).exp()).collect();
                    (row, p)
                })
                .collect();
            for (other, score) in others.iter().zip(&mut scores) {
                let start = chunk_idx * ROWS * width;
                let logits = model.logits(other.get(start..start + hidden.len()).unwrap_or_default())?;
                let parts: Vec<Score> = logits
                    .par_chunks_exact(vocab)
                    .zip(reference.par_chunks_exact(vocab))
                    .zip(rows.par_iter().zip(next))
                    .map(|((logits, of_reference), ((reference, p), &next))| {
                        let this = row(logits, next);
                        let mut gap = 0f64;
                        for ((p, a), b) in p.chunks(256).zip(of_reference.chunks(256)).zip(logits.chunks(256))
                        {
                            let part: f32 = p.iter().zip(a).zip(b).map(|((p, a), b)| p * (a - b)).sum();
                            gap += f64::from(part);
                        }
                        let change = this.nll - reference.nll;
                        Score {
                            tokens: 1,
                            nll: this.nll,
                            nll_reference: reference.nll,
                            nll_change_squared: change * change,
                            // Rounding may leave a hair below zero.
                            kl: (gap + this.log_sum - reference.log_sum).max(0.0),
                            top1: u64::from(argmax(logits) == argmax(of_reference)),
                        }
                    })
                    .collect();
                parts.iter().for_each(|part| score.add(part));
            }
        }
        Ok(scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_against_itself_is_clean() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 7.0).collect();
        let row = row(&logits, 5);
        let exact: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((row.log_sum - exact).abs() < 1e-5, "{} {exact}", row.log_sum);
        assert!((row.nll - (exact - f64::from(logits[5]))).abs() < 1e-5);
    }
}
