//! Stage 1: q + cache + work item -> partial `(o, m, l)` in f32.
//!
//! The unit of work is one item for one kv head; its rows are the `q_len * gqa_group` query rows that read that head.

use crate::arch::generic::{BlockMask, Bytes, LogitRule, SidePlanes};
use crate::isa::Kernel;
use crate::workspace::{Line, Workspace};
use attn_plan::{DecodeRequest, SplitPlan, WorkItem};
use kv_quant::{CacheLayout, CacheView, FloatSlice, PlaneId, Side};
use rayon::prelude::*;

/// Tokens between two looks at the running maximum.
pub(crate) const TILE_LEN: u32 = 64;
/// Lanes of the narrowest instance: partial sums of a dot product that run side by side.
pub(crate) const MIN_LANES: usize = 8;
/// Rows of q and o are padded to a multiple of this many f32: the widest instance's lanes.
const DIM_ALIGN: usize = 16;

/// Below this many products of q.k one thread is done before another has woken up.
const SERIAL_PRODUCTS: usize = 1 << 18;

/// `head_dim` rounded up to the widest vector.
pub(crate) fn padded_dim(head_dim: usize) -> usize {
    head_dim.next_multiple_of(DIM_ALIGN)
}

/// What all units of a step share.
pub(crate) struct Step<'a> {
    pub request: DecodeRequest<'a>,
    pub k: SidePlanes<'a>,
    pub v: SidePlanes<'a>,
    pub rule: LogitRule,
    pub num_pages: u64,
    pub page_len: u32,
    /// Whether a slot's heads lie closer than a head's slots.
    pub heads_are_neighbours: bool,
    pub num_kv_heads: usize,
    pub gqa_group: usize,
    /// Query rows of a kv head: `q_len * gqa_group`, q_len outer.
    pub rows: usize,
    pub head_dim: usize,
    /// `head_dim` rounded up to the widest vector.
    pub padded_dim: usize,
}

/// One item for some neighbouring kv heads.
pub(crate) struct Unit<'a> {
    pub item: WorkItem,
    pub first_head: usize,
    pub num_heads: usize,
    /// `[num_heads][rows][padded_dim]`.
    pub q: &'a [f32],
    /// `[num_heads][rows][padded_dim]`.
    pub o: &'a mut [f32],
    /// `[num_heads][rows][2]`.
    pub ml: &'a mut [f32],
}

impl<'a> Step<'a> {
    /// # Errors
    /// A buffer that is shorter than the layout says. The unsafe code below relies on this check.
    pub(crate) fn new(
        layout: &CacheLayout,
        cache: CacheView<'a>,
        request: &DecodeRequest<'a>,
    ) -> Result<Self, kv_quant::Error> {
        for (buffer_idx, &want) in layout.buffer_bytes().iter().enumerate() {
            let got = cache.buffer(buffer_idx).len() as u64;
            if got < want {
                return Err(kv_quant::Error::BufferLen { buffer_idx, got, want });
            }
        }
        let spec = request.spec;
        let gqa_group = spec.gqa_group() as usize;
        let head_dim = spec.head_dim as usize;
        let format = layout.format();
        let side = |side: Side| {
            let bytes = |id: PlaneId| {
                let (plane, bytes) = (layout.plane(id), layout.element_bytes(id));
                Bytes {
                    buffer: cache.buffer(plane.buffer_idx),
                    offset: plane.offset.wrapping_mul(bytes),
                    page_stride: plane.page_stride.wrapping_mul(bytes),
                    slot_stride: plane.slot_stride.wrapping_mul(bytes),
                    head_stride: plane.head_stride.wrapping_mul(bytes),
                }
            };
            SidePlanes {
                codes: bytes(PlaneId::Codes(side)),
                scales: bytes(PlaneId::Scales(side)),
                head_dim,
                num_groups: format.num_groups(side) as usize,
                group_len: format.group_len(side) as usize,
                scale_type: format.scale_type(),
                element: format.element(),
            }
        };
        Ok(Self {
            request: *request,
            k: side(Side::K),
            v: side(Side::V),
            rule: LogitRule {
                softmax_scale: spec.softmax_scale,
                soft_cap: spec.soft_cap,
                alibi: spec.alibi_slopes.is_some(),
            },
            num_pages: layout.num_pages(),
            page_len: layout.page_len(),
            heads_are_neighbours: {
                let codes = layout.plane(PlaneId::Codes(Side::K));
                codes.head_stride < codes.slot_stride || layout.page_len() == 1
            },
            num_kv_heads: spec.num_kv_heads as usize,
            gqa_group,
            rows: spec.q_len as usize * gqa_group,
            head_dim,
            padded_dim: padded_dim(head_dim),
        })
    }

    /// The page at a position of a request's row; `None` if the table does not hold it or it is outside the cache.
    #[inline]
    pub(crate) fn page(&self, request: usize, position: u32) -> Option<u64> {
        let table = &self.request.page_table;
        let entry = table.row_start(request)?.checked_add(u64::from(position))?;
        let page = u64::try_from(*table.pages.get(usize::try_from(entry).ok()?)?).ok()?;
        (page < self.num_pages).then_some(page)
    }

    /// Masks of query rows `first..first + num_rows` (at most 8) of a kv head.
    #[inline]
    pub(crate) fn block_mask(
        &self,
        request: usize,
        kv_head: usize,
        first: usize,
        num_rows: usize,
    ) -> BlockMask {
        let spec = self.request.spec;
        let kv_len = self.request.kv_lens.get(request).copied().unwrap_or(0);
        let mut mask = BlockMask { visible: [(0, 0); 8], position: [0; 8], slope: [0.0; 8] };
        for r in 0..num_rows {
            let (q_idx, in_group) = ((first + r) / self.gqa_group, (first + r) % self.gqa_group);
            let visible = spec.visible(kv_len, q_idx as u32);
            mask.visible[r] = (visible.start, visible.end);
            mask.position[r] = i64::from(kv_len) - i64::from(spec.q_len) + q_idx as i64;
            let head = kv_head * self.gqa_group + in_group;
            mask.slope[r] = spec.alibi_slopes.as_ref().and_then(|x| x.get(head)).copied().unwrap_or(0.0);
        }
        mask
    }
}

/// Fills the workspace's partial states for every item and kv head.
pub(crate) fn run(
    kernel: Kernel,
    step: &Step<'_>,
    plan: &SplitPlan,
    q: FloatSlice<'_>,
    workspace: &mut Workspace,
) {
    let Step { num_kv_heads, gqa_group, rows, head_dim, padded_dim, .. } = *step;
    let batch = step.request.batch();
    let num_units = plan.items().len() * num_kv_heads;
    let row_lines = padded_dim / Line::LEN;
    workspace.q.resize(batch * num_kv_heads * rows * row_lines, Line::ZERO);
    workspace.o.resize(num_units * rows * row_lines, Line::ZERO);
    workspace.ml.resize(num_units * rows * 2, 0.0);
    workspace.request_items.clear();
    for (item_idx, item) in plan.items().iter().enumerate() {
        while workspace.request_items.len() <= item.request_idx as usize {
            workspace.request_items.push(item_idx);
        }
    }
    workspace.request_items.resize(batch + 1, plan.items().len());
    let q_len = step.request.spec.q_len as usize;
    let q_rows: &mut [f32] = bytemuck::cast_slice_mut(&mut workspace.q);
    for (i, row) in q_rows.chunks_exact_mut(padded_dim).enumerate() {
        // [batch][kv_head][q_idx][in_group] here, [batch][q_idx][kv_head][in_group] there.
        let (request_idx, kv_head, row_idx) = (i / rows / num_kv_heads, i / rows % num_kv_heads, i % rows);
        let (q_idx, in_group) = (row_idx / gqa_group, row_idx % gqa_group);
        let source = ((request_idx * q_len + q_idx) * num_kv_heads + kv_head) * gqa_group + in_group;
        let (row, padding) = row.split_at_mut(head_dim);
        q.widen(source * head_dim, row);
        padding.fill(0.0);
    }
    let q: &[f32] = bytemuck::cast_slice(&workspace.q);
    let o: &mut [f32] = bytemuck::cast_slice_mut(&mut workspace.o);
    // Where the heads of a token are neighbours in memory, one unit takes as many of them as leave work for all threads:
    // it reads whole pages rather than a stripe of each. Bits do not depend on it, since heads never mix.
    let num_items = plan.items().len();
    let enough = |heads: &usize| num_items * (num_kv_heads / heads) >= rayon::current_num_threads();
    let mut divisors = (1..=num_kv_heads).rev().filter(|heads| num_kv_heads.is_multiple_of(*heads));
    let num_heads = if step.heads_are_neighbours { divisors.find(enough).unwrap_or(1) } else { 1 };
    let blocks = num_kv_heads / num_heads;
    let row_len = rows * padded_dim;
    let attend = |(unit, (o, ml)): (usize, (&mut [f32], &mut [f32]))| {
        let (item_idx, first_head) = (unit / blocks, unit % blocks * num_heads);
        let Some(&item) = plan.items().get(item_idx) else { return };
        let first = (item.request_idx as usize * num_kv_heads + first_head) * row_len;
        let q = q.get(first..first + num_heads * row_len).unwrap_or_default();
        kernel.attend(step, Unit { item, first_head, num_heads, q, o, ml });
    };
    let (o_len, ml_len) = (num_heads * row_len, num_heads * rows * 2);
    let tokens: usize = plan.items().iter().map(|item| item.num_tokens() as usize).sum();
    if tokens * num_kv_heads * row_len < SERIAL_PRODUCTS {
        o.chunks_mut(o_len).zip(workspace.ml.chunks_mut(ml_len)).enumerate().for_each(attend);
    } else {
        o.par_chunks_mut(o_len).zip(workspace.ml.par_chunks_mut(ml_len)).enumerate().for_each(attend);
    }
}
