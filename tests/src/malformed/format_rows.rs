//! Formats, layouts and buffers that mean nothing.

use super::bench::{Bench, Seen};
use super::rows;
use kv_quant::{CacheFormat, CacheLayout, CacheView, CacheViewMut, Error, Plane, ScaleType, Side};

fn format(num_kv_heads: u32, head_dim: u32, k_group_len: u32, v_group_len: u32) -> Seen {
    CacheFormat::new(num_kv_heads, head_dim, k_group_len, v_group_len, ScaleType::F16).into()
}

fn small() -> CacheFormat {
    CacheFormat::new(2, 32, 8, 8, ScaleType::F16).expect("a valid format")
}

/// A valid custom layout of 4 pages of 2 slots, broken by `change`.
fn custom(change: impl FnOnce(&mut [Plane; 4])) -> Seen {
    let plane = |buffer_idx, row: u64| Plane {
        buffer_idx,
        offset: 0,
        page_stride: 4 * row,
        slot_stride: 2 * row,
        head_stride: row,
    };
    let mut planes = [plane(0, 32), plane(1, 32), plane(2, 4), plane(3, 4)];
    change(&mut planes);
    CacheLayout::custom(small(), 4, 2, planes).into()
}

fn view(bench: &Bench, change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Seen {
    let mut buffers: Vec<Vec<u8>> =
        bench.layout.buffer_bytes().iter().map(|&n| vec![0; n as usize]).collect();
    change(&mut buffers);
    let read: Vec<&[u8]> = buffers.iter().map(Vec::as_slice).collect();
    let seen: Seen = CacheView::new(&bench.layout, &read).into();
    let write: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    let seen_mut: Seen = CacheViewMut::new(&bench.layout, write).into();
    assert_eq!(seen.to_string(), seen_mut.to_string(), "reading and writing views check alike");
    seen
}

rows! {
    "format without kv heads" => Seen::Quant(Error::NumKvHeads(0)), |_| format(0, 64, 8, 8);
    "format with 65536 kv heads" => Seen::Quant(Error::NumKvHeads(65536)), |_| format(65536, 64, 8, 8);
    "format with u32::MAX kv heads" => Seen::Quant(Error::NumKvHeads(u32::MAX)), |_| format(u32::MAX, 64, 8, 8);
    "head_dim zero" => Seen::Quant(Error::HeadDim { head_dim: 0 }), |_| format(1, 0, 8, 8);
    "head_dim below the least" => Seen::Quant(Error::HeadDim { head_dim: 8 }), |_| format(1, 8, 8, 8);
    "head_dim above the most" => Seen::Quant(Error::HeadDim { head_dim: 264 }), |_| format(1, 264, 8, 8);
    "head_dim u32::MAX" => Seen::Quant(Error::HeadDim { head_dim: u32::MAX }), |_| format(1, u32::MAX, 8, 8);
    "K group_len zero" => Seen::Quant(Error::GroupLen { side: Side::K, group_len: 0, .. }), |_| format(1, 64, 0, 8);
    "V group_len zero" => Seen::Quant(Error::GroupLen { side: Side::V, group_len: 0, .. }), |_| format(1, 64, 8, 0);
    "K group_len 4" => Seen::Quant(Error::GroupLen { side: Side::K, group_len: 4, .. }), |_| format(1, 64, 4, 8);
    "V group_len 24 divides nothing known" => Seen::Quant(Error::GroupLen { side: Side::V, group_len: 24, .. }),
        |_| format(1, 96, 8, 24);
    "K group_len does not divide head_dim" => Seen::Quant(Error::GroupLen { side: Side::K, group_len: 64, .. }),
        |_| format(1, 96, 64, 32);
    "V group_len longer than the head" => Seen::Quant(Error::GroupLen { side: Side::V, group_len: 128, .. }),
        |_| format(1, 64, 64, 128);
    "K group_len u32::MAX" => Seen::Quant(Error::GroupLen { side: Side::K, group_len: u32::MAX, .. }),
        |_| format(1, 64, u32::MAX, 8);

    "lightllm with no slots" => Seen::Quant(Error::NumPages(0)), |_| CacheLayout::lightllm(small(), 0).into();
    "lightllm with more slots than i32 indices" => Seen::Quant(Error::NumPages(_)),
        |_| CacheLayout::lightllm(small(), 1 << 31).into();
    "lightllm with two group lengths" => Seen::Quant(Error::GroupLen { side: Side::V, group_len: 16, .. }), |_| {
        CacheFormat::new(2, 32, 8, 16, ScaleType::F16).and_then(|format| CacheLayout::lightllm(format, 4)).into()
    };
    "hnd with no pages" => Seen::Quant(Error::NumPages(0)), |_| CacheLayout::hnd(small(), 0, 16).into();
    "hnd with pages of no slots" => Seen::Quant(Error::PageLen(0)), |_| CacheLayout::hnd(small(), 4, 0).into();
    "nhd with pages of no slots" => Seen::Quant(Error::PageLen(0)), |_| CacheLayout::nhd(small(), 4, 0).into();
    "nhd with pages of 65537 slots" => Seen::Quant(Error::PageLen(65537)),
        |_| CacheLayout::nhd(small(), 4, 65537).into();
    "native with no pages" => Seen::Quant(Error::NumPages(0)), |_| CacheLayout::native(small(), 0, 16).into();
    "native with pages of u32::MAX slots" => Seen::Quant(Error::PageLen(u32::MAX)),
        |_| CacheLayout::native(small(), 4, u32::MAX).into();
    "native with u64::MAX pages" => Seen::Quant(Error::NumPages(u64::MAX)),
        |_| CacheLayout::native(small(), u64::MAX, 16).into();

    "custom page stride overflows u64" => Seen::Quant(Error::TooLarge { buffer_idx: 0, .. }),
        |_| custom(|planes| planes[0].page_stride = u64::MAX / 2);
    "custom slot stride overflows i64" => Seen::Quant(Error::TooLarge { buffer_idx: 1, .. }),
        |_| custom(|planes| planes[1].slot_stride = i64::MAX as u64);
    "custom head stride overflows in bytes only" => Seen::Quant(Error::TooLarge { buffer_idx: 2, .. }),
        |_| custom(|planes| planes[2].head_stride = i64::MAX as u64 / 2);
    "custom offset overflows" => Seen::Quant(Error::TooLarge { buffer_idx: 3, .. }),
        |_| custom(|planes| planes[3].offset = u64::MAX);
    "custom plane in a fifth buffer" => Seen::Quant(Error::BufferIndex { buffer_idx: 4, .. }),
        |_| custom(|planes| planes[2].buffer_idx = 4);
    "custom plane in buffer usize::MAX" => Seen::Quant(Error::BufferIndex { buffer_idx: usize::MAX, .. }),
        |_| custom(|planes| planes[0].buffer_idx = usize::MAX);
    "custom K and V codes in one place" => Seen::Quant(Error::Overlap { buffer_idx: 0, .. }),
        |_| custom(|planes| planes[1].buffer_idx = 0);
    "custom page stride of zero" => Seen::Quant(Error::Overlap { buffer_idx: 0, .. }),
        |_| custom(|planes| planes[0].page_stride = 0);
    "custom slot stride of zero" => Seen::Quant(Error::Overlap { buffer_idx: 1, .. }),
        |_| custom(|planes| planes[1].slot_stride = 0);
    "custom head stride of zero" => Seen::Quant(Error::Overlap { buffer_idx: 2, .. }),
        |_| custom(|planes| planes[2].head_stride = 0);
    "custom head stride one short of a row" => Seen::Quant(Error::Overlap { buffer_idx: 0, .. }),
        |_| custom(|planes| planes[0].head_stride = 31);
    "custom page stride one short of a page" => Seen::Quant(Error::Overlap { buffer_idx: 3, .. }),
        |_| custom(|planes| planes[3].page_stride = 15);
    "custom V codes start inside K codes" => Seen::Quant(Error::Overlap { buffer_idx: 0, .. }), |_| custom(|planes| {
        planes[1].buffer_idx = 0;
        planes[1].offset = 4 * 4 * 32 - 1;
    });
    "custom scales inside codes" => Seen::Quant(Error::Overlap { buffer_idx: 0, .. }),
        |_| custom(|planes| planes[2].buffer_idx = 0);

    "no buffers" => Seen::Quant(Error::BufferCount { got: 0, .. }), |bench| view(bench, Vec::clear);
    "one buffer too few" => Seen::Quant(Error::BufferCount { .. }), |bench| view(bench, |buffers| { buffers.pop(); });
    "one buffer too many" => Seen::Quant(Error::BufferCount { .. }),
        |bench| view(bench, |buffers| buffers.push(vec![0; 1 << 16]));
    "codes one byte short" => Seen::Quant(Error::BufferLen { buffer_idx: 0, .. }),
        |bench| view(bench, |buffers| { buffers[0].pop(); });
    "scales one byte short" => Seen::Quant(Error::BufferLen { buffer_idx: 3, .. }),
        |bench| view(bench, |buffers| { buffers[3].pop(); });
    "empty codes" => Seen::Quant(Error::BufferLen { buffer_idx: 1, got: 0, .. }),
        |bench| view(bench, |buffers| buffers[1].clear());
    "codes and scales exchanged" => Seen::Quant(Error::BufferLen { .. }),
        |bench| view(bench, |buffers| buffers.reverse());
}
