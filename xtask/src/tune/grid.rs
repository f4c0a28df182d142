//! Which steps are measured.

use crate::bench::case::Case;
use crate::bench::inputs::log_normal_lens;
use attn_tune::RunKey;
use cpu_reference::case::Rng;
use kv_quant::LayoutKind;

/// Cache bytes of a step beyond which it is left to its shorter neighbours: the table of pages rotates besides.
const MOST_BYTES: u64 = 12 << 30;
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

    /// The steps in an order that may be broken off anywhere: first one of each shape, then another of each, each as far
    /// from those before it as the grid has one. What was measured is spread evenly at any time.
    pub fn steps(&self) -> Vec<Case> {
        let shapes = self.shapes();
        let order = |case: &Case| {
            let mut batches = self.batches_of(case.spec.num_kv_heads, case.spec.head_dim, case.group_len);
            // Each cache goes its own way, so that together they see every size early. Not each head count: the
            // copy-only reader's times serve all that share a cache.
            let cache = case.spec.num_kv_heads
                + 16 * case.page_len
                + 512 * case.group_len
                + (case.spec.head_dim << 17);
            Rng::new(u64::from(cache)).shuffle(&mut batches);
            far_apart(batches, case.spec.num_kv_heads)
        };
        let orders: Vec<Vec<Vec<u32>>> = shapes.iter().map(order).collect();
        let rounds = orders.iter().map(Vec::len).max().unwrap_or(0);
        let mut steps = Vec::new();
        for round in 0..rounds {
            for (case, order) in shapes.iter().zip(&orders) {
                let kv_lens = order.get(round).cloned();
                steps.extend(kv_lens.map(|kv_lens| Case { kv_lens, ..case.clone() }));
            }
        }
        steps
    }

    /// Everything but the lengths; those that share a cache stand together.
    fn shapes(&self) -> Vec<Case> {
        let mut shapes = Vec::new();
        for &head_dim in &self.head_dims {
            for &group_len in self.group_lens.iter().filter(|group_len| **group_len <= head_dim) {
                for &page_len in &self.page_lens {
                    // Single slots are LightLLM's buffers; pages are the native layout.
                    let layout = if page_len == 1 { LayoutKind::LightLlm } else { LayoutKind::Native };
                    for &gqa_group in &self.gqa_groups {
                        let num_kv_heads = if gqa_group == 7 { 4 } else { 8 };
                        let heads = (gqa_group * num_kv_heads, num_kv_heads, head_dim);
                        shapes.push(Case { group_len, ..Case::new(heads, 1, 64, layout, page_len) });
                    }
                }
            }
        }
        shapes
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

/// The batches, each as far as can be from all before it.
fn far_apart(batches: Vec<Vec<u32>>, num_kv_heads: u32) -> Vec<Vec<u32>> {
    let runs: Vec<RunKey> =
        batches.iter().map(|kv_lens| RunKey::of(kv_lens.iter().copied(), num_kv_heads)).collect();
    let mut order: Vec<usize> = (0..runs.len()).take(1).collect();
    // Of each batch, how near it is to those in order.
    let mut near = vec![f32::INFINITY; runs.len()];
    while let Some(&last) = order.last() {
        for (near, run) in near.iter_mut().zip(&runs) {
            *near = near.min(run.distance(&runs[last]));
        }
        near[last] = f32::NEG_INFINITY;
        let farthest = (0..runs.len()).max_by(|a, b| near[*a].total_cmp(&near[*b]));
        let Some(farthest) = farthest.filter(|index| near[*index] > f32::NEG_INFINITY) else { break };
        order.push(farthest);
    }
    let mut batches: Vec<Option<Vec<u32>>> = batches.into_iter().map(Some).collect();
    order.into_iter().filter_map(|index| batches[index].take()).collect()
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

    /// Broken off after a twelfth, every value of every axis has its share, and what was left has a neighbour.
    #[test]
    fn a_run_that_is_broken_off_is_spread_over_the_grid() {
        let steps = Grid::full().steps();
        let (done, left) = steps.split_at(steps.len() / 12);
        type Axis = fn(&Case) -> u32;
        let axes: [(&str, Axis); 7] = [
            ("batch", |case| case.kv_lens.len() as u32),
            ("length", |case| case.kv_lens.iter().max().map_or(0, |most| most.ilog2())),
            ("gqa", |case| case.spec.gqa_group()),
            ("head_dim", |case| case.spec.head_dim),
            ("group", |case| case.group_len),
            ("page", |case| case.page_len),
            ("ragged", |case| u32::from(case.kv_lens.iter().any(|len| *len != case.kv_lens[0]))),
        ];
        for (name, axis) in axes {
            let share = |cases: &[Case], value: u32| {
                cases.iter().filter(|case| axis(case) == value).count() as f64 / cases.len() as f64
            };
            let mut values: Vec<u32> = steps.iter().map(axis).collect();
            values.sort_unstable();
            values.dedup();
            for value in values.into_iter().filter(|value| share(&steps, *value) > 0.05) {
                let (done, all) = (share(done, value), share(&steps, value));
                assert!(done > 0.3 * all && done < 3.0 * all, "{name} {value}: {done:.3} of {all:.3}");
            }
        }
        let far = left.iter().filter(|case| {
            let run = RunKey::of(case.kv_lens.iter().copied(), case.spec.num_kv_heads);
            let is_near = |known: &Case| {
                (known.spec.gqa_group(), known.spec.head_dim, known.group_len, known.page_len)
                    == (case.spec.gqa_group(), case.spec.head_dim, case.group_len, case.page_len)
                    && RunKey::of(known.kv_lens.iter().copied(), known.spec.num_kv_heads).distance(&run)
                        <= attn_tune::MAX_DISTANCE
            };
            !done.iter().any(is_near)
        });
        let far = far.count() as f64 / left.len() as f64;
        assert!(far < 0.05, "{far}");
    }
}
