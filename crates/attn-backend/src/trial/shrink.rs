//! The caller's layout over a few pages: same kind, page length and strides, little memory.

use kv_quant::{CacheLayout, Error, LayoutKind, PlaneId};

/// Planes of a custom layout are moved together by multiples of this, so that their alignment stays.
const ALIGN: u64 = 4096;

/// The same layout with `num_pages` pages.
pub(super) fn shrink(layout: &CacheLayout, num_pages: u64) -> Result<CacheLayout, Error> {
    let (format, page_len) = (*layout.format(), layout.page_len());
    match layout.kind() {
        LayoutKind::LightLlm => CacheLayout::lightllm(format, num_pages),
        LayoutKind::Hnd => CacheLayout::hnd(format, num_pages, page_len),
        LayoutKind::Nhd => CacheLayout::nhd(format, num_pages, page_len),
        LayoutKind::Native => CacheLayout::native(format, num_pages, page_len),
        LayoutKind::Custom => custom(layout, num_pages),
    }
}

/// Strides stay. Planes that lay interleaved stay so; planes that lay one after the other move up to each other.
fn custom(layout: &CacheLayout, num_pages: u64) -> Result<CacheLayout, Error> {
    let mut planes = PlaneId::ALL.map(|id| *layout.plane(id));
    let mut order = [0, 1, 2, 3];
    let start =
        |i: usize| PlaneId::ALL.get(i).map_or(0, |&id| layout.plane(id).offset * layout.element_bytes(id));
    order.sort_by_key(|&i| start(i));
    for buffer_idx in 0..layout.buffer_bytes().len() {
        // Old start and end of the current cluster with all pages, its new end, and how far it moved.
        let (mut old_end, mut new_end, mut moved) = (0, 0, 0);
        for i in order {
            let (Some(&id), Some(plane)) = (PlaneId::ALL.get(i), planes.get_mut(i)) else { continue };
            if plane.buffer_idx != buffer_idx {
                continue;
            }
            let bytes = layout.element_bytes(id);
            let extent = |pages: u64| {
                let last = (pages - 1) * plane.page_stride
                    + (u64::from(layout.page_len()) - 1) * plane.slot_stride
                    + (u64::from(layout.format().num_kv_heads()) - 1) * plane.head_stride;
                (last + u64::from(layout.row_len(id))) * bytes
            };
            let old_start = start(i);
            if old_start >= old_end {
                // The largest move that keeps the plane behind the cluster before and its alignment.
                moved = (old_start - u64::min(old_start, new_end)) / ALIGN * ALIGN;
            }
            old_end = old_end.max(old_start + extent(layout.num_pages()));
            new_end = new_end.max(old_start - moved + extent(num_pages.min(layout.num_pages())));
            plane.offset -= moved / bytes;
        }
    }
    CacheLayout::custom(*layout.format(), num_pages, layout.page_len(), planes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_quant::{CacheFormat, Plane, ScaleType};

    #[test]
    fn planes_far_apart_move_up_and_interleaved_ones_stay() {
        let format = CacheFormat::new(2, 64, 64, 64, ScaleType::F32).unwrap();
        let plane = |offset, stride| Plane {
            buffer_idx: 0,
            offset,
            page_stride: 4 * stride,
            slot_stride: 2 * stride,
            head_stride: stride,
        };
        // K and V codes interleaved in rows of 128 bytes; scales of both behind 2^20 pages of codes.
        let pages = 1 << 20;
        let codes = pages * 4 * 128;
        let planes = [plane(0, 128), plane(64, 128), plane(codes / 4, 1), plane(codes / 4 + pages * 4, 1)];
        let layout = CacheLayout::custom(format, pages, 2, planes).unwrap();
        let small = shrink(&layout, 3).unwrap();
        assert!(small.buffer_bytes()[0] < 64 << 10, "{:?}", small.buffer_bytes());
        assert_eq!(small.plane(PlaneId::ALL[1]).offset, 64);
        assert_eq!(small.plane(PlaneId::ALL[2]).page_stride, 4);
    }

    #[test]
    fn more_pages_than_the_caller_has_are_fine_for_named_kinds() {
        let format = CacheFormat::new(1, 64, 64, 64, ScaleType::F16).unwrap();
        let layout = CacheLayout::native(format, 1, 16).unwrap();
        assert_eq!(shrink(&layout, 9).unwrap().num_pages(), 9);
    }
}
