//! Stage 1: q + cache + work item -> partial `(o, m, l)` in f32.
//!
//! The unit of work is one item for one kv head; its rows are the `q_len * gqa_group` query rows that read that head.

use crate::DotProduct;
use crate::arch::generic::{BlockMask, Bytes, LogitRule, SidePlanes};
use crate::isa::Kernel;
use crate::workspace::{Line, Workspace};
use crate::{query, split};
use attn_plan::{DecodeRequest, SplitPlan, WorkItem};
use kv_quant::{CacheLayout, CacheView, FloatSlice, PlaneId, Side};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Lanes of the narrowest instance: partial sums of a dot product that run side by side.
pub(crate) const MIN_LANES: usize = 8;
/// Rows of q and o are padded to a multiple of this many f32: the widest instance's lanes.
pub(crate) const DIM_ALIGN: usize = 16;

/// The most query rows that one pass over a tile serves.
pub(crate) const MAX_BLOCK: usize = 8;

/// Below this many products of q.k one thread is done before another has woken up.
const SERIAL_PRODUCTS: usize = 1 << 18;

/// `head_dim` rounded up to the widest vector.
pub(crate) fn padded_dim(head_dim: usize) -> usize {
    head_dim.next_multiple_of(DIM_ALIGN)
}

/// So many units are left for each thread, that one which is late still has something to give away.
const UNITS_PER_THREAD: usize = 2;

/// How long a thread waits for the others of its step before it looks for other work.
const LONGEST_SPIN: Duration = Duration::from_micros(100);

/// What all units of a step share.
pub(crate) struct Step<'a> {
    pub request: DecodeRequest<'a>,
    pub k: SidePlanes<'a>,
    pub v: SidePlanes<'a>,
    pub rule: LogitRule,
    /// Tokens between two looks at the running maximum.
    pub tile_len: u32,
    pub num_pages: u64,
    pub page_len: u32,
    pub num_kv_heads: usize,
    pub gqa_group: usize,
    /// Query rows of a kv head: `q_len * gqa_group`, q_len outer.
    pub rows: usize,
    pub head_dim: usize,
    /// `head_dim` rounded up to the widest vector.
    pub padded_dim: usize,
    /// Whether q.k is computed in integers.
    pub is_integer: bool,
}

/// One item for some neighbouring kv heads.
pub(crate) struct Unit<'a> {
    pub item: WorkItem,
    pub first_head: usize,
    pub num_heads: usize,
    /// `[num_heads]`, then blocks of up to [`MAX_BLOCK`] rows, `rows * padded_dim` f32 in all, as
    /// [`query::pack`] makes them.
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
        plan: &SplitPlan,
        dot: DotProduct,
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
            tile_len: split::tile_len(plan),
            num_pages: layout.num_pages(),
            page_len: layout.page_len(),
            num_kv_heads: spec.num_kv_heads as usize,
            gqa_group,
            rows: spec.q_len as usize * gqa_group,
            head_dim,
            padded_dim: padded_dim(head_dim),
            is_integer: dot == DotProduct::Int8 && query::can_be_integer(format),
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

/// Fills the workspace's partial states for every item and kv head; returns how many threads shared the work.
pub(crate) fn run(
    kernel: Kernel,
    step: &Step<'_>,
    plan: &SplitPlan,
    q: FloatSlice<'_>,
    workspace: &mut Workspace,
) -> usize {
    let Step { num_kv_heads, rows, padded_dim, .. } = *step;
    let batch = step.request.batch();
    let by_request = |item: &WorkItem| (item.request_idx, item.token_start);
    let mut items = std::mem::take(&mut workspace.items);
    items.clear();
    items.extend_from_slice(plan.items());
    if !items.is_sorted_by_key(by_request) {
        items.sort_unstable_by_key(by_request);
    }
    let num_items = items.len();
    let num_units = num_items * num_kv_heads;
    let row_lines = padded_dim / Line::LEN;
    workspace.q.resize(batch * num_kv_heads * rows * row_lines, Line::ZERO);
    workspace.o.resize(num_units * rows * row_lines, Line::ZERO);
    workspace.ml.resize(num_units * rows * 2, 0.0);
    workspace.request_items.clear();
    for (item_idx, item) in items.iter().enumerate() {
        while workspace.request_items.len() <= item.request_idx as usize {
            workspace.request_items.push(item_idx);
        }
    }
    workspace.request_items.resize(batch + 1, num_items);
    query::pack(step, kernel.lanes(), q, bytemuck::cast_slice_mut(&mut workspace.q));
    let q: &[f32] = bytemuck::cast_slice(&workspace.q);
    let o: &mut [f32] = bytemuck::cast_slice_mut(&mut workspace.o);
    // Where there is plenty, a unit takes several heads: it reads whole pages rather than a stripe of each. Bits do not depend
    // on it, since heads never mix.
    let threads = rayon::current_num_threads();
    let enough = |heads: &usize| num_items * (num_kv_heads / heads) >= UNITS_PER_THREAD * threads;
    let mut divisors = (1..=num_kv_heads).rev().filter(|heads| num_kv_heads.is_multiple_of(*heads));
    let num_heads = divisors.find(enough).unwrap_or(1);
    let blocks = num_kv_heads / num_heads;
    let row_len = rows * padded_dim;
    let attend = |(unit, (o, ml)): (usize, (&mut [f32], &mut [f32]))| {
        let (item_idx, first_head) = (unit / blocks, unit % blocks * num_heads);
        let Some(&item) = items.get(item_idx) else { return };
        let first = (item.request_idx as usize * num_kv_heads + first_head) * row_len;
        let q = q.get(first..first + num_heads * row_len).unwrap_or_default();
        kernel.attend(step, Unit { item, first_head, num_heads, q, o, ml });
    };
    let (o_len, ml_len) = (num_heads * row_len, num_heads * rows * 2);
    let tokens: usize = items.iter().map(|item| item.num_tokens() as usize).sum();
    let units = o.chunks_mut(o_len).zip(workspace.ml.chunks_mut(ml_len)).enumerate();
    if tokens * num_kv_heads * row_len < SERIAL_PRODUCTS {
        units.for_each(attend);
        workspace.items = items;
        return 1;
    }
    let threads = threads.min(units.len());
    share_out(threads, units, attend);
    workspace.items = items;
    threads
}

/// Hands `units` out to `threads` threads, one by one: from the front to every second thread, from the back to the others.
/// Two threads so have a half each, of different tokens and the same from step to step.
fn share_out<U: Send>(
    threads: usize,
    units: impl ExactSizeIterator<Item = U> + DoubleEndedIterator + Send,
    attend: impl Fn(U) + Sync,
) {
    let left = AtomicUsize::new(units.len());
    let units = Mutex::new(units);
    let take = |thread: usize| {
        let mut units = units.lock().ok()?;
        if thread.is_multiple_of(2) { units.next() } else { units.next_back() }
    };
    fork(0..threads, &|thread| {
        while let Some(unit) = take(thread) {
            attend(unit);
            left.fetch_sub(1, Ordering::Release);
        }
        // A thread that is done first would soon be asleep, and late for the next step.
        let start = Instant::now();
        while left.load(Ordering::Acquire) > 0 && start.elapsed() < LONGEST_SPIN {
            (0..64).for_each(|_| std::hint::spin_loop());
            // The other may be waiting for this very core.
            std::thread::yield_now();
        }
    });
}

/// Calls `work` once for each of `threads`, on as many threads as are free. Does not allocate.
fn fork(threads: Range<usize>, work: &(impl Fn(usize) + Sync)) {
    if threads.len() > 1 {
        let middle = threads.start + threads.len() / 2;
        rayon::join(|| fork(threads.start..middle, work), || fork(middle..threads.end, work));
    } else {
        work(threads.start);
    }
}
