//! Parameters of decode stage 1 and stage 2. Twin: `cuda/params/decode.h`.

use bytemuck::{Pod, Zeroable};

use super::{PagedCache, assert_layout};

/// What was complete before the kernel that was queued before a decode could begin: it is read while that kernel still runs.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ready {
    /// Nothing: all is read once that kernel has ended.
    #[default]
    Nothing = 0,
    /// The plan, the lengths and the page table, as they are when copied from the host.
    Tables = 1,
    /// These, and all cached tokens but the last `q_len` of each request. So it is behind an append of `q_len` tokens a
    /// request, which begins when all before it has ended, and behind kernels that do not write the cache and began so.
    History = 2,
}

/// The one argument of `stage1` and `stage2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct DecodeParams {
    /// The cache that is read.
    pub cache: PagedCache,
    /// `[batch, q_len, num_q_heads, head_dim]` of `q_type`.
    pub q: u64,
    /// `[batch, q_len, num_q_heads, head_dim]` of `out_type`.
    pub out: u64,
    /// f32 `[batch, q_len, num_q_heads]`, natural log; may be 0.
    pub lse: u64,
    /// u32 `[batch]`, counts the `q_len` new tokens.
    pub kv_lens: u64,
    /// `WorkItem`, of all workers.
    pub items: u64,
    /// u32 `[workers + 1]`.
    pub worker_starts: u64,
    /// u32 `[batch + 1]`.
    pub request_partials: u64,
    /// f32 `[num_partials, num_q_heads, q_len, head_dim]`.
    pub partial_o: u64,
    /// f32 `[num_partials, num_q_heads, q_len, 2]` = (m in base 2, l).
    pub partial_ml: u64,
    /// f32 `[num_q_heads]`; may be 0.
    pub alibi_slopes: u64,
    /// f32 `[num_q_heads]`; may be 0.
    pub sinks: u64,
    /// [`ErrorRecord`](super::ErrorRecord).
    pub error: u64,
    /// Requests.
    pub batch: u32,
    /// New tokens a request.
    pub q_len: u32,
    /// Query heads; a multiple of `cache.num_kv_heads`.
    pub num_q_heads: u32,
    /// Query heads a kv head.
    pub gqa_group: u32,
    /// A [`FloatType`](kv_quant::FloatType).
    pub q_type: u32,
    /// A [`FloatType`](kv_quant::FloatType).
    pub out_type: u32,
    /// 0 = none, else tokens visible including the query's own.
    pub window: u32,
    /// Factor of q.k.
    pub softmax_scale: f32,
    /// 0 = none.
    pub soft_cap: f32,
    /// Partials that `partial_o` and `partial_ml` hold.
    pub partial_capacity: u32,
    /// A [`Ready`].
    pub ready: u32,
    /// 0: by the plan. Else blocks of a cluster, which share out one request.
    pub num_shares: u32,
    /// 1: all that the device holds of stage 1 at once is needed, and room that its first blocks leave is kept for others of their kind.
    pub fills_device: u32,
    /// 0.
    pub reserved: u32,
}
assert_layout!(DecodeParams, size 184 + 12 * 8 + 14 * 4, align 8, {
    cache @ 0, q @ 184, out @ 192, lse @ 200, kv_lens @ 208, items @ 216, worker_starts @ 224,
    request_partials @ 232, partial_o @ 240, partial_ml @ 248, alibi_slopes @ 256, sinks @ 264, error @ 272,
    batch @ 280, q_len @ 284, num_q_heads @ 288, gqa_group @ 292, q_type @ 296, out_type @ 300,
    window @ 304, softmax_scale @ 308, soft_cap @ 312, partial_capacity @ 316, ready @ 320, num_shares @ 324,
    fills_device @ 328, reserved @ 332,
});
