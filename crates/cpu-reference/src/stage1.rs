//! Stage 1: q + cache + work item -> partial `(o, m, l)` in f32.
//!
//! The unit of work is one item for one kv head; its rows are the `q_len * gqa_group` query rows that read that head.

use crate::arch::generic::{BlockMask, LogitRule, SidePlanes};
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
    pub page_len: u32,
    pub num_kv_heads: usize,
    pub gqa_group: usize,
    /// Query rows of a kv head: `q_len * gqa_group`, q_len outer.
    pub rows: usize,
    pub head_dim: usize,
    /// `head_dim` rounded up to the widest vector.
    pub padded_dim: usize,
}

/// One item for one kv head.
pub(crate) struct Unit<'a> {
    pub item: WorkItem,
    pub kv_head: u32,
    /// `[rows][padded_dim]`.
    pub q: &'a [f32],
    /// `[rows][padded_dim]`.
    pub o: &'a mut [f32],
    /// `[rows][2]`.
    pub ml: &'a mut [f32],
}

impl<'a> Step<'a> {
    pub(crate) fn new(layout: &CacheLayout, cache: CacheView<'a>, request: &DecodeRequest<'a>) -> Self {
        let spec = request.spec;
        let gqa_group = spec.gqa_group() as usize;
        let head_dim = spec.head_dim as usize;
        let format = layout.format();
        let side = |side: Side| {
            let strides = |id: PlaneId| {
                let (plane, bytes) = (layout.plane(id), layout.element_bytes(id));
                [plane.offset, plane.page_stride, plane.slot_stride, plane.head_stride]
                    .map(|x| x.wrapping_mul(bytes))
            };
            let (codes, scales) = (PlaneId::Codes(side), PlaneId::Scales(side));
            SidePlanes {
                codes: cache.buffer(layout.plane(codes).buffer_idx),
                scales: cache.buffer(layout.plane(scales).buffer_idx),
                code_strides: strides(codes),
                scale_strides: strides(scales),
                head_dim,
                num_groups: format.num_groups(side) as usize,
                group_len: format.group_len(side) as usize,
                scale_type: format.scale_type(),
                element: format.element(),
            }
        };
        Self {
            request: *request,
            k: side(Side::K),
            v: side(Side::V),
            rule: LogitRule {
                softmax_scale: spec.softmax_scale,
                soft_cap: spec.soft_cap,
                alibi: spec.alibi_slopes.is_some(),
            },
            page_len: layout.page_len(),
            num_kv_heads: spec.num_kv_heads as usize,
            gqa_group,
            rows: spec.q_len as usize * gqa_group,
            head_dim,
            padded_dim: padded_dim(head_dim),
        }
    }

    /// The page at a position of a request's row; `None` if the table does not hold it.
    #[inline]
    pub(crate) fn page(&self, request: usize, position: u32) -> Option<u64> {
        let table = &self.request.page_table;
        let entry = table.row_start(request)?.checked_add(u64::from(position))?;
        u64::try_from(*table.pages.get(usize::try_from(entry).ok()?)?).ok()
    }

    /// Masks of query rows `first..first + num_rows` (at most 8) of a kv head.
    #[inline]
    pub(crate) fn block_mask(
        &self,
        request: usize,
        kv_head: u32,
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
            let head = kv_head as usize * self.gqa_group + in_group;
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
    let units = o.par_chunks_mut(rows * padded_dim).zip(workspace.ml.par_chunks_mut(rows * 2));
    units.enumerate().for_each(|(unit, (o, ml))| {
        let (item_idx, kv_head) = (unit / num_kv_heads, unit % num_kv_heads);
        let Some(&item) = plan.items().get(item_idx) else { return };
        let first = (item.request_idx as usize * num_kv_heads + kv_head) * rows * padded_dim;
        let q = q.get(first..first + rows * padded_dim).unwrap_or_default();
        kernel.attend(step, Unit { item, kv_head: kv_head as u32, q, o, ml });
    });
}
