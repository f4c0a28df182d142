//! From logits to the next token.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// How tokens are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Only the likeliest tokens that make up this share are drawn from.
    pub top_p: f32,
    /// Seed; request `i` of a batch uses `seed + i`.
    pub seed: u64,
}

/// A stream of draws.
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
}

/// Index of the largest value; the first of equals.
pub fn argmax(values: &[f32]) -> usize {
    let start = (0, f32::NEG_INFINITY);
    values.iter().enumerate().fold(start, |best, (i, &x)| if x > best.1 { (i, x) } else { best }).0
}

impl Sampler {
    /// Draws of request `request`.
    pub fn new(sampling: Sampling, request: usize) -> Self {
        Self { sampling, rng: StdRng::seed_from_u64(sampling.seed.wrapping_add(request as u64)) }
    }

    /// The next token.
    pub fn draw(&mut self, logits: &[f32]) -> u32 {
        let best = argmax(logits);
        if self.sampling.temperature <= 0.0 {
            return best as u32;
        }
        let max = logits.get(best).copied().unwrap_or(0.0);
        let weight = |x: f32| f64::from((x - max) / self.sampling.temperature).exp();
        let mut candidates: Vec<(usize, f64)> = logits.iter().map(|&x| weight(x)).enumerate().collect();
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let wanted = total * f64::from(self.sampling.top_p);
        let mut kept = 0.0;
        // The token that reaches the share is kept too, so that one is left at top_p = 0.
        let reaches = |c: &(usize, f64)| {
            kept += c.1;
            kept >= wanted
        };
        let len = candidates.iter().position(reaches).map_or(candidates.len(), |last| last + 1);
        candidates.truncate(len);
        let mut left = self.rng.random::<f64>() * candidates.iter().map(|c| c.1).sum::<f64>();
        for &(token, weight) in &candidates {
            left -= weight;
            if left <= 0.0 {
                return token as u32;
            }
        }
        best as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_largest_and_a_seed_repeats() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        let logits = [0.0, 1.0, 2.0, 0.5];
        let draws = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 0.95, seed }, 0);
            (0..50).map(|_| sampler.draw(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draws(7), draws(7));
        assert!((0..3).any(|i| draws(i).contains(&1)));
        let mut narrow = Sampler::new(Sampling { temperature: 1.0, top_p: 0.0, seed: 1 }, 0);
        assert!((0..20).all(|_| narrow.draw(&logits) == 2));
    }
}
