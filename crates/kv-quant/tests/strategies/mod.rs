//! A strategy of valid layouts, shared by test files.

use kv_quant::{CacheFormat, CacheLayout, Plane, ScaleType, Side};
use proptest::prelude::*;

/// K and V rows side by side, padding between pages: an arrangement that is none of the named ones.
pub fn interleaved(format: CacheFormat, num_pages: u64, page_len: u32) -> CacheLayout {
    let (heads, slots) = (u64::from(format.num_kv_heads()), u64::from(page_len));
    let plane = |buffer_idx, offset, pair: u64, padding| Plane {
        buffer_idx,
        offset,
        page_stride: slots * heads * pair + padding,
        slot_stride: heads * pair,
        head_stride: pair,
    };
    let dim = u64::from(format.head_dim());
    let (k, v) = (u64::from(format.num_groups(Side::K)), u64::from(format.num_groups(Side::V)));
    let planes = [
        plane(0, 3, 2 * dim, 8),
        plane(0, 3 + dim, 2 * dim, 8),
        plane(1, 0, k + v, 2),
        plane(1, k, k + v, 2),
    ];
    CacheLayout::custom(format, num_pages, page_len, planes).unwrap()
}

/// Every kind of layout, small: below `max_pages` pages of fewer than `max_page_len` slots.
pub fn layout(max_pages: u64, max_page_len: u32) -> impl Strategy<Value = CacheLayout> {
    let shape = prop::sample::select(vec![(1u32, 16u32), (2, 24), (3, 16), (1, 64), (2, 17), (2, 32)]);
    let scale_type = prop::sample::select(ScaleType::ALL.to_vec());
    (0usize..5, shape, any::<[bool; 2]>(), scale_type, 1..max_pages, 1..max_page_len).prop_map(
        |(kind, (heads, dim), whole, scale_type, num_pages, page_len)| {
            let group_len = |whole| if whole || dim % 8 != 0 { dim } else { 8 };
            let k_group = group_len(whole[0]);
            // LightLLM's buffer has one group length.
            let v_group = if kind == 0 { k_group } else { group_len(whole[1]) };
            let format = CacheFormat::new(heads, dim, k_group, v_group, scale_type).unwrap();
            match kind {
                0 => CacheLayout::lightllm(format, num_pages * 3).unwrap(),
                1 => CacheLayout::hnd(format, num_pages, page_len).unwrap(),
                2 => CacheLayout::nhd(format, num_pages, page_len).unwrap(),
                3 => CacheLayout::native(format, num_pages, page_len).unwrap(),
                _ => interleaved(format, num_pages, page_len),
            }
        },
    )
}
