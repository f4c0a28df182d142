//! Masks by brute force, and one refusal for each thing that can be wrong with a request.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use attn_plan::{DecodeRequest, DecodeSpec, Error, MAX_Q_HEADS, MAX_Q_LEN, PageRows, PageTable};
use kv_quant::{CacheFormat, CacheLayout, ScaleType};

/// The rule as the documentation states it, token by token.
fn sees(spec: &DecodeSpec, kv_len: u32, q_idx: u32, token: u32) -> bool {
    let position = i64::from(kv_len) - i64::from(spec.q_len) + i64::from(q_idx);
    let token = i64::from(token);
    token <= position && spec.window.is_none_or(|window| token > position - i64::from(window))
}

#[test]
fn visible_is_the_rule_for_every_small_case() {
    for q_len in 1..6 {
        for window in [None, Some(1), Some(2), Some(3), Some(7), Some(100), Some(u32::MAX)] {
            let spec = DecodeSpec { q_len, window, ..DecodeSpec::new(2, 1, 64) };
            for kv_len in 0..12 {
                let mut any = vec![false; kv_len as usize];
                for q_idx in 0..q_len {
                    let range = spec.visible(kv_len, q_idx);
                    assert!(range.start <= range.end && range.end <= kv_len);
                    for token in 0..kv_len {
                        assert_eq!(
                            range.contains(&token),
                            sees(&spec, kv_len, q_idx, token),
                            "{spec} {kv_len} {q_idx}"
                        );
                        any[token as usize] |= range.contains(&token);
                    }
                }
                let range = spec.visible_any(kv_len);
                for token in 0..kv_len {
                    assert_eq!(range.contains(&token), any[token as usize], "{spec} {kv_len} {token}");
                }
            }
        }
    }
}

#[test]
fn visible_at_the_edges_of_u32() {
    let spec = DecodeSpec { q_len: 3, window: Some(10), ..DecodeSpec::new(2, 1, 64) };
    assert_eq!(spec.visible(u32::MAX, 2), u32::MAX - 10..u32::MAX);
    assert_eq!(spec.visible(u32::MAX, 0), u32::MAX - 12..u32::MAX - 2);
    assert_eq!(spec.visible_any(u32::MAX), u32::MAX - 12..u32::MAX);
    // Fewer tokens than queries: the first rows stand before the sequence and see nothing.
    assert!(spec.visible(2, 0).is_empty());
    assert_eq!(spec.visible(2, 1), 0..1);
    assert_eq!(spec.visible(2, 2), 0..2);
    assert!(spec.visible_any(0).is_empty());
}

fn layout() -> CacheLayout {
    let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16).unwrap();
    CacheLayout::hnd(format, 10, 16).unwrap()
}

fn refusal(spec: &DecodeSpec) -> Error {
    spec.check().unwrap_err()
}

#[test]
fn refused_specs() {
    let good = DecodeSpec::new(6, 2, 64);
    assert_eq!(good.check(), Ok(()));
    assert_eq!(good.gqa_group(), 3);
    let with = |change: &dyn Fn(&mut DecodeSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        refusal(&spec)
    };
    assert_eq!(with(&|s| s.num_kv_heads = 0), Error::NumKvHeads(0));
    assert_eq!(with(&|s| s.num_kv_heads = 65536), Error::NumKvHeads(65536));
    for num_q_heads in [0, 1, 7, MAX_Q_HEADS + 2] {
        let want = Error::NumQHeads { num_q_heads, num_kv_heads: 2, max: MAX_Q_HEADS };
        assert_eq!(with(&|s| s.num_q_heads = num_q_heads), want);
    }
    assert_eq!(with(&|s| s.head_dim = 15), Error::HeadDim(15));
    assert_eq!(with(&|s| s.head_dim = 257), Error::HeadDim(257));
    assert_eq!(with(&|s| s.q_len = 0), Error::QLen { q_len: 0, max: MAX_Q_LEN });
    assert_eq!(with(&|s| s.q_len = MAX_Q_LEN + 1), Error::QLen { q_len: MAX_Q_LEN + 1, max: MAX_Q_LEN });
    assert_eq!(with(&|s| s.softmax_scale = f32::INFINITY), Error::SoftmaxScale(f32::INFINITY));
    assert!(matches!(with(&|s| s.softmax_scale = f32::NAN), Error::SoftmaxScale(x) if x.is_nan()));
    assert_eq!(with(&|s| s.window = Some(0)), Error::Window);
    for cap in [0.0, -1.0, f32::INFINITY] {
        assert_eq!(with(&|s| s.soft_cap = Some(cap)), Error::SoftCap(cap));
    }
    assert!(matches!(with(&|s| s.soft_cap = Some(f32::NAN)), Error::SoftCap(x) if x.is_nan()));
    assert_eq!(
        with(&|s| s.alibi_slopes = Some(vec![0.5; 2])),
        Error::PerHead { what: "alibi_slopes", got: 2, want: 6 }
    );
    assert_eq!(with(&|s| s.sinks = Some(vec![])), Error::PerHead { what: "sinks", got: 0, want: 6 });
    let mut sinks = vec![0.0; 6];
    sinks[4] = f32::INFINITY;
    let want = Error::PerHeadValue { what: "sinks", head: 4, value: f32::INFINITY };
    assert_eq!(with(&|s| s.sinks = Some(sinks.clone())), want);
}

fn check(spec: &DecodeSpec, kv_lens: &[u32], page_table: PageTable<'_>) -> Result<(), Error> {
    DecodeRequest { spec, kv_lens, page_table }.check(&layout())
}

#[test]
fn refused_requests() {
    let spec = DecodeSpec::new(6, 2, 64);
    let pages = [0, 1, 2, 3, 9, 8];
    let padded = PageTable::padded(&pages, 3);
    assert_eq!(check(&spec, &[48, 33], padded), Ok(()));
    assert_eq!(check(&spec, &[0, 0], PageTable::padded(&[], 0)), Ok(()));
    let wrong_heads = DecodeSpec::new(6, 3, 64);
    let want = Error::CacheMismatch { what: "num_kv_heads", spec: 3, cache: 2 };
    assert_eq!(check(&wrong_heads, &[1], padded), Err(want));
    let want = Error::CacheMismatch { what: "head_dim", spec: 128, cache: 64 };
    assert_eq!(check(&DecodeSpec::new(6, 2, 128), &[1], padded), Err(want));
    assert_eq!(
        check(&DecodeSpec { q_len: 0, ..spec.clone() }, &[1], padded).unwrap_err(),
        refusal(&DecodeSpec { q_len: 0, ..spec.clone() })
    );
    let ragged = PageTable { pages: &pages, rows: PageRows::Starts(&[0, 3, 5]) };
    assert_eq!(check(&spec, &[1, 1], ragged), Err(Error::PageRowCount { got: 3, want: 2 }));
    assert_eq!(check(&spec, &[48, 32, 16], ragged), Ok(()));
    let want = Error::PageTableShort { request: 2, kv_len: 17, need: 2, start: 5, have: 6 };
    assert_eq!(check(&spec, &[48, 32, 17], ragged), Err(want));
    let far = PageTable { pages: &pages, rows: PageRows::Starts(&[u64::MAX]) };
    let want = Error::PageTableShort { request: 0, kv_len: 1, need: 1, start: u64::MAX, have: 6 };
    assert_eq!(check(&spec, &[1], far), Err(want));
    let want = Error::PageRowStride { request: 1, kv_len: 49, need: 4, stride: 3 };
    assert_eq!(check(&spec, &[1, 49], padded), Err(want));
    let huge = PageTable::padded(&pages, u64::MAX / 2);
    assert!(matches!(check(&spec, &[1, 1], huge), Err(Error::PageTableShort { request: 1, .. })));
    for bad in [-1, 10, i32::MAX, i32::MIN] {
        let pages = [0, 1, bad, 3];
        let want = Error::PageOutOfRange { request: 0, position: 2, page: bad, num_pages: 10 };
        assert_eq!(check(&spec, &[33], PageTable::padded(&pages, 4)), Err(want));
        // The same entry past the end is never looked at.
        assert_eq!(check(&spec, &[32], PageTable::padded(&pages, 4)), Ok(()));
    }
}

#[test]
fn pages_before_every_window_may_be_gone() {
    let spec = DecodeSpec { window: Some(16), ..DecodeSpec::new(6, 2, 64) };
    let pages = [-1, -1, 5, 6];
    // 64 tokens: the window is 48..64, page 3 alone; 48: 32..48, page 2 alone; 47: 31..47, page 1 too.
    assert_eq!(check(&spec, &[64], PageTable::padded(&pages, 4)), Ok(()));
    assert_eq!(check(&spec, &[48], PageTable::padded(&pages, 4)), Ok(()));
    let want = Error::PageOutOfRange { request: 0, position: 1, page: -1, num_pages: 10 };
    assert_eq!(check(&spec, &[47], PageTable::padded(&pages, 4)), Err(want));
    // A second query row looks one token further back.
    let spec = DecodeSpec { q_len: 2, ..spec };
    let want = Error::PageOutOfRange { request: 0, position: 1, page: -1, num_pages: 10 };
    assert_eq!(check(&spec, &[48], PageTable::padded(&pages, 4)), Err(want));
}

#[test]
fn slots_of_the_page_table() {
    let table = PageTable { pages: &[7, 3, -1], rows: PageRows::Starts(&[0, 1]) };
    assert_eq!(table.slot(0, 17, 16), Some(3 * 16 + 1));
    assert_eq!(table.slot(1, 0, 16), Some(48));
    assert_eq!(table.slot(1, 16, 16), None, "a negative page is no slot");
    assert_eq!(table.slot(1, 32, 16), None, "past the table");
    assert_eq!(table.slot(2, 0, 16), None, "no such request");
}
