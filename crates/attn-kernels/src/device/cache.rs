//! A cache on the device as the caller has it, and the same as the kernels take it.

use kv_quant::{CacheLayout, PlaneId, Side};

use super::error::DeviceError;
use super::memory::DeviceView;
use crate::abi::{PagedCache, Plane};

/// A cache in device memory.
#[derive(Clone, Copy, Debug)]
pub struct CacheArgs<'a> {
    /// Format and strides.
    pub layout: &'a CacheLayout,
    /// The layout's buffers, in its order, each at least as long as it says.
    pub buffers: &'a [DeviceView],
    /// Pages of the requests. An append does without.
    pub pages: Option<PageTableArgs>,
}

/// The page table: i32 page indices, row after row.
#[derive(Clone, Copy, Debug)]
pub struct PageTableArgs {
    /// i32 page indices.
    pub indices: DeviceView,
    /// Where each request's row starts.
    pub rows: PageRowsArgs,
}

/// Where the rows of a page table start.
#[derive(Clone, Copy, Debug)]
pub enum PageRowsArgs {
    /// Row r at `r * stride` elements.
    Stride(u64),
    /// Row r at element `starts[r]`; u64 `[batch]`.
    Starts(DeviceView),
}

impl CacheArgs<'_> {
    /// The kernels' form.
    ///
    /// # Errors
    /// [`DeviceError::Launch`] if a buffer is missing or too short, or the pool has more pages than i32 can name.
    pub fn params(&self) -> Result<PagedCache, DeviceError> {
        let Self { layout, buffers, pages } = self;
        let refuse = |what: String| DeviceError::Launch { what };
        let lens = layout.buffer_bytes();
        if buffers.len() != lens.len() {
            return Err(refuse(format!(
                "the layout has {} buffers, {} were given",
                lens.len(),
                buffers.len()
            )));
        }
        for (buffer_idx, (buffer, len)) in buffers.iter().zip(lens).enumerate() {
            need(&format!("cache buffer {buffer_idx}"), *buffer, *len)?;
        }
        let plane = |id: PlaneId| {
            let plane = layout.plane(id);
            let buffer = buffers.get(plane.buffer_idx).map_or(0, |buffer| buffer.address());
            Plane {
                base: buffer + plane.offset * layout.element_bytes(id),
                page_stride: plane.page_stride,
                slot_stride: plane.slot_stride,
                head_stride: plane.head_stride,
            }
        };
        let format = layout.format();
        let num_pages = u32::try_from(layout.num_pages())
            .map_err(|_| refuse(format!("{} pages are more than u32 counts", layout.num_pages())))?;
        let (page_table, page_row_starts, page_row_stride) = match pages {
            None => (0, 0, 0),
            Some(PageTableArgs { indices, rows: PageRowsArgs::Stride(stride) }) => {
                (indices.address(), 0, *stride)
            }
            Some(PageTableArgs { indices, rows: PageRowsArgs::Starts(starts) }) => {
                (indices.address(), starts.address(), 0)
            }
        };
        Ok(PagedCache {
            k_codes: plane(PlaneId::Codes(Side::K)),
            v_codes: plane(PlaneId::Codes(Side::V)),
            k_scales: plane(PlaneId::Scales(Side::K)),
            v_scales: plane(PlaneId::Scales(Side::V)),
            page_table,
            page_row_starts,
            page_row_stride,
            num_pages,
            page_len: layout.page_len(),
            num_kv_heads: format.num_kv_heads(),
            head_dim: format.head_dim(),
            k_group_len: format.group_len(Side::K),
            v_group_len: format.group_len(Side::V),
            scale_type: format.scale_type() as u32,
            _pad: 0,
        })
    }
}

/// Refuses a view that is shorter than what will be read or written through it.
pub(super) fn need(what: &str, view: DeviceView, len_bytes: u64) -> Result<(), DeviceError> {
    if view.len_bytes() >= len_bytes {
        return Ok(());
    }
    Err(DeviceError::Launch {
        what: format!("{what} has {} bytes, {len_bytes} are needed", view.len_bytes()),
    })
}

/// Bytes of an array; `None` only where no memory could hold it.
pub(super) fn array_bytes(dims: &[u64], element_bytes: u64) -> Result<u64, DeviceError> {
    dims.iter()
        .try_fold(element_bytes, |bytes, dim| bytes.checked_mul(*dim))
        .ok_or_else(|| DeviceError::Launch { what: format!("{dims:?} elements are more than memory holds") })
}
