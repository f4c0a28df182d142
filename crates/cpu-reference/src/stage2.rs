//! Stage 2: partials in the order of their tokens, then the sink, -> out and lse.

use crate::Workspace;
use crate::stage1::Step;
use attn_plan::SoftmaxState;
use kv_quant::{FloatSliceMut, MAX_HEAD_DIM};
use std::ops::Range;

/// Below this many f32 of partials one thread is done before another has its half.
const SERIAL_ELEMENTS: usize = 1 << 13;

/// Merges each query row's partial states and writes the result. Up to `threads` threads share the rows: half of the partials
/// lie in another core's cache, and one that is busy until the end is awake for the next step.
pub(crate) fn run(
    step: &Step<'_>,
    workspace: &Workspace,
    out: FloatSliceMut<'_>,
    lse: Option<&mut [f32]>,
    threads: usize,
) {
    let rows = step.request.batch() * step.rows * step.num_kv_heads;
    let elements = workspace.ml.len() / 2 * step.padded_dim;
    let threads = if elements < SERIAL_ELEMENTS { 1 } else { threads };
    merge(step, workspace, 0..rows, out, lse, threads);
}

/// Rows `rows` of the output, of which `out` and `lse` are these.
fn merge(
    step: &Step<'_>,
    workspace: &Workspace,
    rows: Range<usize>,
    out: FloatSliceMut<'_>,
    lse: Option<&mut [f32]>,
    threads: usize,
) {
    if threads < 2 || rows.len() < 2 {
        return merge_rows(step, workspace, rows, out, lse);
    }
    let middle = rows.start + rows.len() / 2;
    let (front, back) = split_at(out, (middle - rows.start) * step.head_dim);
    let (front_lse, back_lse) = lse.map(|lse| lse.split_at_mut(lse.len().min(middle - rows.start))).unzip();
    rayon::join(
        || merge(step, workspace, rows.start..middle, front, front_lse, threads - threads / 2),
        || merge(step, workspace, middle..rows.end, back, back_lse, threads / 2),
    );
}

/// Elements before and from `middle` on, which is not behind the end.
fn split_at(out: FloatSliceMut<'_>, middle: usize) -> (FloatSliceMut<'_>, FloatSliceMut<'_>) {
    match out {
        FloatSliceMut::F32(out) => {
            let (front, back) = out.split_at_mut(middle);
            (FloatSliceMut::F32(front), FloatSliceMut::F32(back))
        }
        FloatSliceMut::F16(out) => {
            let (front, back) = out.split_at_mut(middle);
            (FloatSliceMut::F16(front), FloatSliceMut::F16(back))
        }
        FloatSliceMut::Bf16(out) => {
            let (front, back) = out.split_at_mut(middle);
            (FloatSliceMut::Bf16(front), FloatSliceMut::Bf16(back))
        }
    }
}

fn merge_rows(
    step: &Step<'_>,
    workspace: &Workspace,
    out_rows: Range<usize>,
    mut out: FloatSliceMut<'_>,
    mut lse: Option<&mut [f32]>,
) {
    let Step { num_kv_heads, gqa_group, rows, head_dim, padded_dim, .. } = *step;
    let num_q_heads = num_kv_heads * gqa_group;
    let q_len = step.request.spec.q_len as usize;
    let partials: &[f32] = bytemuck::cast_slice(&workspace.o);
    let mut merged = [0f32; MAX_HEAD_DIM as usize];
    let Some(merged) = merged.get_mut(..head_dim) else { return };
    for (i, out_row) in out_rows.enumerate() {
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
        out.narrow(i * head_dim, merged);
        if let Some(lse) = lse.as_deref_mut().and_then(|lse| lse.get_mut(i)) {
            *lse = state.lse();
        }
    }
}
