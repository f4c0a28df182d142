//! Pools beyond 4 GiB, poisoned all over, whose live slots lie at the end and on both sides of 2 GiB and 4 GiB.

use super::text;
use crate::case::Case;
use crate::compare;
use crate::count::Ledger;
use crate::guarded::{POISON, kernels};
use crate::numbers::Numbers;
use crate::poison::{self, Fill};
use crate::problem::Step;
use crate::values::{Guarded, Values};
use attn_backend::{
    Backend, CudaBackend, Descriptor, FormatKey, Memory, MemoryKind, Operation, OperationKey, Registry,
    SelectOptions, Session, SessionOptions, TrialMode, select,
};
use attn_kernels::device::{DeviceBuffer, Stream};
use attn_plan::{PageTable, SplitPlan};
use cpu_reference::oracle;
use kv_quant::{CacheBuffers, CacheLayout, FloatType, LayoutKind, PlaneId, Side};
use std::sync::Arc;

/// Codes of each pool: more than 4 GiB, so that neither bytes nor elements fit in 32 bits.
const POOL_BYTES: u64 = (4 << 30) + (1 << 29);
/// Memory that has to be free: codes, scales and some more.
const NEEDED_BYTES: usize = 16 << 30;

/// Appends to such a pool through a session, decodes from it, and compares with the oracle over a small cache of the
/// same tokens; reads nothing but poison beside the tokens.
///
/// # Errors
/// The first element beyond its bound, the first byte that is another.
pub fn far_pool(ledger: &Ledger) -> Result<(), String> {
    let (free, _) = kernels().map_err(text)?.device().memory_info().map_err(text)?;
    if free < NEEDED_BYTES {
        ledger.skipped("gpu", &format!("pools beyond 4 GiB: {free} bytes of {NEEDED_BYTES} are free"));
        return Ok(());
    }
    for (seed, (layout, page_len)) in [
        (LayoutKind::LightLlm, 1),
        (LayoutKind::Native, 16),
        (LayoutKind::Native, 1),
        (LayoutKind::Hnd, 64),
        (LayoutKind::Nhd, 16),
    ]
    .into_iter()
    .enumerate()
    {
        let case = Case {
            head_dim: 128,
            k_group_len: 8,
            v_group_len: 8,
            num_kv_heads: 8,
            gqa_group: 4,
            layout,
            page_len,
            seed: seed as u64,
            ..Case::plain(64, 0)
        };
        one(&case).map_err(|error| format!("{error}\n  in {case:?}"))?;
        ledger.ran("gpu", "pools beyond 4 GiB", 1);
    }
    Ok(())
}

/// Pages on both sides of 2 GiB and 4 GiB of codes, the first, and most of all the last.
fn live_pages(layout: &CacheLayout) -> Vec<i32> {
    let codes = layout.plane(PlaneId::Codes(Side::K));
    let num_pages = layout.num_pages();
    let around = |bytes: u64| {
        let page = bytes / codes.page_stride.max(1);
        page.saturating_sub(3)..page + 3
    };
    let num_last = (300 / u64::from(layout.page_len())).max(3);
    let mut pages: Vec<u64> = (num_pages - num_last..num_pages).collect();
    for bytes in [1 << 31, 1 << 32] {
        pages.extend(around(bytes).filter(|page| *page < num_pages - num_last));
    }
    pages.push(0);
    pages.into_iter().map(|page| page as i32).collect()
}

fn one(case: &Case) -> Result<(), String> {
    let device = kernels().map_err(text)?.device();
    let per_page = case.layout_of(1).buffer_bytes().iter().sum::<u64>();
    // Of a pool of groups of 8 with f16 scales, codes are four fifths: K and V of 4.5 GiB together.
    let layout = case.layout_of(POOL_BYTES * 5 / 4 / per_page);
    let spec = case.bare_spec();
    let stream = Stream::new(device).map_err(text)?;
    let allocate = |&bytes: &u64| {
        let buffer = device.alloc(bytes as usize)?;
        buffer.fill(POISON, &stream).map(|()| buffer)
    };
    let pool: Vec<DeviceBuffer> =
        layout.buffer_bytes().iter().map(allocate).collect::<Result<_, _>>().map_err(text)?;
    stream.synchronize().map_err(text)?;

    let descriptor = Descriptor::new(layout.clone(), spec.clone()).with_memory(MemoryKind::Device);
    let mut registry = Registry::empty();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    registry.register(key, Arc::new(CudaBackend::default()));
    let options = SelectOptions { read_environment: false, trial: TrialMode::Skip, ..Default::default() };
    let selection = select(&registry, &descriptor, &options).map_err(text)?;
    let views = pool.iter().map(DeviceBuffer::view).collect();
    let options = SessionOptions { memory: Memory::Device(views), ..Default::default() };
    let mut session = Session::open(&selection, options).map_err(text)?;

    // Two requests: all live pages in order of no kind, and the last pages alone.
    let mut numbers = Numbers::new(case.seed, 8);
    let mut pages = live_pages(&layout);
    let last: Vec<i32> = pages[..2].to_vec();
    numbers.shuffle(&mut pages);
    let page_len = case.page_len as usize;
    let num_tokens = pages.len() * page_len;
    let slots: Vec<i64> = (0..num_tokens)
        .map(|t| i64::from(pages[t / page_len]) * page_len as i64 + (t % page_len) as i64)
        .collect();
    let row = layout.format().row_elements();
    let (k, v) = (numbers.normals(num_tokens * row), numbers.normals(num_tokens * row));
    let (k, v) = (Values::from_f32(case.in_type, &k), Values::from_f32(case.in_type, &v));
    session.append(k.as_slice(), v.as_slice(), &slots).map_err(text)?;

    // The same tokens in a small cache, page i there being pages[i] here.
    let near = case.layout_of(pages.len() as u64);
    let mut cache = poison::dead_cache(&near, Fill::Poison);
    let near_slots: Vec<i64> = (0..num_tokens as i64).collect();
    kv_quant::append(&near, &mut cache.view_mut(), k.as_slice(), v.as_slice(), &near_slots).map_err(text)?;
    same_bytes(&mut session, &layout, &near, &cache, &pages)?;

    let kv_lens = vec![num_tokens as u32 - 1, (2 * page_len) as u32];
    let near_of = |page: &i32| pages.iter().position(|p| p == page).unwrap_or(0) as i32;
    let table: Vec<i32> = pages.iter().chain(&last).copied().collect();
    let near_table: Vec<i32> = table.iter().map(near_of).collect();
    let row_starts = vec![0, pages.len() as u64];
    let q = Values::from_f32(case.q_type, &numbers.normals(spec.q_elements(2)));
    let rows = attn_plan::PageRows::Starts(&row_starts);
    session.plan(&kv_lens, PageTable { pages: &table, rows }).map_err(text)?;
    let mut out = Guarded::untouched(spec.out_type, spec.q_elements(2));
    let mut lse = Guarded::untouched(FloatType::F32, spec.lse_elements(2));
    let kv_quant::FloatSliceMut::F32(lse_slice) = lse.as_mut() else { return Err("lse is f32".to_owned()) };
    session.decode(q.as_slice(), out.as_mut(), Some(lse_slice)).map_err(text)?;
    let run = compare::Run { out: out.into_values()?, lse: Some(lse.into_values()?) };

    let step = Step { kv_lens, pages: near_table, row_starts, stride: None, q };
    let expected = oracle::decode_request(&near, &cache.view(), &step.request(&spec), step.q.as_slice())
        .map_err(text)?;
    let plan = SplitPlan::new(&spec, &step.kv_lens, session.split()).map_err(text)?;
    let arithmetic = CudaBackend::default().arithmetic(&spec, &plan);
    compare::with_oracle(&spec, &expected, &arithmetic, &run).map(|_| ())
}

/// Each live row here has the bytes that it has in the small cache.
fn same_bytes(
    session: &mut Session<'_>,
    far: &CacheLayout,
    near: &CacheLayout,
    cache: &CacheBuffers,
    pages: &[i32],
) -> Result<(), String> {
    let page_len = u64::from(far.page_len());
    // Every row of three pages: the rest is judged by the decode.
    for (near_page, &page) in pages.iter().enumerate().filter(|(i, _)| i % (pages.len() / 3).max(1) == 0) {
        for slot in 0..page_len {
            for id in PlaneId::ALL {
                for head in 0..far.format().num_kv_heads() {
                    let (buffer_idx, range) = far.row_bytes(id, page as u64 * page_len + slot, head);
                    let mut got = vec![0u8; (range.end - range.start) as usize];
                    session.read_bytes(buffer_idx, range.start, &mut got).map_err(text)?;
                    let (near_idx, range) = near.row_bytes(id, near_page as u64 * page_len + slot, head);
                    if cache.view().bytes(near_idx, range) != got {
                        return Err(format!("slot {slot} of page {page}, head {head}, {id:?}: other bytes"));
                    }
                }
            }
        }
    }
    Ok(())
}
