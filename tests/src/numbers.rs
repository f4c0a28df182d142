//! Random numbers from a seed.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A seeded source of numbers.
#[derive(Debug)]
pub struct Numbers(StdRng);

impl Numbers {
    /// The same seed and stream give the same numbers.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(stream)))
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let (u, v): (f64, f64) = (1.0 - self.0.random::<f64>(), self.0.random());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    /// `n` standard normals.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0.random_range(0..n.max(1))
    }

    /// In `[0, 1)`.
    pub fn unit(&mut self) -> f32 {
        self.0.random()
    }

    /// True with probability `share`.
    pub fn chance(&mut self, share: f64) -> bool {
        self.0.random_bool(share)
    }

    /// Any bits.
    pub fn bits(&mut self) -> u64 {
        self.0.random()
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Shuffles in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
