//! Stage 1: q + cache + work item -> partial `(o, m, l)` in f32.
//!
//! The unit of work is one item for one kv head; its rows are the `q_len * gqa_group` query rows that read that head.

use crate::Workspace;
use attn_plan::{DecodeRequest, SoftmaxState, SplitPlan, WorkItem};
use kv_quant::{CacheLayout, CacheView, FloatSlice, Side};
use rayon::prelude::*;

/// Tokens between two looks at the running maximum.
pub(crate) const TILE_LEN: u32 = 64;
/// Lanes of the narrowest instance: partial sums of a dot product that run side by side.
pub(crate) const MIN_LANES: usize = 1;

/// Sizes that every unit of a step shares.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub num_kv_heads: usize,
    pub gqa_group: usize,
    /// Query rows of a kv head: `q_len * gqa_group`, q_len outer.
    pub rows: usize,
    pub head_dim: usize,
}

impl Shape {
    pub(crate) fn of(request: &DecodeRequest<'_>) -> Self {
        let spec = request.spec;
        let gqa_group = spec.gqa_group() as usize;
        Self {
            num_kv_heads: spec.num_kv_heads as usize,
            gqa_group,
            rows: spec.q_len as usize * gqa_group,
            head_dim: spec.head_dim as usize,
        }
    }
}

/// Fills the workspace's partial states for every item and kv head.
pub(crate) fn run(
    layout: &CacheLayout,
    cache: CacheView<'_>,
    request: &DecodeRequest<'_>,
    plan: &SplitPlan,
    q: FloatSlice<'_>,
    workspace: &mut Workspace,
) {
    let shape = Shape::of(request);
    let Shape { num_kv_heads, gqa_group, rows, head_dim } = shape;
    let batch = request.batch();
    let num_units = plan.items().len() * num_kv_heads;
    workspace.q.resize(batch * num_kv_heads * rows * head_dim, 0.0);
    workspace.o.resize(num_units * rows * head_dim, 0.0);
    workspace.ml.resize(num_units * rows * 2, 0.0);
    workspace.request_items.clear();
    for (item_idx, item) in plan.items().iter().enumerate() {
        while workspace.request_items.len() <= item.request_idx as usize {
            workspace.request_items.push(item_idx);
        }
    }
    workspace.request_items.resize(batch + 1, plan.items().len());
    for (unit, q_unit) in workspace.q.chunks_exact_mut(rows * head_dim).enumerate() {
        let (request_idx, kv_head) = (unit / num_kv_heads, unit % num_kv_heads);
        for (q_idx, rows) in q_unit.chunks_exact_mut(gqa_group * head_dim).enumerate() {
            let q_len = request.spec.q_len as usize;
            q.widen(((request_idx * q_len + q_idx) * num_kv_heads + kv_head) * gqa_group * head_dim, rows);
        }
    }
    let q = &workspace.q;
    let units = workspace.o.par_chunks_mut(rows * head_dim).zip(workspace.ml.par_chunks_mut(rows * 2));
    units.enumerate().for_each(|(unit, (o, ml))| {
        let (item_idx, kv_head) = (unit / num_kv_heads, unit % num_kv_heads);
        let Some(item) = plan.items().get(item_idx) else { return };
        let first = (item.request_idx as usize * num_kv_heads + kv_head) * rows * head_dim;
        let q = q.get(first..first + rows * head_dim).unwrap_or_default();
        attend(layout, cache, request, shape, item, kv_head as u32, q, o, ml);
    });
}

fn attend(
    layout: &CacheLayout,
    cache: CacheView<'_>,
    request: &DecodeRequest<'_>,
    shape: Shape,
    item: &WorkItem,
    kv_head: u32,
    q: &[f32],
    o: &mut [f32],
    ml: &mut [f32],
) {
    let Shape { gqa_group, head_dim, .. } = shape;
    let spec = request.spec;
    let kv_len = request.kv_lens.get(item.request_idx as usize).copied().unwrap_or(0);
    let (mut k, mut v) = (vec![0f32; head_dim], vec![0f32; head_dim]);
    o.fill(0.0);
    for ml in ml.chunks_exact_mut(2) {
        ml.copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
    }
    for t in item.token_start..item.token_end {
        let slot =
            request.page_table.slot(item.request_idx as usize, t, layout.page_len()).unwrap_or(u64::MAX);
        for (side, x) in [(Side::K, &mut k), (Side::V, &mut v)] {
            if kv_quant::dequantize_row(layout, &cache, side, slot, kv_head, x).is_err() {
                x.fill(0.0);
            }
        }
        for (row, ((q, o), ml)) in
            q.chunks_exact(head_dim).zip(o.chunks_exact_mut(head_dim)).zip(ml.chunks_exact_mut(2)).enumerate()
        {
            let (q_idx, head) = ((row / gqa_group) as u32, kv_head as usize * gqa_group + row % gqa_group);
            if !spec.visible(kv_len, q_idx).contains(&t) {
                continue;
            }
            let mut s = spec.softmax_scale * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f32>();
            if let Some(cap) = spec.soft_cap {
                s = cap * (s / cap).tanh();
            }
            if let Some(&slope) = spec.alibi_slopes.as_ref().and_then(|slopes| slopes.get(head)) {
                let position = i64::from(kv_len) - i64::from(spec.q_len) + i64::from(q_idx);
                s += slope * (i64::from(t) - position) as f32;
            }
            if let [m, l] = ml {
                let mut state = SoftmaxState { m: *m, l: *l };
                state.merge_row(o, SoftmaxState::single(s), &v);
                (*m, *l) = (state.m, state.l);
            }
        }
    }
}
