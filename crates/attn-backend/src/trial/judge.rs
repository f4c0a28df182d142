//! Comparison of a step's results with the oracle, element by element.

use super::floats::{Floats, Random};
use super::{Tally, TrialFailure};
use crate::Array;
use attn_plan::{DecodeRequest, DecodeSpec};
use cpu_reference::{Arithmetic, oracle};
use kv_quant::{CacheLayout, CacheView};

/// Elements `tokens * gqa_group * head_dim` that the oracle computes; beyond, a fixed random sample of rows is judged.
const MAX_ORACLE_WORK: u64 = 6 << 20;

/// One query row and kv head of one request, as a problem of its own with `q_len` 1: row `i` of a request of `kv_len`
/// tokens sees what the only row of a request of `kv_len - q_len + i + 1` tokens sees.
struct Unit {
    request: usize,
    row: u32,
    kv_head: u32,
    kv_len: u32,
}

/// Judges out and lse. `cache` is the expected cache, on the host.
#[expect(clippy::too_many_arguments, reason = "one step's inputs and outputs")]
pub(super) fn judge(
    layout: &CacheLayout,
    cache: &CacheView<'_>,
    request: &DecodeRequest<'_>,
    q: &Floats,
    out: &Floats,
    lse: Option<&[f32]>,
    arithmetic: &Arithmetic,
    tally: &mut Tally,
) -> Result<(), TrialFailure> {
    let spec = request.spec;
    let group = spec.gqa_group() as usize;
    let (heads, dim, q_heads) =
        (spec.num_kv_heads as usize, spec.head_dim as usize, spec.num_q_heads as usize);
    let units = units(request);
    let work = |unit: &Unit| u64::from(unit.kv_len.max(1)) * (group * dim) as u64;
    let total: u64 = units.iter().map(work).sum();
    let share = MAX_ORACLE_WORK as f64 / total.max(1) as f64;
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut dense: (usize, (Vec<f64>, Vec<f64>)) = (usize::MAX, Default::default());
    let last = units.len().saturating_sub(1);
    for (i, unit) in units.iter().enumerate() {
        if random.unit() > share && i != 0 && i != last {
            continue;
        }
        if dense.0 != unit.request {
            let gathered = oracle::gather(layout, cache, request, unit.request).map_err(oracle_error)?;
            dense = (unit.request, gathered);
        }
        let head_of = |all: &[f64]| -> Vec<f64> {
            let rows = all.chunks_exact(dim).skip(unit.kv_head as usize).step_by(heads);
            rows.take(unit.kv_len as usize).flatten().copied().collect()
        };
        let (k, v) = (head_of(&dense.1.0), head_of(&dense.1.1));
        let first_head = unit.kv_head as usize * group;
        let first_row = (unit.request * spec.q_len as usize + unit.row as usize) * q_heads + first_head;
        let q: Vec<f64> = (first_row * dim..(first_row + group) * dim).map(|i| q.get(i)).collect();
        let result = oracle::decode(&one_head(spec, first_head, group), unit.kv_len, &q, &k, &v)
            .map_err(oracle_error)?;
        let mut check = |array, element: usize, got: f64, want: f64, bound: f64| {
            let width = if array == Array::Out { dim } else { 1 };
            tally.num_compared += 1;
            if got == want {
                return Ok(()); // also -inf, whose distance to itself is not a number
            }
            let error = (got - want).abs();
            if error <= bound && got.is_finite() {
                tally.worst_share = tally.worst_share.max(error / bound);
                return Ok(());
            }
            Err(TrialFailure::Wrong {
                array,
                request: unit.request,
                kv_len: request.kv_lens.get(unit.request).copied().unwrap_or(0),
                row: unit.row,
                head: (first_head + element / width) as u32,
                channel: (element % width) as u32,
                got,
                want,
                bound,
            })
        };
        for (element, (&want, bound)) in result.out.iter().zip(result.bound(arithmetic)).enumerate() {
            check(Array::Out, element, out.get(first_row * dim + element), want, bound)?;
        }
        let Some(lse) = lse else { continue };
        for (element, (&want, bound)) in result.lse.iter().zip(result.lse_bound(arithmetic)).enumerate() {
            let got = lse.get(first_row + element).copied().map_or(f64::NAN, f64::from);
            check(Array::Lse, element, got, want, bound)?;
        }
    }
    Ok(())
}

fn oracle_error(error: cpu_reference::Error) -> TrialFailure {
    TrialFailure::Error(format!("oracle: {error}"))
}

fn units(request: &DecodeRequest<'_>) -> Vec<Unit> {
    let spec = request.spec;
    let mut units = Vec::new();
    for (request, &kv_len) in request.kv_lens.iter().enumerate() {
        for row in 0..spec.q_len {
            for kv_head in 0..spec.num_kv_heads {
                let kv_len = (kv_len + row + 1).saturating_sub(spec.q_len);
                units.push(Unit { request, row, kv_head, kv_len });
            }
        }
    }
    units
}

/// The spec of one kv head and one query row.
fn one_head(spec: &DecodeSpec, first_head: usize, group: usize) -> DecodeSpec {
    let part = |all: &Option<Vec<f32>>| {
        all.as_ref().map(|all| all.iter().skip(first_head).take(group).copied().collect())
    };
    DecodeSpec {
        num_q_heads: group as u32,
        num_kv_heads: 1,
        q_len: 1,
        alibi_slopes: part(&spec.alibi_slopes),
        sinks: part(&spec.sinks),
        ..spec.clone()
    }
}
