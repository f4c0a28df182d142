//! Specs, batches, page tables, schedules and workspaces that mean nothing.

use super::bench::{Bench, Seen};
use super::rows;
use attn_plan::{Error, SplitPolicy};

fn config(bench: &mut Bench, policy: SplitPolicy) -> Seen {
    bench.config.policy = policy;
    bench.plan()
}

rows! {
    "no kv heads" => Seen::Plan(Error::NumKvHeads(0)), |b| { b.spec.num_kv_heads = 0; b.decode() };
    "65536 kv heads" => Seen::Plan(Error::NumKvHeads(65536)), |b| { b.spec.num_kv_heads = 65536; b.decode() };
    "no query heads" => Seen::Plan(Error::NumQHeads { num_q_heads: 0, .. }), |b| { b.spec.num_q_heads = 0; b.decode() };
    "query heads not a multiple of kv heads" => Seen::Plan(Error::NumQHeads { num_q_heads: 5, num_kv_heads: 2, .. }),
        |b| { b.spec.num_q_heads = 5; b.decode() };
    "fewer query heads than kv heads" => Seen::Plan(Error::NumQHeads { num_q_heads: 1, .. }),
        |b| { b.spec.num_q_heads = 1; b.decode() };
    "u32::MAX query heads" => Seen::Plan(Error::NumQHeads { .. }), |b| { b.spec.num_q_heads = u32::MAX - 1; b.decode() };
    "spec head_dim zero" => Seen::Plan(Error::HeadDim(0)), |b| { b.spec.head_dim = 0; b.decode() };
    "spec head_dim 257" => Seen::Plan(Error::HeadDim(257)), |b| { b.spec.head_dim = 257; b.decode() };
    "spec head_dim is not the cache's" => Seen::Plan(Error::CacheMismatch { what: "head_dim", spec: 64, cache: 32 }),
        |b| { b.spec.head_dim = 64; b.decode() };
    "spec kv heads are not the cache's"
        => Seen::Plan(Error::CacheMismatch { what: "num_kv_heads", spec: 4, cache: 2 }),
        |b| { b.spec.num_kv_heads = 4; b.decode() };
    "q_len zero" => Seen::Plan(Error::QLen { q_len: 0, .. }), |b| { b.spec.q_len = 0; b.decode() };
    "q_len 1025" => Seen::Plan(Error::QLen { q_len: 1025, .. }), |b| { b.spec.q_len = 1025; b.decode() };
    "q_len u32::MAX" => Seen::Plan(Error::QLen { q_len: u32::MAX, .. }), |b| { b.spec.q_len = u32::MAX; b.decode() };
    "softmax_scale NaN" => Seen::Plan(Error::SoftmaxScale(_)), |b| { b.spec.softmax_scale = f32::NAN; b.decode() };
    "softmax_scale infinite" => Seen::Plan(Error::SoftmaxScale(_)),
        |b| { b.spec.softmax_scale = f32::INFINITY; b.decode() };
    "softmax_scale negative infinite" => Seen::Plan(Error::SoftmaxScale(_)),
        |b| { b.spec.softmax_scale = f32::NEG_INFINITY; b.decode() };
    "window of no tokens" => Seen::Plan(Error::Window), |b| { b.spec.window = Some(0); b.decode() };
    "soft_cap zero" => Seen::Plan(Error::SoftCap(_)), |b| { b.spec.soft_cap = Some(0.0); b.decode() };
    "soft_cap negative" => Seen::Plan(Error::SoftCap(_)), |b| { b.spec.soft_cap = Some(-30.0); b.decode() };
    "soft_cap NaN" => Seen::Plan(Error::SoftCap(_)), |b| { b.spec.soft_cap = Some(f32::NAN); b.decode() };
    "soft_cap infinite" => Seen::Plan(Error::SoftCap(_)), |b| { b.spec.soft_cap = Some(f32::INFINITY); b.decode() };
    "no alibi slopes in the array" => Seen::Plan(Error::PerHead { what: "alibi_slopes", got: 0, want: 4 }),
        |b| { b.spec.alibi_slopes = Some(vec![]); b.decode() };
    "alibi slopes for kv heads only" => Seen::Plan(Error::PerHead { what: "alibi_slopes", got: 2, want: 4 }),
        |b| { b.spec.alibi_slopes = Some(vec![0.5; 2]); b.decode() };
    "one alibi slope too many" => Seen::Plan(Error::PerHead { what: "alibi_slopes", got: 5, .. }),
        |b| { b.spec.alibi_slopes = Some(vec![0.5; 5]); b.decode() };
    "alibi slope NaN" => Seen::Plan(Error::PerHeadValue { what: "alibi_slopes", head: 3, .. }),
        |b| { b.spec.alibi_slopes = Some(vec![0.5, 0.5, 0.5, f32::NAN]); b.decode() };
    "one sink too few" => Seen::Plan(Error::PerHead { what: "sinks", got: 3, want: 4 }),
        |b| { b.spec.sinks = Some(vec![0.0; 3]); b.decode() };
    "sink infinite" => Seen::Plan(Error::PerHeadValue { what: "sinks", head: 0, .. }),
        |b| { b.spec.sinks = Some(vec![f32::INFINITY, 0.0, 0.0, 0.0]); b.decode() };
    "sink negative infinite" => Seen::Plan(Error::PerHeadValue { what: "sinks", head: 1, .. }),
        |b| { b.spec.sinks = Some(vec![0.0, f32::NEG_INFINITY, 0.0, 0.0]); b.decode() };
    "sink NaN" => Seen::Plan(Error::PerHeadValue { what: "sinks", head: 2, .. }),
        |b| { b.spec.sinks = Some(vec![0.0, 0.0, f32::NAN, 0.0]); b.decode() };

    "page index is num_pages" => Seen::Plan(Error::PageOutOfRange { request: 0, position: 2, page: 8, num_pages: 8 }),
        |b| { b.pages[2] = 8; b.decode() };
    "page index -1 within the length" => Seen::Plan(Error::PageOutOfRange { request: 2, position: 1, page: -1, .. }),
        |b| { b.pages[7] = -1; b.decode() };
    "page index i32::MAX" => Seen::Plan(Error::PageOutOfRange { page: i32::MAX, .. }),
        |b| { b.pages[0] = i32::MAX; b.decode() };
    "page index i32::MIN" => Seen::Plan(Error::PageOutOfRange { page: i32::MIN, .. }),
        |b| { b.pages[6] = i32::MIN; b.decode() };
    "length beyond the row" => Seen::Plan(Error::PageRowStride { request: 0, kv_len: 13, need: 4, stride: 3 }),
        |b| { b.kv_lens[0] = 13; b.decode() };
    "length u32::MAX" => Seen::Plan(Error::PageRowStride { request: 2, kv_len: u32::MAX, .. }),
        |b| { b.kv_lens[2] = u32::MAX; b.decode() };
    "length reaches an unset page" => Seen::Plan(Error::PageOutOfRange { request: 1, position: 0, page: -1, .. }),
        |b| { b.kv_lens[1] = 1; b.decode() };
    "page table one entry short" => Seen::Plan(Error::PageTableShort { request: 2, .. }),
        |b| { b.pages.truncate(7); b.decode() };
    "page table empty" => Seen::Plan(Error::PageTableShort { request: 0, have: 0, .. }),
        |b| { b.pages.clear(); b.decode() };
    "page rows of no entries" => Seen::Plan(Error::PageRowStride { stride: 0, .. }),
        |b| { b.page_stride = 0; b.decode() };
    "page row stride overflows" => Seen::Plan(Error::PageTableShort { request: 2, .. }),
        |b| { b.page_stride = u64::MAX; b.decode() };
    "more lengths than rows" => Seen::Plan(Error::PageTableShort { request: 3, .. }),
        |b| { b.kv_lens.push(1); b.decode() };
    "no row starts" => Seen::Plan(Error::PageRowCount { got: 0, want: 3 }),
        |b| { b.page_starts = Some(vec![]); b.decode() };
    "one row start too many" => Seen::Plan(Error::PageRowCount { got: 4, want: 3 }),
        |b| { b.page_starts = Some(vec![0, 3, 6, 9]); b.decode() };
    "row start at the end" => Seen::Plan(Error::PageTableShort { request: 2, start: 9, .. }),
        |b| { b.page_starts = Some(vec![0, 3, 9]); b.decode() };
    "row start u64::MAX" => Seen::Plan(Error::PageTableShort { request: 0, start: u64::MAX, .. }),
        |b| { b.page_starts = Some(vec![u64::MAX, 3, 6]); b.decode() };
    "row start one entry too late" => Seen::Plan(Error::PageOutOfRange { request: 0, position: 2, page: -1, .. }),
        |b| { b.page_starts = Some(vec![1, 3, 6]); b.decode() };

    "no workers" => Seen::Plan(Error::NumWorkers(0)), |b| { b.config.num_workers = 0; b.plan() };
    "too many workers" => Seen::Plan(Error::NumWorkers(_)), |b| { b.config.num_workers = (1 << 20) + 1; b.plan() };
    "u32::MAX workers" => Seen::Plan(Error::NumWorkers(u32::MAX)), |b| { b.config.num_workers = u32::MAX; b.plan() };
    "tile_len zero" => Seen::Plan(Error::TileLen(0)), |b| { b.config.tile_len = 0; b.plan() };
    "tile_len 65537" => Seen::Plan(Error::TileLen(65537)), |b| { b.config.tile_len = 65537; b.plan() };
    "split_len zero" => Seen::Plan(Error::SplitLen { split_len: 0, .. }),
        |b| config(b, SplitPolicy::BatchInvariant { split_len: 0 });
    "split_len below a tile" => Seen::Plan(Error::SplitLen { split_len: 3, tile_len: 4 }),
        |b| config(b, SplitPolicy::BatchInvariant { split_len: 3 });
    "split_len no multiple of the tile" => Seen::Plan(Error::SplitLen { split_len: 10, tile_len: 4 }),
        |b| config(b, SplitPolicy::BatchInvariant { split_len: 10 });
    "split_len u32::MAX" => Seen::Plan(Error::SplitLen { split_len: u32::MAX, .. }),
        |b| config(b, SplitPolicy::BatchInvariant { split_len: u32::MAX });
    "more work items than an index holds" => Seen::Plan(Error::TooManyItems(_)), |b| {
        b.config.tile_len = 1;
        b.kv_lens = vec![u32::MAX; 2];
        config(b, SplitPolicy::BatchInvariant { split_len: 1 })
    };
    "workspace overflows in rows" => Seen::Plan(Error::WorkspaceOverflow), |b| b.workspace(u64::MAX);
    "workspace overflows in bytes" => Seen::Plan(Error::WorkspaceOverflow), |b| b.workspace(1 << 55);
}
