//! Random numbers from a seed.

use cpu_reference::case::Rng;

/// A seeded source of numbers, equal on every machine.
#[derive(Debug)]
pub struct Numbers(Rng);

impl Numbers {
    /// The same seed and stream give the same numbers.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(Rng::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(stream)))
    }

    /// Close to standard normal.
    pub fn normal(&mut self) -> f32 {
        self.0.gaussian()
    }

    /// `n` of them.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.0.below(n as u64) as usize
    }

    /// In `[0, 1)`.
    pub fn unit(&mut self) -> f32 {
        self.0.unit() as f32
    }

    /// True with probability `share`.
    pub fn chance(&mut self, share: f64) -> bool {
        self.0.unit() < share
    }

    /// Any bits.
    pub fn bits(&mut self) -> u64 {
        self.0.bits()
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Shuffles in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        self.0.shuffle(items);
    }
}
