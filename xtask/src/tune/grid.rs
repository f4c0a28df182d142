//! Which steps are measured.

use crate::bench::gpu::{Case, log_normal_lens};
use kv_quant::LayoutKind;

/// Cache bytes of a step beyond which it is left to its shorter neighbours: the table of pages rotates besides.
const MOST_BYTES: u64 = 24 << 30;
/// Deviation of the logarithm of ragged lengths: the longest is tens of times the median.
const RAGGED_SIGMA: f64 = 1.4;

const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const LENGTHS: [u32; 9] = [512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// What is varied.
#[derive(Clone, Debug)]
pub struct Grid {
    pub batches: Vec<usize>,
    pub lengths: Vec<u32>,
    pub gqa_groups: Vec<u32>,
    pub head_dims: Vec<u32>,
    pub group_lens: Vec<u32>,
    pub page_lens: Vec<u32>,
    pub ragged: bool,
}

impl Grid {
    /// Everything that the shipped profiles cover.
    pub fn full() -> Self {
        Self {
            batches: BATCHES.to_vec(),
            lengths: LENGTHS.to_vec(),
            gqa_groups: vec![4, 1, 7, 8],
            head_dims: vec![128, 64, 256],
            group_lens: vec![8, 32, 128],
            page_lens: vec![16, 1],
            ragged: true,
        }
    }

    /// A few minutes' worth: one model's shape, every second size.
    pub fn quick() -> Self {
        Self {
            batches: vec![1, 4, 16, 64],
            lengths: vec![1024, 4096, 16_384],
            gqa_groups: vec![4],
            head_dims: vec![128],
            group_lens: vec![8],
            ..Self::full()
        }
    }

    /// The steps, those of one cache layout together, small ones first.
    pub fn steps(&self) -> Vec<Case> {
        let mut steps = Vec::new();
        for &head_dim in &self.head_dims {
            for &group_len in self.group_lens.iter().filter(|group_len| **group_len <= head_dim) {
                for &page_len in &self.page_lens {
                    // Single slots are LightLLM's buffers; pages are the native layout.
                    let layout = if page_len == 1 { LayoutKind::LightLlm } else { LayoutKind::Native };
                    for &gqa_group in &self.gqa_groups {
                        let num_kv_heads = if gqa_group == 7 { 4 } else { 8 };
                        let heads = (gqa_group * num_kv_heads, num_kv_heads, head_dim);
                        let case = Case { group_len, ..Case::new(heads, 1, 64, layout, page_len) };
                        let batches = self.batches_of(num_kv_heads, head_dim, group_len);
                        steps.extend(batches.into_iter().map(|kv_lens| Case { kv_lens, ..case.clone() }));
                    }
                }
            }
        }
        steps
    }

    fn batches_of(&self, num_kv_heads: u32, head_dim: u32, group_len: u32) -> Vec<Vec<u32>> {
        let token_bytes = u64::from(2 * num_kv_heads * (head_dim + 2 * head_dim / group_len));
        let mut batches = Vec::new();
        for &batch in &self.batches {
            for &length in &self.lengths {
                if batch as u64 * u64::from(length) * token_bytes > MOST_BYTES {
                    continue;
                }
                batches.push(vec![length; batch]);
                if self.ragged && batch >= 4 {
                    // The median that gives this mean.
                    let median = f64::from(length) * (-RAGGED_SIGMA * RAGGED_SIGMA / 2.0).exp();
                    batches.push(log_normal_lens(batch, median, RAGGED_SIGMA, 7));
                }
            }
        }
        batches.sort_by_key(|kv_lens| kv_lens.iter().map(|&kv_len| u64::from(kv_len)).sum::<u64>());
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_covers_what_it_names_once() {
        let steps = Grid::full().steps();
        let mut names: Vec<String> =
            steps.iter().map(|case| format!("{} {:?}", case.name(), case.kv_lens)).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), steps.len());
        assert!(steps.len() > 5000, "{}", steps.len());
        let most = steps.iter().map(|case| case.kv_lens.iter().map(|&len| u64::from(len)).sum::<u64>());
        assert!(most.max() <= Some(MOST_BYTES / 64));
        assert!((20..200).contains(&Grid::quick().steps().len()));
    }
}
