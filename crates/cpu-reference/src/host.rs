//! The CPU backend's entry: one decode step over a plan.

use crate::{Error, Workspace, stage1, stage2};
use attn_plan::{DecodeRequest, SplitPlan};
use kv_quant::{CacheLayout, CacheView, FloatSlice, FloatSliceMut};

/// One decode step. `q` and `out` are `[batch, q_len, num_q_heads, head_dim]`; `lse`, natural log, is
/// `[batch, q_len, num_q_heads]`.
///
/// The request must have passed [`DecodeRequest::check`] against `layout`, and `plan` must be made for its spec and
/// lengths. What of this is cheap to check is checked again; a page index out of range reads as a row of zeros.
/// The bits of the result depend on the plan alone, not on threads or timing.
///
/// # Errors
/// Arrays of other lengths or types than the request's, or a plan for another batch. Nothing is written then.
pub fn decode(
    layout: &CacheLayout,
    cache: CacheView<'_>,
    request: &DecodeRequest<'_>,
    plan: &SplitPlan,
    q: FloatSlice<'_>,
    out: FloatSliceMut<'_>,
    lse: Option<&mut [f32]>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    check(layout, request, plan, q, &out, lse.as_deref())?;
    let kernel = workspace.kernel.clone()?;
    let step = stage1::Step::new(layout, cache, request, plan, workspace.dot)?;
    let threads = stage1::run(kernel, &step, plan, q, workspace);
    stage2::run(&step, workspace, out, lse, threads);
    Ok(())
}

fn check(
    layout: &CacheLayout,
    request: &DecodeRequest<'_>,
    plan: &SplitPlan,
    q: FloatSlice<'_>,
    out: &FloatSliceMut<'_>,
    lse: Option<&[f32]>,
) -> Result<(), Error> {
    let spec = request.spec;
    spec.check()?;
    let format = layout.format();
    for (what, spec, cache) in [
        ("num_kv_heads", spec.num_kv_heads, format.num_kv_heads()),
        ("head_dim", spec.head_dim, format.head_dim()),
    ] {
        if spec != cache {
            return Err(attn_plan::Error::CacheMismatch { what, spec, cache }.into());
        }
    }
    let want = spec.q_elements(request.batch());
    for (what, got) in [("q", q.len()), ("out", out.len())] {
        if got != want {
            return Err(Error::Len { what, got, want });
        }
    }
    if let Some(lse) = lse
        && lse.len() != spec.lse_elements(request.batch())
    {
        return Err(Error::Len { what: "lse", got: lse.len(), want: spec.lse_elements(request.batch()) });
    }
    for (what, got, want) in [("q", q.float_type(), spec.q_type), ("out", out.float_type(), spec.out_type)] {
        if got != want {
            return Err(Error::FloatType { what, got, want });
        }
    }
    if plan.batch() != request.batch() {
        return Err(Error::PlanBatch { plan: plan.batch(), batch: request.batch() });
    }
    for item in plan.items() {
        let request_idx = item.request_idx as usize;
        let kv_len = request.kv_lens.get(request_idx).copied().unwrap_or(0);
        if item.token_end > kv_len || item.token_start > item.token_end || request_idx >= request.batch() {
            return Err(Error::PlanRange { request: request_idx, kv_len, token_end: item.token_end });
        }
    }
    Ok(())
}
