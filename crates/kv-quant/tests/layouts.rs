//! Layouts by brute force: every byte has one owner, custom strides are never wrongly accepted, offsets are wide.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

mod strategies;

use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, CacheView, Error, LayoutKind, MAX_BUFFERS, Plane, PlaneId,
    ScaleType, Side,
};
use proptest::prelude::*;
use strategies::{interleaved, layout};

/// The documented formula, in element units, written out again.
fn first_byte(layout: &CacheLayout, id: PlaneId, page: u64, slot: u64, head: u64, c: u64) -> u128 {
    let plane = layout.plane(id);
    let at = [(page, plane.page_stride), (slot, plane.slot_stride), (head, plane.head_stride)];
    let element = at.iter().map(|&(i, stride)| u128::from(i) * u128::from(stride)).sum::<u128>();
    (u128::from(plane.offset) + element + u128::from(c)) * u128::from(layout.element_bytes(id))
}

/// Every byte of every element, through the formula: (buffer, byte).
fn all_bytes(layout: &CacheLayout) -> Vec<(usize, u128)> {
    let mut bytes = Vec::new();
    for id in PlaneId::ALL {
        for page in 0..layout.num_pages() {
            for slot in 0..u64::from(layout.page_len()) {
                for head in 0..u64::from(layout.format().num_kv_heads()) {
                    for c in 0..u64::from(layout.row_len(id)) {
                        let first = first_byte(layout, id, page, slot, head, c);
                        let buffer_idx = layout.plane(id).buffer_idx;
                        bytes.extend(
                            (0..u128::from(layout.element_bytes(id))).map(|i| (buffer_idx, first + i)),
                        );
                    }
                }
            }
        }
    }
    bytes
}

fn assert_sound(layout: &CacheLayout) {
    let mut bytes = all_bytes(layout);
    for &(buffer_idx, byte) in &bytes {
        assert!(byte < u128::from(layout.buffer_bytes()[buffer_idx]), "buffer {buffer_idx} byte {byte}");
    }
    let count = bytes.len();
    bytes.sort_unstable();
    bytes.dedup();
    assert_eq!(bytes.len(), count, "two elements share a byte");
    assert_eq!(count as u64, layout.format().bytes_per_token() * layout.num_slots());
    // row_bytes is the formula, and rows of scales are aligned to their elements.
    for id in PlaneId::ALL {
        for slot in 0..layout.num_slots() {
            for head in 0..layout.format().num_kv_heads() {
                let (page_len, head_idx) = (u64::from(layout.page_len()), u64::from(head));
                let first = first_byte(layout, id, slot / page_len, slot % page_len, head_idx, 0);
                let (buffer_idx, range) = layout.row_bytes(id, slot, head);
                assert_eq!((buffer_idx, u128::from(range.start)), (layout.plane(id).buffer_idx, first));
                assert_eq!(range.end - range.start, u64::from(layout.row_len(id)) * layout.element_bytes(id));
                assert_eq!(range.start % layout.element_bytes(id), 0);
            }
        }
    }
}

fn format(heads: u32, dim: u32, k_group: u32, v_group: u32, scale_type: ScaleType) -> CacheFormat {
    CacheFormat::new(heads, dim, k_group, v_group, scale_type).unwrap()
}

proptest! {
    #[test]
    fn every_byte_has_one_owner(layout in layout(5, 5)) {
        assert_sound(&layout);
    }

    /// Random strides: whatever is accepted (about one in twenty) shares no byte.
    #[test]
    fn custom_strides_are_never_wrongly_accepted(
        pages in 1u64..4, page_len in 1u32..4, heads in 1u32..4,
        planes in prop::array::uniform4((0usize..3, 0u64..120, 0u64..400, 0u64..140, 0u64..70)),
        scale_type in prop::sample::select(ScaleType::ALL.to_vec()),
    ) {
        let format = format(heads, 16, 8, 16, scale_type);
        let planes = planes.map(|(buffer_idx, offset, page_stride, slot_stride, head_stride)| {
            Plane { buffer_idx, offset, page_stride, slot_stride, head_stride }
        });
        match CacheLayout::custom(format, pages, page_len, planes) {
            Ok(layout) => assert_sound(&layout),
            Err(error) => prop_assert!(matches!(error, Error::Overlap { .. }), "{error}"),
        }
    }

    /// The same near the edge of being right: strides of a sound layout, one number moved; nearly half are accepted.
    #[test]
    fn nearly_right_strides_are_never_wrongly_accepted(
        kind in 0usize..3, plane in 0usize..4, field in 0usize..5, delta in -40i64..40,
        pages in 1u64..4, page_len in 1u32..4, heads in 1u32..4,
    ) {
        let format = format(heads, 16, 8, 8, ScaleType::F16);
        let sound = match kind {
            0 => CacheLayout::native(format, pages, page_len).unwrap(),
            1 => CacheLayout::lightllm(format, pages).unwrap(),
            _ => interleaved(format, pages, page_len),
        };
        let mut planes = PlaneId::ALL.map(|id| *sound.plane(id));
        let moved = |x: u64| x.saturating_add_signed(delta);
        let p = &mut planes[plane];
        match field {
            0 => p.offset = moved(p.offset),
            1 => p.page_stride = moved(p.page_stride),
            2 => p.slot_stride = moved(p.slot_stride),
            3 => p.head_stride = moved(p.head_stride),
            _ => p.buffer_idx = (p.buffer_idx + delta.unsigned_abs() as usize) % MAX_BUFFERS,
        }
        if let Ok(layout) = CacheLayout::custom(format, pages, sound.page_len(), planes) {
            assert_sound(&layout);
        }
    }
}

#[test]
fn the_strides_of_every_named_layout_are_accepted_as_custom() {
    let format = format(3, 24, 8, 24, ScaleType::Bf16);
    for named in
        [CacheLayout::hnd(format, 3, 4), CacheLayout::nhd(format, 3, 4), CacheLayout::native(format, 3, 4)]
    {
        let named = named.unwrap();
        let planes = PlaneId::ALL.map(|id| *named.plane(id));
        let custom = CacheLayout::custom(format, 3, 4, planes).unwrap();
        // Custom strides say nothing of the padding behind the very last record.
        let padding = if named.kind() == LayoutKind::Native { 16 } else { 1 };
        for (custom, named) in custom.buffer_bytes().iter().zip(named.buffer_bytes()) {
            assert!(custom <= named && named - custom < padding);
        }
        assert_eq!(custom.kind(), LayoutKind::Custom);
        assert_eq!(custom.bytes_per_page(), custom.buffer_bytes().iter().sum::<u64>().div_ceil(3));
    }
}

#[test]
fn lightllm_is_the_documented_index() {
    // codes [slot, 2 * heads, dim], scales [slot, 2 * heads, dim / group], K heads first.
    let (slots, heads, dim, group) = (5u64, 3u64, 32u64, 8u64);
    let format = format(heads as u32, dim as u32, group as u32, group as u32, ScaleType::F16);
    let layout = CacheLayout::lightllm(format, slots).unwrap();
    assert_eq!(layout.buffer_bytes(), [slots * 2 * heads * dim, slots * 2 * heads * (dim / group) * 2]);
    assert_eq!((layout.page_len(), layout.num_slots()), (1, slots));
    for slot in 0..slots {
        for head in 0..heads {
            for (side, row) in [(Side::K, head), (Side::V, heads + head)] {
                let (buffer, codes) = layout.row_bytes(PlaneId::Codes(side), slot, head as u32);
                let start = (slot * 2 * heads + row) * dim;
                assert_eq!((buffer, codes), (0, start..start + dim));
                let (buffer, scales) = layout.row_bytes(PlaneId::Scales(side), slot, head as u32);
                let start = (slot * 2 * heads + row) * (dim / group) * 2;
                assert_eq!((buffer, scales), (1, start..start + dim / group * 2));
            }
        }
    }
}

#[test]
fn the_worked_examples_of_the_documentation() {
    // docs/int8-format.md: channel 40 (group 1) of head 1 at page 2, slot 5, 16 slots a page.
    let format = format(2, 64, 32, 32, ScaleType::F16);
    let paged = 2 * 16 + 5;
    for (layout, slot, want) in [
        (CacheLayout::hnd(format, 4, 16), paged, [5480, 5480, 342, 342]),
        (CacheLayout::nhd(format, 4, 16), paged, [4840, 4840, 302, 302]),
        (CacheLayout::lightllm(format, 64), 37, [9576, 9704, 598, 606]),
        (CacheLayout::native(format, 4, 16), paged, [13240, 14520, 13266, 14546]),
    ] {
        let layout = layout.unwrap();
        let bytes = PlaneId::ALL.map(|id| {
            let within = if matches!(id, PlaneId::Codes(_)) { 40 } else { 2 };
            layout.row_bytes(id, slot, 1).1.start + within
        });
        assert_eq!(bytes, want, "{}", layout.kind());
    }
    let native = CacheLayout::native(format, 4, 16).unwrap();
    let strides = PlaneId::ALL.map(|id| {
        let p = native.plane(id);
        [p.offset, p.page_stride, p.slot_stride, p.head_stride]
    });
    assert_eq!(
        strides,
        [[0, 5120, 80, 2560], [1280, 5120, 80, 2560], [32, 2560, 40, 1280], [672, 2560, 40, 1280]]
    );
}

#[test]
fn native_records_are_one_piece() {
    let format = format(2, 128, 8, 8, ScaleType::F16);
    for page_len in [1u32, 16] {
        let layout = CacheLayout::native(format, 4, page_len).unwrap();
        for slot in 0..layout.num_slots() {
            for head in 0..2 {
                let row = |id| layout.row_bytes(id, slot, head).1;
                let (k, v) = (row(PlaneId::Codes(Side::K)), row(PlaneId::Codes(Side::V)));
                assert_eq!(row(PlaneId::Scales(Side::K)).start, k.end);
                assert_eq!(row(PlaneId::Scales(Side::V)).start, v.end);
                assert_eq!((k.start % 16, v.start % 16), (0, 0));
                // page_len 1: the K and the V record of a head are neighbours, 320 bytes.
                assert_eq!(v.start - k.start, 160 * u64::from(page_len));
            }
        }
    }
}

#[test]
fn offsets_beyond_32_bits() {
    let format = format(8, 128, 8, 8, ScaleType::F32);
    // 2^21 pages of 16 slots of 8 heads of 128 channels: 2^35 codes a plane.
    let pages = 1u64 << 21;
    for layout in [CacheLayout::hnd(format, pages, 16), CacheLayout::nhd(format, pages, 16)] {
        let layout = layout.unwrap();
        assert_eq!(layout.buffer_bytes(), [1 << 35, 1 << 35, 1 << 34, 1 << 34]);
        for id in PlaneId::ALL {
            for slot in [0, 1 << 17, (1 << 18) + 5, layout.num_slots() - 1] {
                for head in [0u32, 7] {
                    let first = first_byte(&layout, id, slot / 16, slot % 16, u64::from(head), 0);
                    assert_eq!(u128::from(layout.row_bytes(id, slot, head).1.start), first);
                }
            }
        }
        let (_, last) = layout.row_bytes(PlaneId::Codes(Side::V), layout.num_slots() - 1, 7);
        assert_eq!(last.end, 1 << 35);
        assert!(last.start > u64::from(u32::MAX));
    }
    let layout = CacheLayout::native(format, pages, 16).unwrap();
    let (_, last) = layout.row_bytes(PlaneId::Scales(Side::V), layout.num_slots() - 1, 7);
    assert_eq!(last.end, layout.buffer_bytes()[0]);
    assert_eq!(layout.buffer_bytes(), [(1 << 25) * 8 * 2 * 192]);
    // LightLLM's buffer at the first slot past 2^31 and past 2^32 elements.
    let layout = CacheLayout::lightllm(format, 3 << 20).unwrap();
    for slot in [1u64 << 20, 1 << 21] {
        let (_, row) = layout.row_bytes(PlaneId::Codes(Side::K), slot, 0);
        assert_eq!(row.start, slot * 2 * 8 * 128);
    }
    assert_eq!(layout.row_bytes(PlaneId::Codes(Side::K), 1 << 20, 0).1.start, 1 << 31);
    assert_eq!(layout.row_bytes(PlaneId::Codes(Side::K), 1 << 21, 0).1.start, 1 << 32);
    // Nothing was allocated, and what cannot be is a typed error.
    let huge = CacheLayout::hnd(format, i32::MAX as u64, 65536).unwrap();
    assert!(matches!(CacheBuffers::zeroed(&huge), Err(Error::TooLarge { buffer_idx: 0, .. })));
}

#[test]
fn planning_counts_whole_pages() {
    let format = format(8, 128, 8, 8, ScaleType::F16);
    assert_eq!(format.bytes_per_token(), 8 * 2 * (128 + 32));
    for layout in [
        CacheLayout::lightllm(format, 64).unwrap(),
        CacheLayout::hnd(format, 4, 16).unwrap(),
        CacheLayout::nhd(format, 4, 16).unwrap(),
        CacheLayout::native(format, 4, 16).unwrap(),
        CacheLayout::native(CacheFormat::new(3, 17, 17, 17, ScaleType::F32).unwrap(), 4, 16).unwrap(),
    ] {
        let page = layout.bytes_per_page();
        assert_eq!(page * layout.num_pages(), layout.buffer_bytes().iter().sum::<u64>());
        let page_len = u64::from(layout.page_len());
        assert_eq!(layout.tokens_in(5 * page), 5 * page_len);
        assert_eq!(layout.tokens_in(5 * page - 1), 4 * page_len);
        assert_eq!(layout.tokens_in(0), 0);
        let planned = layout.kind().tokens_in(layout.format(), layout.page_len(), 5 * page);
        assert_eq!(planned, Some(5 * page_len));
    }
    assert_eq!(LayoutKind::Custom.tokens_in(&format, 16, 1 << 30), None);
    assert_eq!(LayoutKind::Native.tokens_in(&format, 0, 1 << 30), None);
}

#[test]
fn refused_formats_and_layouts() {
    let new = |heads, dim, k, v| CacheFormat::new(heads, dim, k, v, ScaleType::F16).unwrap_err();
    assert_eq!(new(0, 64, 8, 8), Error::NumKvHeads(0));
    assert_eq!(new(65536, 64, 8, 8), Error::NumKvHeads(65536));
    for head_dim in [0, 8, 15, 257, 512] {
        assert_eq!(new(1, head_dim, 8, 8), Error::HeadDim { head_dim });
    }
    for group_len in [0, 1, 4, 7, 24, 48, 256] {
        assert_eq!(new(1, 96, group_len, 8), Error::GroupLen { side: Side::K, group_len, head_dim: 96 });
        assert_eq!(new(1, 96, 8, group_len), Error::GroupLen { side: Side::V, group_len, head_dim: 96 });
    }
    assert_eq!(new(1, 20, 8, 8), Error::GroupLen { side: Side::K, group_len: 8, head_dim: 20 });
    for (head_dim, group_len) in [(16, 8), (17, 17), (80, 80), (96, 32), (112, 16), (256, 128), (256, 256)] {
        assert!(CacheFormat::new(1, head_dim, group_len, group_len, ScaleType::F16).is_ok());
    }

    let format = format(2, 64, 8, 8, ScaleType::F16);
    assert_eq!(CacheLayout::hnd(format, 1, 0), Err(Error::PageLen(0)));
    assert_eq!(CacheLayout::nhd(format, 1, 65537), Err(Error::PageLen(65537)));
    assert_eq!(CacheLayout::native(format, 0, 16), Err(Error::NumPages(0)));
    assert_eq!(CacheLayout::lightllm(format, 1 << 31), Err(Error::NumPages(1 << 31)));
    let mixed = CacheFormat::new(2, 64, 8, 16, ScaleType::F16).unwrap();
    let want = Error::GroupLen { side: Side::V, group_len: 16, head_dim: 64 };
    assert_eq!(CacheLayout::lightllm(mixed, 4), Err(want));
    let good = CacheLayout::hnd(format, 2, 4).unwrap();
    let planes = PlaneId::ALL.map(|id| *good.plane(id));
    let with = |i: usize, change: &dyn Fn(&mut Plane)| {
        let mut planes = planes;
        change(&mut planes[i]);
        CacheLayout::custom(format, 2, 4, planes)
    };
    let want = Error::BufferIndex { plane: PlaneId::Codes(Side::V), buffer_idx: 4, max: 4 };
    assert_eq!(with(1, &|p| p.buffer_idx = 4), Err(want));
    for huge in [u64::MAX, 1 << 63, i64::MAX as u64] {
        assert!(matches!(with(0, &|p| p.page_stride = huge), Err(Error::TooLarge { buffer_idx: 0, .. })));
        assert!(matches!(with(2, &|p| p.offset = huge), Err(Error::TooLarge { buffer_idx: 2, .. })));
    }
    let (k, v) = (PlaneId::Codes(Side::K), PlaneId::Codes(Side::V));
    let want = Error::Overlap { first: k, second: v, buffer_idx: 0 };
    assert_eq!(with(1, &|p| p.buffer_idx = 0), Err(want));
    let want = Error::Overlap { first: k, second: k, buffer_idx: 0 };
    assert_eq!(with(0, &|p| p.slot_stride = 63), Err(want));

    let bytes = good.buffer_bytes().iter().map(|&n| vec![0u8; n as usize]).collect::<Vec<_>>();
    let mut views: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
    assert!(CacheView::new(&good, &views).is_ok());
    assert_eq!(CacheView::new(&good, &views[..3]).unwrap_err(), Error::BufferCount { got: 3, want: 4 });
    views[3] = &views[3][1..];
    let want = Error::BufferLen { buffer_idx: 3, got: views[3].len() as u64, want: bytes[3].len() as u64 };
    assert_eq!(CacheView::new(&good, &views).unwrap_err(), want);
}
