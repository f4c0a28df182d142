//! One layer at one group length, as an engine would run it: append, plan, decode, token by token.

use super::fixture::{Fixture, Layer};
use attn_backend::{Selection, Session, SessionOptions};
use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitPlan};
use cpu_reference::oracle;
use kv_quant::{
    AppendSlots, CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, LayoutKind,
    PagePool, ScaleType,
};
use std::time::{Duration, Instant};

/// Slots of a page, except in LightLLM's buffers, where a page is one slot.
const PAGE_LEN: u32 = 16;

/// What a step asks: f16 in and, so that the attention's own error shows, f32 out.
pub fn spec(fixture: &Fixture) -> DecodeSpec {
    DecodeSpec {
        softmax_scale: fixture.softmax_scale,
        out_type: FloatType::F32,
        ..DecodeSpec::new(fixture.num_q_heads, fixture.num_kv_heads, fixture.head_dim)
    }
}

/// A cache that holds the whole text.
pub fn layout(fixture: &Fixture, kind: LayoutKind, group_len: u32) -> Result<CacheLayout, kv_quant::Error> {
    let format =
        CacheFormat::new(fixture.num_kv_heads, fixture.head_dim, group_len, group_len, ScaleType::F16)?;
    let num_tokens = fixture.num_tokens as u64;
    let num_pages = num_tokens.div_ceil(u64::from(PAGE_LEN));
    match kind {
        LayoutKind::LightLlm => CacheLayout::lightllm(format, num_tokens),
        LayoutKind::Nhd => CacheLayout::nhd(format, num_pages, PAGE_LEN),
        LayoutKind::Native => CacheLayout::native(format, num_pages, PAGE_LEN),
        LayoutKind::Hnd | LayoutKind::Custom => CacheLayout::hnd(format, num_pages, PAGE_LEN),
    }
}

/// What the steps gave.
pub struct Decoded {
    /// `[num_steps, num_q_heads, head_dim]`.
    pub out: Vec<f32>,
    /// The cache as it lay on the backend after the last step.
    pub cache: CacheBuffers,
    /// Its page table.
    pub pages: Vec<i32>,
    /// How the last step, the longest, was cut.
    pub plan: SplitPlan,
    /// Append, plan and decode of each step.
    pub steps: Vec<Duration>,
}

/// Fills the cache up to the first query's position, then decodes one position at a time.
pub fn decode(
    fixture: &Fixture,
    layer: &Layer,
    selection: &Selection,
    mut after_step: impl FnMut(),
) -> anyhow::Result<Decoded> {
    let mut session = Session::open(selection, SessionOptions::default())?;
    let layout = session.layout().clone();
    let mut pool = PagePool::for_layout(&layout);
    let mut append = AppendSlots::default();
    let sequence = pool.allocate();
    let (kv_row, q_row) = (fixture.kv_row(), fixture.q_row());
    let first_step = fixture.num_tokens - fixture.num_steps;

    let (k_prefix, k_rest) = layer.k.split_at(first_step * kv_row);
    let (v_prefix, v_rest) = layer.v.split_at(first_step * kv_row);
    pool.append(sequence, first_step as u32, &mut append)?;
    session.append(FloatSlice::F16(k_prefix), FloatSlice::F16(v_prefix), append.slots())?;

    let mut out = vec![0f32; layer.q.len()];
    let mut steps = Vec::new();
    let tokens = k_rest.chunks_exact(kv_row).zip(v_rest.chunks_exact(kv_row));
    let queries = layer.q.chunks_exact(q_row).zip(out.chunks_exact_mut(q_row));
    for ((k, v), (q, out)) in tokens.zip(queries) {
        let start = Instant::now();
        pool.append(sequence, 1, &mut append)?;
        session.append(FloatSlice::F16(k), FloatSlice::F16(v), append.slots())?;
        let pages = pool.page_row(sequence)?;
        session.plan(&[pool.len(sequence)?], PageTable::padded(pages, pages.len() as u64))?;
        session.decode(FloatSlice::F16(q), FloatSliceMut::F32(out), None)?;
        steps.push(start.elapsed());
        after_step();
    }
    let pages = pool.page_row(sequence)?.to_vec();
    let mut cache = CacheBuffers::zeroed(&layout)?;
    for (buffer_idx, buffer) in cache.as_mut_vecs().iter_mut().enumerate() {
        session.read_bytes(buffer_idx, 0, buffer)?;
    }
    Ok(Decoded { out, cache, pages, plan: session.split_plan().clone(), steps })
}

/// All positions at once, as the oracle sees them: row `i` of one request of `num_steps` new tokens sees what step `i`
/// sees.
fn all_steps(fixture: &Fixture) -> DecodeSpec {
    DecodeSpec { q_len: fixture.num_steps as u32, ..spec(fixture) }
}

fn widen(values: &[half::f16]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// What is right for the original f16 data.
pub fn oracle_on_original(
    fixture: &Fixture,
    layer: &Layer,
) -> Result<oracle::OracleOutput, cpu_reference::Error> {
    let kv_len = fixture.num_tokens as u32;
    oracle::decode(&all_steps(fixture), kv_len, &widen(&layer.q), &widen(&layer.k), &widen(&layer.v))
}

/// What is right for what the cache holds.
pub fn oracle_on_cache(
    fixture: &Fixture,
    layer: &Layer,
    layout: &CacheLayout,
    decoded: &Decoded,
) -> Result<oracle::OracleOutput, cpu_reference::Error> {
    let spec = all_steps(fixture);
    let kv_lens = [fixture.num_tokens as u32];
    let page_table = PageTable::padded(&decoded.pages, layout.num_pages());
    let request = DecodeRequest { spec: &spec, kv_lens: &kv_lens, page_table };
    let (k, v) = oracle::gather(layout, &decoded.cache.view(), &request, 0)?;
    oracle::decode(&spec, fixture.num_tokens as u32, &widen(&layer.q), &k, &v)
}

/// Relative L2 distance of each head, `|got - want| / |want|` over all steps and channels: the worst head and its value.
pub fn worst_head(fixture: &Fixture, got: &[f64], want: &[f64]) -> (u32, f64) {
    let head_dim = fixture.head_dim as usize;
    let mut sums = vec![(0f64, 0f64); fixture.num_q_heads as usize];
    for (step_got, step_want) in got.chunks_exact(fixture.q_row()).zip(want.chunks_exact(fixture.q_row())) {
        let heads = step_got.chunks_exact(head_dim).zip(step_want.chunks_exact(head_dim));
        for ((got, want), (difference, norm)) in heads.zip(&mut sums) {
            *difference += got.iter().zip(want).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
            *norm += want.iter().map(|b| b * b).sum::<f64>();
        }
    }
    let errors = sums.iter().map(|(difference, norm)| (difference / norm).sqrt());
    (0u32..).zip(errors).fold((0, 0.0), |worst, head| if head.1 > worst.1 { head } else { worst })
}

/// The largest error of an output element as a share of what the backend's arithmetic allows; above 1 it is wrong.
pub fn share_of_bound(
    fixture: &Fixture,
    selection: &Selection,
    decoded: &Decoded,
    want: &oracle::OracleOutput,
) -> f64 {
    let bound = want.bound(&selection.chosen().arithmetic(&spec(fixture), &decoded.plan));
    let errors = decoded.out.iter().zip(&want.out).map(|(&got, want)| (f64::from(got) - want).abs());
    // NaN would lose every comparison.
    errors
        .zip(bound)
        .map(|(error, bound)| if error <= bound { error / bound } else { f64::INFINITY })
        .fold(0.0, f64::max)
}
