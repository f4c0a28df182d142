//! What a backend can be asked: the generator's choices, from its capability.

use super::Case;
use attn_backend::Capability;
use kv_quant::{FloatType, GROUP_LENS, LayoutKind, MAX_HEAD_DIM, MIN_HEAD_DIM, ScaleType};
use std::ops::RangeInclusive;

/// The generator's choices.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Head dimensions with their weight.
    pub head_dims: Vec<(u32, u32)>,
    /// Group lengths; empty: any, the whole head included.
    pub group_lens: Vec<u32>,
    /// Types of scales.
    pub scale_types: Vec<ScaleType>,
    /// Types of q.
    pub q_types: Vec<FloatType>,
    /// Types of the output.
    pub out_types: Vec<FloatType>,
    /// Layouts.
    pub layouts: Vec<LayoutKind>,
    /// Slots of a page.
    pub page_lens: Vec<u32>,
    /// GQA groups.
    pub gqa_groups: Vec<u32>,
    /// New tokens.
    pub q_lens: RangeInclusive<u32>,
    /// Tokens of a tile: lengths gather around its multiples.
    pub tile_len: u32,
    /// Sliding window, soft-cap, ALiBi, sinks, lse, batch invariance.
    pub features: [bool; 6],
}

impl Profile {
    /// Everything that `capability` offers.
    pub fn new(capability: &Capability, tile_len: u32) -> Self {
        let common = [16, 32, 64, 80, 96, 128, 192, 256].map(|dim| (dim, 4));
        let dims: Vec<(u32, u32)> = if capability.head_dims.is_empty() {
            let rest = (MIN_HEAD_DIM..=MAX_HEAD_DIM).map(|dim| (dim, if dim % 8 == 0 { 1 } else { 0 }));
            let odd = [17, 20, 33, 65, 100, 127, 130, 255].map(|dim| (dim, 1));
            common.into_iter().chain(rest.filter(|(_, weight)| *weight > 0)).chain(odd).collect()
        } else {
            capability.head_dims.iter().map(|&dim| (dim, 1)).collect()
        };
        let within = |all: &[u32], range: &RangeInclusive<u32>| -> Vec<u32> {
            all.iter().copied().filter(|x| range.contains(x)).collect()
        };
        Self {
            head_dims: dims,
            group_lens: capability.group_lens.clone(),
            scale_types: capability.scale_types.clone(),
            q_types: capability.q_types.clone(),
            out_types: capability.out_types.clone(),
            layouts: capability.layouts.clone(),
            page_lens: within(&[1, 2, 3, 5, 8, 16, 32, 64, 100, 128, 256], &capability.page_lens),
            gqa_groups: within(&[1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 71], &capability.gqa_groups),
            q_lens: *capability.q_lens.start()..=(*capability.q_lens.end()).min(8),
            tile_len,
            features: [
                capability.window,
                capability.soft_cap,
                capability.alibi,
                capability.sinks,
                capability.lse,
                capability.batch_invariant,
            ],
        }
    }

    /// The page lengths that a backend takes: where it refuses some, no case is spent on them.
    pub fn with_page_lens(mut self, takes: impl Fn(u32) -> bool) -> Self {
        self.page_lens.retain(|page_len| takes(*page_len));
        self
    }

    /// Group lengths of a head dimension.
    pub fn groups_of(&self, head_dim: u32) -> Vec<u32> {
        let mut groups: Vec<u32> =
            GROUP_LENS.into_iter().filter(|group| head_dim.is_multiple_of(*group)).collect();
        if !groups.contains(&head_dim) {
            groups.push(head_dim);
        }
        groups.retain(|group| self.group_lens.is_empty() || self.group_lens.contains(group));
        groups
    }

    /// Halves the longest requests, then drops requests, until the case costs no more than the budget.
    pub fn fit(&self, case: &mut Case, budget: u64) {
        while case.cost() > budget {
            let batch = case.kv_lens.len();
            match case.kv_lens.iter_mut().max() {
                Some(longest) if *longest > 4 * self.tile_len => *longest = *longest / 2 + 1,
                _ if batch > 1 => {
                    case.kv_lens.pop();
                }
                Some(longest) if *longest > 8 => *longest = *longest / 2 + 1,
                _ => break,
            }
        }
    }
}
