//! Every kernel of the image is launched, small enough for a sanitizer that slows each down a hundred times.

use super::text;
use crate::case::{Case, Data};
use crate::conformance::judge::{Verdict, judge};
use crate::count::Ledger;
use crate::guarded::{Arena, Guarded, POISON, SHARES, kernels, launches};
use crate::problem::Problem;
use crate::subject::{Subject, buffers};
use attn_backend::Backend as _;
use attn_kernels::abi::Ready;
use attn_kernels::device::{
    CacheArgs, DecodeArgs, DequantizeArgs, ErrorReport, PageRowsArgs, PageTableArgs, PlanArgs, Stream,
};
use attn_kernels::image;
use attn_kernels::key::{Groups, INSTANCES, Instance, KernelKind, Scales, items_of};
use attn_plan::SplitPlan;
use kv_quant::{FloatType, LayoutKind, ScaleType, Side};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The architecture whose machine code has clusters.
const CLUSTERS_SM: u32 = 90;

/// Judges a small case of every variant of stage 1, in the narrowest and the widest block, by workers and in shares, and where there are blocks
/// of eight warps for items, in fixed cuts; reads, dequantizes, streams. Prints what was launched.
///
/// # Errors
/// The first case that is wrong; kernels of the image that were not launched.
pub fn every_kernel(ledger: &Ledger) -> Result<(), String> {
    let kernels = kernels().map_err(text)?;
    let image = image::embedded().map_err(text)?;
    let present = |instance: &&Instance| image.has(&instance.key.to_string());
    let mut launched = BTreeSet::new();
    for (seed, instance) in INSTANCES.iter().filter(present).enumerate() {
        match instance.key.kind {
            KernelKind::Stage1 => stage1(instance, seed as u64)?,
            // By the variant of stage 1 that it stands in for.
            KernelKind::Shares | KernelKind::Items => {}
            KernelKind::Reader => {
                reader(instance)?;
                launched.insert(instance.key.to_string());
            }
        }
    }
    for layout in [LayoutKind::LightLlm, LayoutKind::Native] {
        dequantize(layout)?;
    }
    launched.insert("kv8_dequantize".to_owned());
    let streams = kernels.stream_kernels().map_err(text)?;
    let device = kernels.device();
    let stream = Stream::new(device).map_err(text)?;
    let bytes: Vec<u8> = (0..1 << 18).map(|i| (i % 253) as u8).collect();
    let (from, to) = (device.upload(&bytes).map_err(text)?, device.alloc_zeroed(1 << 18).map_err(text)?);
    let scratch = device.alloc_zeroed(64).map_err(text)?;
    streams.read(from.view(), scratch.view(), &stream).map_err(text)?;
    streams.copy(from.view(), to.view(), &stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let mut copied = vec![0u8; bytes.len()];
    to.read(0, &mut copied).map_err(text)?;
    if copied != bytes {
        return Err("kv8_stream_copy: other bytes".to_owned());
    }
    launched.extend(["kv8_stream_read", "kv8_stream_copy"].map(str::to_owned));
    launched.extend(launches());
    let has_clusters = device.facts().sm == CLUSTERS_SM;
    let is_wide = |symbol: &str| ["kv8_shares", "kv8_items"].iter().any(|wide| symbol.starts_with(wide));
    let runs_here = |symbol: &&str| has_clusters || !is_wide(symbol);
    let all: BTreeSet<String> = image
        .units
        .iter()
        .flat_map(|unit| unit.symbols)
        .filter(|symbol| runs_here(symbol))
        .map(|symbol| (*symbol).to_owned())
        .collect();
    let missed: Vec<&String> = all.difference(&launched).collect();
    if !missed.is_empty() {
        return Err(format!("{} of {} kernels were not launched: {missed:?}", missed.len(), all.len()));
    }
    if has_clusters && !launched.contains(SHARES) {
        return Err("no launch shared a request out among the blocks of a cluster".to_owned());
    }
    ledger.tally("kernels of the image launched by gpu::every_kernel", all.len() as u64);
    Ok(())
}

/// A case for which the table chooses this variant.
fn case_of(instance: &Instance, seed: u64) -> Case {
    let key = &instance.key;
    let (k_group_len, v_group_len) = match key.groups {
        Groups::G8 => (8, 8),
        Groups::G16 => (16, 32),
        Groups::Any => (8, 16),
        Groups::Whole => (key.head_dim, key.head_dim),
    };
    let scale_type = match key.scales {
        Scales::F16 => ScaleType::F16,
        Scales::Bf16 => ScaleType::Bf16,
        Scales::F32 => ScaleType::F32,
        // Every type, in turn; f16 has variants of its own at groups of 16 and more.
        Scales::Any if key.groups != Groups::G16 => ScaleType::ALL[seed as usize % 3],
        Scales::Any => [ScaleType::Bf16, ScaleType::F32][seed as usize % 2],
    };
    Case {
        head_dim: key.head_dim,
        k_group_len,
        v_group_len,
        scale_type,
        // More than half of what the variant holds, so that none with fewer rows is chosen.
        gqa_group: if key.row_tiles == 1 { 3 } else { key.rows() - 3 },
        num_kv_heads: 4,
        kv_lens: vec![70, 0, 17],
        layout: [LayoutKind::Native, LayoutKind::Hnd, LayoutKind::Nhd][seed as usize % 3],
        page_len: [16, 4, 1, 32][seed as usize % 4],
        q_type: FloatType::ALL[seed as usize % 3],
        out_type: FloatType::ALL[seed as usize / 3 % 3],
        window: (seed % 4 == 1).then_some(40),
        soft_cap: (seed % 4 == 2).then_some(5.0),
        alibi: seed % 4 == 3,
        sinks: seed % 2 == 1,
        data: Data::Normal(1.0),
        seed: 4 * seed,
        ..Case::plain(64, 0)
    }
}

/// Tokens of a request that fixed cuts of two tiles make a run of three pieces, the last shorter.
const RUN_TOKENS: u32 = 2 * 128 + 70;

fn stage1(instance: &'static Instance, seed: u64) -> Result<(), String> {
    let symbol = instance.key.to_string();
    let most = instance.max_heads;
    let by_heads = BTreeSet::from([(1, 0), (most, 0), (1, 2), (most, 3)]);
    let mut cases: Vec<(u32, u32, Case)> = by_heads
        .into_iter()
        .map(|(heads, num_shares)| (heads, 3, case_of(instance, seed).shared_out(num_shares)))
        .collect();
    if items_of(&instance.key).is_some() {
        // One worker goes from piece to piece and from request to request.
        let case = Case { kv_lens: vec![70, 0, RUN_TOKENS], window: None, ..case_of(instance, seed) };
        cases.push((1, 1, case.batch_invariant(2)));
    }
    for (heads, num_workers, mut case) in cases {
        let backend = Guarded { arithmetic: instance.key.arithmetic, heads_per_block: Some(heads) };
        let subject = Subject::new(Arc::new(backend), &Arc::default());
        case.config.num_workers = num_workers;
        let layout = case.layout_of(1);
        let descriptor = attn_backend::Descriptor::new(layout, case.bare_spec());
        let variant = backend.variant(&descriptor);
        if variant.as_deref() != Some(symbol.as_str()) {
            return Err(format!("the case for {symbol} is run by {variant:?}"));
        }
        match judge(&subject, "every kernel", &case)? {
            Verdict::Right(_) => {}
            Verdict::Skipped(reason) => return Err(format!("{symbol}: {reason}")),
        }
    }
    Ok(())
}

/// A problem's cache, page table and plan between canaries.
struct There {
    arena: Arena,
    stream: Stream,
    report: ErrorReport,
}

impl There {
    fn new() -> Result<Self, String> {
        let device = kernels().map_err(text)?.device();
        Ok(Self {
            arena: Arena::new(device).map_err(text)?,
            stream: Stream::new(device).map_err(text)?,
            report: ErrorReport::new(device).map_err(text)?,
        })
    }
}

/// The reader computes nothing; it reads no byte that is not there and writes none.
fn reader(instance: &'static Instance) -> Result<(), String> {
    let case = Case { gqa_group: 1, ..case_of(instance, 0) };
    let problem = Problem::new(&case);
    let plan = SplitPlan::new(&problem.spec, &case.kv_lens, &case.config).map_err(text)?;
    let kernels = kernels().map_err(text)?;
    for heads_per_block in BTreeSet::from([1, instance.max_heads]) {
        let There { mut arena, stream, report } = There::new()?;
        let cache = buffers(&problem.layout, &problem.image);
        let items: Vec<u32> = plan
            .items()
            .iter()
            .flat_map(|item| [item.request_idx, item.token_start, item.token_end, item.partial_idx])
            .collect();
        let q = problem.step.q.as_slice();
        let arrays: [&[u8]; 6] = [
            q.as_bytes(),
            bytemuck::cast_slice(&case.kv_lens),
            bytemuck::cast_slice(&problem.step.pages),
            bytemuck::cast_slice(&items),
            bytemuck::cast_slice(plan.worker_starts()),
            bytemuck::cast_slice(plan.request_partials()),
        ];
        let out_bytes = problem.spec.q_elements(case.kv_lens.len()) * problem.spec.out_type.bytes();
        let sizes = cache.iter().map(|bytes| bytes.len()).chain(arrays.iter().map(|bytes| bytes.len()));
        arena.clear(sizes.chain([out_bytes])).map_err(text)?;
        let cache: Vec<_> = cache.into_iter().map(|bytes| arena.input("a cache buffer", bytes)).collect();
        let arrays = arrays.map(|bytes| arena.input("an array", bytes));
        let out = arena.contents("out", out_bytes);
        arena.collected(&out).fill(POISON);
        arena.send(&stream).map_err(text)?;
        let views: Vec<_> = cache.iter().map(|place| arena.view(place)).collect();
        let [q, kv_lens, indices, items, worker_starts, request_partials] =
            arrays.map(|place| arena.view(&place));
        let rows = PageRowsArgs::Stride(problem.step.stride.ok_or("rows are padded")?);
        let empty = arena.view(&out).slice(0, 0).ok_or("an empty view")?;
        let args = DecodeArgs {
            spec: &problem.spec,
            cache: CacheArgs {
                layout: &problem.layout,
                buffers: &views,
                pages: Some(PageTableArgs { indices, rows }),
            },
            batch: case.kv_lens.len() as u32,
            q,
            out: arena.view(&out),
            lse: None,
            kv_lens,
            plan: PlanArgs {
                items,
                worker_starts,
                request_partials,
                num_workers: plan.worker_starts().len() as u32 - 1,
                heads_per_block,
                wide: false,
                num_shares: 0,
                has_partials: false,
            },
            ready: Ready::Nothing,
            partial_o: empty,
            partial_ml: empty,
            alibi_slopes: None,
            sinks: None,
            error: report.view(),
        };
        let decoder = kernels.decoder_of(instance, &problem.spec).map_err(text)?;
        decoder.run(&args, &stream).map_err(text)?;
        arena.fetch(&stream).map_err(|error| format!("{}: {error}", instance.key))?;
        if arena.fetched(&out).iter().any(|&byte| byte != POISON) {
            return Err(format!("{} has written to out", instance.key));
        }
    }
    Ok(())
}

/// Gathers a request of a poisoned cache into every type: code times scale, rounded once.
fn dequantize(layout: LayoutKind) -> Result<(), String> {
    let page_len = if layout == LayoutKind::LightLlm { 1 } else { 16 };
    let case = Case {
        layout,
        page_len,
        num_kv_heads: 2,
        head_dim: 128,
        k_group_len: 8,
        v_group_len: 8,
        kv_lens: vec![3, 37],
        ..Case::plain(64, 0)
    };
    let problem = Problem::new(&case);
    let cache_kernels = kernels().and_then(|kernels| kernels.cache_kernels()).map_err(text)?;
    let (request, start, end) = (1u32, 5u32, 37u32);
    let row = problem.layout.format().row_elements();
    for out_type in FloatType::ALL {
        let There { mut arena, stream, mut report } = There::new()?;
        let cache = buffers(&problem.layout, &problem.image);
        let len = (end - start) as usize * row * out_type.bytes();
        let pages: &[u8] = bytemuck::cast_slice(&problem.step.pages);
        let sizes = cache.iter().map(|bytes| bytes.len()).chain([pages.len(), len, len]);
        arena.clear(sizes).map_err(text)?;
        let cache: Vec<_> = cache.into_iter().map(|bytes| arena.input("a cache buffer", bytes)).collect();
        let pages = arena.input("the page table", pages);
        let (k, v) = (arena.output("k", len), arena.output("v", len));
        arena.send(&stream).map_err(text)?;
        let views: Vec<_> = cache.iter().map(|place| arena.view(place)).collect();
        let rows = PageRowsArgs::Stride(problem.step.stride.ok_or("rows are padded")?);
        let args = DequantizeArgs {
            cache: CacheArgs {
                layout: &problem.layout,
                buffers: &views,
                pages: Some(PageTableArgs { indices: arena.view(&pages), rows }),
            },
            k: arena.view(&k),
            v: arena.view(&v),
            request_idx: request,
            token_start: start,
            token_end: end,
            out_type,
            error: report.view(),
        };
        cache_kernels.dequantize(&args, &stream).map_err(text)?;
        arena.fetch(&stream)?;
        report.take(&stream).map_err(text)?;
        for (side, place) in [(Side::K, &k), (Side::V, &v)] {
            let want = rows_of(&problem, side, request as usize, start..end)?;
            let want = crate::values::Values::from_f32(out_type, &want);
            if arena.fetched(place) != want.as_slice().as_bytes() {
                return Err(format!(
                    "kv8_dequantize, {layout}, {out_type}: {side:?} differs from code * scale"
                ));
            }
        }
    }
    Ok(())
}

fn rows_of(
    problem: &Problem,
    side: Side,
    request: usize,
    tokens: std::ops::Range<u32>,
) -> Result<Vec<f32>, String> {
    let (layout, table) = (&problem.layout, problem.request().page_table);
    let head_dim = layout.format().head_dim() as usize;
    let mut rows = Vec::new();
    for token in tokens {
        let slot = table.slot(request, token, layout.page_len()).ok_or("a token beyond its row")?;
        for head in 0..layout.format().num_kv_heads() {
            let mut row = vec![0f32; head_dim];
            kv_quant::dequantize_row(layout, &problem.image.view(), side, slot, head, &mut row)
                .map_err(text)?;
            rows.extend(row);
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_case_is_run_by_the_variant_it_is_for() {
        for (seed, instance) in INSTANCES.iter().enumerate().filter(|(_, i)| i.key.kind == KernelKind::Stage1)
        {
            let case = case_of(instance, seed as u64);
            let backend = Guarded { arithmetic: instance.key.arithmetic, heads_per_block: None };
            let descriptor = attn_backend::Descriptor::new(case.layout_of(9), case.bare_spec());
            assert_eq!(backend.variant(&descriptor), Some(instance.key.to_string()), "{case:?}");
        }
    }
}
