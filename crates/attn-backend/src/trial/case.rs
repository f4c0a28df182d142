//! What a trial decodes: lengths, pages, needles and random numbers for one spec.

use super::floats::{Floats, Random};
use super::shrink::shrink;
use attn_plan::{DecodeSpec, SplitConfig, SplitPolicy};
use kv_quant::{CacheLayout, Error, FloatSlice, FloatType, LayoutKind};
use std::ops::Range;

/// Cache bytes of a trial, unless one page is larger.
const MAX_CACHE_BYTES: u64 = 64 << 20;
/// Multiply-adds of q.k in a trial's step.
const MAX_WORK: u64 = 1 << 31;
/// Elements of q and of appended k.
const MAX_ELEMENTS: u64 = 1 << 24;
/// The most requests.
const MAX_BATCH: usize = 14;
/// Pages that no request has: poison, and the target of a page copy.
const DEAD_PAGES: u64 = 2;
/// Tokens that append must skip, at either end of the batch.
const SKIPPED: usize = 2;
/// A page index that must not be read.
const WILD_PAGE: i32 = i32::MAX;
/// Logit of a needle above the rest, before soft-cap and ALiBi.
const NEEDLE_LOGIT: f32 = 9.0;

pub(super) struct Case {
    pub layout: CacheLayout,
    pub kv_lens: Vec<u32>,
    /// `[batch, stride]`, wild past each request's last page.
    pub pages: Vec<i32>,
    pub stride: u64,
    pub q: Floats,
    /// A page to copy to another, if there is one to spare.
    pub copy: Option<(u64, u64)>,
    k: Floats,
    v: Floats,
    slots: Vec<i64>,
    row_elements: usize,
    out_type: FloatType,
    q_elements: usize,
    lse_elements: Option<usize>,
}

impl Case {
    pub(super) fn new(layout: &CacheLayout, spec: &DecodeSpec, split: &SplitConfig) -> Result<Self, Error> {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let page_len = layout.page_len();
        let page_limit = match layout.kind() {
            LayoutKind::Custom => layout.num_pages(),
            _ => u64::MAX,
        };
        let max_pages =
            (MAX_CACHE_BYTES / layout.bytes_per_page().max(1)).max(1 + DEAD_PAGES).min(page_limit);
        let kv_lens = lengths(spec, split, page_len, max_pages.saturating_sub(DEAD_PAGES).max(1));
        let live: u64 = kv_lens.iter().map(|len| u64::from(len.div_ceil(page_len))).sum();
        let layout = shrink(layout, (live + DEAD_PAGES).min(page_limit).max(1))?;

        // Pages in random order, so that neighbours in a request are no neighbours in memory.
        let mut order: Vec<i32> = (0..layout.num_pages() as i32).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i + 1));
        }
        let stride = u64::from(kv_lens.iter().map(|len| len.div_ceil(page_len)).max().unwrap_or(0)) + 1;
        let mut pages = Vec::new();
        let mut slots = vec![-1; SKIPPED];
        for &kv_len in &kv_lens {
            let row: Vec<i32> = order.drain(..kv_len.div_ceil(page_len) as usize).collect();
            for t in 0..kv_len {
                let page = row.get((t / page_len) as usize).copied().unwrap_or(0);
                slots.push(i64::from(page) * i64::from(page_len) + i64::from(t % page_len));
            }
            pages.extend(row);
            pages.resize(pages.len().next_multiple_of(stride as usize), WILD_PAGE);
            if kv_len == 0 {
                pages.extend(std::iter::repeat_n(WILD_PAGE, stride as usize));
            }
        }
        slots.extend([-1; SKIPPED]);
        let first_live = pages.iter().find(|&&page| page != WILD_PAGE);
        let copy = first_live.zip(order.first()).map(|(&src, &dst)| (src as u64, dst as u64));

        let (k, v, q) = numbers(spec, split, page_len, &kv_lens, &mut random);
        Ok(Self {
            layout,
            pages,
            stride,
            q: Floats::from_f32(spec.q_type, &q),
            copy,
            k: Floats::from_f32(spec.q_type, &k),
            v: Floats::from_f32(spec.q_type, &v),
            slots,
            row_elements: spec.num_kv_heads as usize * spec.head_dim as usize,
            out_type: spec.out_type,
            q_elements: spec.q_elements(kv_lens.len()),
            lse_elements: spec.want_lse.then(|| spec.lse_elements(kv_lens.len())),
            kv_lens,
        })
    }

    /// The tokens in two appends of unequal size.
    pub(super) fn appends(&self) -> [Range<usize>; 2] {
        let middle = self.slots.len() / 3;
        [0..middle, middle..self.slots.len()]
    }

    /// k, v and slots of some tokens.
    pub(super) fn tokens(&self, tokens: Range<usize>) -> (FloatSlice<'_>, FloatSlice<'_>, &[i64]) {
        let elements = tokens.start * self.row_elements..tokens.end * self.row_elements;
        let part = |x: &'_ Floats| x.slice().slice(elements.clone()).is_some();
        debug_assert!(part(&self.k) && part(&self.v));
        let empty = FloatSlice::F32(&[]);
        (
            self.k.slice().slice(elements.clone()).unwrap_or(empty),
            self.v.slice().slice(elements).unwrap_or(empty),
            self.slots.get(tokens).unwrap_or(&[]),
        )
    }

    /// An output full of NaN, so that what is not written is seen.
    pub(super) fn out(&self) -> Floats {
        Floats::from_f32(self.out_type, &vec![f32::NAN; self.q_elements])
    }

    /// As [`Self::out`], for lse, if it is wanted.
    pub(super) fn lse(&self) -> Option<Vec<f32>> {
        self.lse_elements.map(|elements| vec![f32::NAN; elements])
    }
}

/// Lengths on both sides of everything that is an edge, most telling first, within the budgets.
fn lengths(spec: &DecodeSpec, split: &SplitConfig, page_len: u32, max_pages: u64) -> Vec<u32> {
    let tile = split.tile_len;
    let long = match split.policy {
        SplitPolicy::BatchInvariant { split_len } => split_len.saturating_mul(2).saturating_add(tile + 1),
        SplitPolicy::Throughput => 3 * tile + tile / 2 + 1,
    };
    let row = u64::from(spec.num_q_heads) * u64::from(spec.q_len) * u64::from(spec.head_dim);
    let kv_row = u64::from(spec.num_kv_heads) * u64::from(spec.head_dim);
    let mut tokens = (MAX_WORK / row).min(MAX_ELEMENTS / kv_row).clamp(u64::from(spec.q_len) + 1, 1 << 16);
    let max_batch = usize::try_from(MAX_ELEMENTS / row).unwrap_or(MAX_BATCH).clamp(1, MAX_BATCH);
    let mut wanted = vec![long, 0, tile + 1, long - 1, 1, tile, tile - 1, page_len + 1, page_len, spec.q_len];
    if let Some(window) = spec.window {
        wanted.insert(2, window.saturating_add(1));
        wanted.insert(4, window.saturating_add(tile + 1));
        wanted.push(window);
    }
    wanted.extend([spec.q_len - 1, 2 * tile]);
    let mut pages = max_pages;
    let mut lens: Vec<u32> = Vec::new();
    for len in wanted {
        let most = tokens.min(pages.saturating_mul(u64::from(page_len)));
        let len = if lens.is_empty() { u64::from(len).min(most) } else { u64::from(len) };
        if lens.len() < max_batch && len <= most && !lens.contains(&(len as u32)) {
            tokens -= len;
            pages -= len.div_ceil(u64::from(page_len));
            lens.push(len as u32);
        }
    }
    lens
}

/// Tokens of a request that get a needle: both sides of every edge, and the newest ones.
fn is_needle(spec: &DecodeSpec, split: &SplitConfig, page_len: u32, kv_len: u32, t: u32) -> bool {
    let beside = |edge: u32| t.is_multiple_of(edge) || (t + 1).is_multiple_of(edge);
    let split_len = match split.policy {
        SplitPolicy::BatchInvariant { split_len } => split_len,
        SplitPolicy::Throughput => split.tile_len,
    };
    let newest = kv_len - t <= spec.q_len.min(4);
    let window = spec.visible_any(kv_len).start;
    newest
        || t == 0
        || t == window
        || (split_len > 2 && beside(split_len))
        || (page_len > 8 && beside(page_len))
}

/// k and v of all tokens (the skipped ones at either end are NaN), and q.
///
/// All query heads that share a kv head lean towards one direction, along which needles lie: each needle has the same
/// share of the softmax, so that one that is missed, doubled or read from elsewhere moves the output far beyond any
/// rounding. Every other request has none, so that the plain tokens have their say too.
fn numbers(
    spec: &DecodeSpec,
    split: &SplitConfig,
    page_len: u32,
    kv_lens: &[u32],
    random: &mut Random,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (heads, dim) = (spec.num_kv_heads as usize, spec.head_dim as usize);
    let direction: Vec<f32> = (0..heads * dim).map(|_| random.symmetric().signum()).collect();
    let slope = spec.softmax_scale * dim as f32;
    let height = if slope == 0.0 { 1.0 } else { (NEEDLE_LOGIT / slope).clamp(-40.0, 40.0) };
    let skipped = vec![f32::NAN; SKIPPED * heads * dim];
    let (mut k, mut v) = (skipped.clone(), skipped.clone());
    for (request, &kv_len) in kv_lens.iter().enumerate() {
        for t in 0..kv_len {
            let needle = request.is_multiple_of(2) && is_needle(spec, split, page_len, kv_len, t);
            for &axis in &direction {
                k.push(if needle { axis * height } else { random.symmetric() });
                v.push(random.symmetric());
            }
        }
    }
    k.extend(&skipped);
    v.extend(&skipped);
    let group = spec.gqa_group() as usize;
    let mut q = Vec::with_capacity(spec.q_elements(kv_lens.len()));
    for _ in 0..kv_lens.len() * spec.q_len as usize {
        for head in 0..heads * group {
            let axis = direction.get(head / group * dim..).unwrap_or_default();
            q.extend(axis.iter().take(dim).map(|axis| axis + 0.25 * random.symmetric()));
        }
    }
    (k, v, q)
}
