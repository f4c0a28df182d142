//! Which steps are measured.

use super::drive::place_of;
use crate::bench::case::Case;
use crate::bench::inputs::log_normal_lens;
use crate::bench::suites;
use attn_tune::RunKey;
use cpu_reference::case::Rng;
use kv_quant::LayoutKind;
use std::collections::HashSet;

/// Cache bytes of a step beyond which it is left to its shorter neighbours: the table of pages rotates besides.
const MOST_BYTES: u64 = 12 << 30;
/// Deviation of the logarithm of ragged lengths: the longest is tens of times the median.
const RAGGED_SIGMA: f64 = 1.4;

const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const LENGTHS: [u32; 9] = [512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// How rows lie in the grid: pages in the native layout, single slots in LightLLM's buffers.
const LAYOUTS: [(LayoutKind, u32); 2] = [(LayoutKind::Native, 16), (LayoutKind::LightLlm, 1)];
/// And beside them for the shape that most models have.
const MORE_LAYOUTS: [(LayoutKind, u32); 2] = [(LayoutKind::Native, 1), (LayoutKind::Hnd, 16)];
/// That shape: query heads of a kv head, head_dim, group length.
const MAIN_SHAPE: (u32, u32, u32) = (4, 128, 8);
/// Its steps come before the others' until none is farther than this from a measured one, in octaves.
const MAIN_SPACING: f32 = 0.75;

/// What is varied.
#[derive(Clone, Debug)]
pub struct Grid {
    pub batches: Vec<usize>,
    pub lengths: Vec<u32>,
    pub gqa_groups: Vec<u32>,
    pub head_dims: Vec<u32>,
    pub group_lens: Vec<u32>,
    pub layouts: Vec<(LayoutKind, u32)>,
    pub ragged: bool,
    /// Whether the benchmark's steps come first, and after them the main shape's.
    pub with_suites: bool,
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
            layouts: LAYOUTS.to_vec(),
            ragged: true,
            with_suites: true,
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
            with_suites: false,
            ..Self::full()
        }
    }

    /// The steps in an order that may be broken off anywhere: those of the benchmark, the main shape's in every layout, then all.
    pub fn steps(&self) -> Vec<Case> {
        let mut steps = Vec::new();
        let mut seen = HashSet::new();
        // Masks that a profile does not tell apart share a step, and are not where two agree.
        let mut add = |steps: &mut Vec<Case>, more: Vec<Case>| {
            // What no cache can hold is refused by who measures.
            steps.extend(
                more.into_iter().filter(|case| place_of(case).map_or(true, |place| seen.insert(place))),
            );
        };
        if self.with_suites {
            add(&mut steps, suites::steps().into_iter().filter(|case| self.has(case)).collect());
            let (gqa_group, head_dim, group_len) = MAIN_SHAPE;
            let only = |value: u32, of: &[u32]| if of.contains(&value) { vec![value] } else { Vec::new() };
            let main = Self {
                gqa_groups: only(gqa_group, &self.gqa_groups),
                head_dims: only(head_dim, &self.head_dims),
                group_lens: only(group_len, &self.group_lens),
                layouts: LAYOUTS.into_iter().chain(MORE_LAYOUTS).collect(),
                ..self.clone()
            };
            let more = main.spread(&steps, MAIN_SPACING);
            add(&mut steps, more);
        }
        let more = self.spread(&steps, 0.0);
        add(&mut steps, more);
        steps
    }

    /// Whether a step of the benchmark is of a shape that was asked for.
    fn has(&self, case: &Case) -> bool {
        let full = Self::full();
        // Shapes outside the grid go with the whole of it alone.
        let fits = |value: u32, of: &[u32], all: &[u32]| of.contains(&value) || of == all;
        fits(case.spec.head_dim, &self.head_dims, &full.head_dims)
            && fits(case.group_len, &self.group_lens, &full.group_lens)
            && fits(case.spec.gqa_group(), &self.gqa_groups, &full.gqa_groups)
    }

    /// First a step of each shape, then another of each, each as far from those before it and from the `known` ones as the grid has
    /// one, and farther than `spacing`. What was measured is spread evenly at any time.
    fn spread(&self, known: &[Case], spacing: f32) -> Vec<Case> {
        let shapes = self.shapes();
        let key_of = |case: &Case| place_of(case).ok().map(|(key, _)| key);
        let order = |case: &Case| {
            let mut batches = self.batches_of(case.spec.num_kv_heads, case.spec.head_dim, case.group_len);
            // Each cache goes its own way, so that together they see every size early. Not each head count: the
            // copy-only reader's times serve all that share a cache.
            let cache = case.spec.num_kv_heads
                + 16 * case.page_len
                + 512 * case.group_len
                + (case.spec.head_dim << 17);
            Rng::new(u64::from(cache)).shuffle(&mut batches);
            let key = key_of(case);
            let known: Vec<RunKey> = known
                .iter()
                .filter_map(|case| place_of(case).ok())
                .filter(|(known, _)| Some(*known) == key)
                .map(|(_, run)| run)
                .collect();
            far_apart(batches, case.spec.num_kv_heads, &known, spacing)
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
                for &(layout, page_len) in &self.layouts {
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

/// The batches, each as far as can be from all before it and from what is known, while that is farther than `spacing`.
fn far_apart(batches: Vec<Vec<u32>>, num_kv_heads: u32, known: &[RunKey], spacing: f32) -> Vec<Vec<u32>> {
    let runs: Vec<RunKey> =
        batches.iter().map(|kv_lens| RunKey::of(kv_lens.iter().copied(), num_kv_heads)).collect();
    // Of each batch, how near it is to those in order.
    let near = |run: &RunKey| known.iter().map(|known| run.distance(known)).fold(f32::INFINITY, f32::min);
    let mut near: Vec<f32> = runs.iter().map(near).collect();
    let mut order: Vec<usize> = Vec::with_capacity(runs.len());
    let farthest_of = |near: &[f32]| (0..runs.len()).max_by(|a, b| near[*a].total_cmp(&near[*b]));
    // Where nothing is known chance says where to begin.
    let mut next = if known.is_empty() { (0..runs.len()).next() } else { farthest_of(&near) };
    while let Some(farthest) = next {
        if near[farthest] < spacing || near[farthest] == f32::NEG_INFINITY {
            break;
        }
        order.push(farthest);
        for (near, run) in near.iter_mut().zip(&runs) {
            *near = near.min(run.distance(&runs[farthest]));
        }
        near[farthest] = f32::NEG_INFINITY;
        next = farthest_of(&near);
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
        let places: HashSet<_> = steps.iter().map(|case| place_of(case).unwrap()).collect();
        assert_eq!(places.len(), steps.len());
        assert!(steps.len() > 5000, "{}", steps.len());
        let most = steps.iter().map(|case| case.kv_lens.iter().map(|&len| u64::from(len)).sum::<u64>());
        assert!(most.max() <= Some(MOST_BYTES / 64));
        assert!((20..200).contains(&Grid::quick().steps().len()));
    }

    #[test]
    fn the_benchmarks_steps_come_first_and_then_the_main_shape() {
        let steps = Grid::full().steps();
        let places: Vec<_> = steps.iter().map(|case| place_of(case).unwrap()).collect();
        let of_suites: HashSet<_> = suites::steps().iter().map(|case| place_of(case).unwrap()).collect();
        assert!((120..200).contains(&of_suites.len()), "{}", of_suites.len());
        let (first, rest) = places.split_at(of_suites.len());
        assert_eq!(first.iter().copied().collect::<HashSet<_>>(), of_suites);
        // Every layout of the main shape, until each of its steps has a measured neighbour.
        let is_main =
            |case: &&Case| (case.spec.gqa_group(), case.spec.head_dim, case.group_len) == MAIN_SHAPE;
        let main: Vec<&Case> = steps[first.len()..].iter().take_while(is_main).collect();
        let layouts: HashSet<_> = main.iter().map(|case| (case.layout.to_string(), case.page_len)).collect();
        assert!(layouts.len() == 4 && main.len() > 100, "{layouts:?}, {}", main.len());
        let done = &places[..first.len() + main.len()];
        for (key, run) in rest {
            let of_key = done.iter().filter(|(known, _)| known == key);
            let nearest = of_key.map(|(_, known)| known.distance(run)).fold(f32::INFINITY, f32::min);
            let is_main = key.to_string().starts_with("d128 k8 v8 f16 gqa4 q1 ");
            assert!(!is_main || nearest < MAIN_SPACING, "{run}: {nearest}");
        }
        // Who asks for one head_dim gets that alone.
        let of_64 = Grid { head_dims: vec![64], ..Grid::full() }.steps();
        assert!(of_64.iter().all(|case| case.spec.head_dim == 64));
        assert!(of_64.len() < steps.len() / 2 && of_64[0].kv_lens == [16_384; 32]);
    }

    /// Broken off after a twelfth, every value of every axis has its share, and what was left has a neighbour.
    #[test]
    fn a_run_that_is_broken_off_is_spread_over_the_grid() {
        let steps = Grid { with_suites: false, ..Grid::full() }.steps();
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
