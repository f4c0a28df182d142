//! Stage 2: partials in the order of their tokens, then the sink, -> out and lse.

use crate::Workspace;
use crate::stage1::Step;
use attn_plan::SoftmaxState;
use kv_quant::{FloatSliceMut, MAX_HEAD_DIM};

/// Merges each query row's partial states and writes the result.
pub(crate) fn run(
    step: &Step<'_>,
    workspace: &Workspace,
    out: &mut FloatSliceMut<'_>,
    mut lse: Option<&mut [f32]>,
) {
    let Step { num_kv_heads, gqa_group, rows, head_dim, padded_dim, .. } = *step;
    let num_q_heads = num_kv_heads * gqa_group;
    let q_len = step.request.spec.q_len as usize;
    let partials: &[f32] = bytemuck::cast_slice(&workspace.o);
    let mut merged = [0f32; MAX_HEAD_DIM as usize];
    let Some(merged) = merged.get_mut(..head_dim) else { return };
    for out_row in 0..step.request.batch() * q_len * num_q_heads {
        let (request_idx, q_idx, head) =
            (out_row / num_q_heads / q_len, out_row / num_q_heads % q_len, out_row % num_q_heads);
        let (kv_head, row) = (head / gqa_group, q_idx * gqa_group + head % gqa_group);
        let [first, end] =
            [request_idx, request_idx + 1].map(|i| workspace.request_items.get(i).copied().unwrap_or(0));
        let mut state = SoftmaxState::EMPTY;
        merged.fill(0.0);
        for item_idx in first..end {
            let at = (item_idx * num_kv_heads + kv_head) * rows + row;
            let o = partials.get(at * padded_dim..at * padded_dim + head_dim).unwrap_or_default();
            if let Some([m, l]) = workspace.ml.get(at * 2..at * 2 + 2) {
                state.merge_row(merged, SoftmaxState { m: *m, l: *l }, o);
            }
        }
        if let Some(&sink) = step.request.spec.sinks.as_ref().and_then(|sinks| sinks.get(head)) {
            let (a, _) = state.merge(SoftmaxState::single(sink));
            merged.iter_mut().for_each(|x| *x *= a);
        }
        let factor = state.normalizer();
        merged.iter_mut().for_each(|x| *x *= factor);
        out.narrow(out_row * head_dim, merged);
        if let Some(lse) = lse.as_deref_mut().and_then(|lse| lse.get_mut(out_row)) {
            *lse = state.lse();
        }
    }
}
