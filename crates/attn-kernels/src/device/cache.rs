//! A cache on the device as the caller has it, and the same as the kernels take it.

use kv_quant::{CacheLayout, MAX_BUFFERS, PlaneId, Side};

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
            need(BUFFER_NAMES.get(buffer_idx).copied().unwrap_or("cache buffer"), *buffer, *len)?;
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
            record_bytes: record_bytes(layout),
        })
    }
}

/// Names for messages, so that none has to be made on the hot path.
const BUFFER_NAMES: [&str; MAX_BUFFERS] =
    ["cache buffer 0", "cache buffer 1", "cache buffer 2", "cache buffer 3"];

/// Fewest slots of a page whose records are copied as one run: a tile of stage 1.
const RUN_SLOTS: u32 = 16;

/// Bytes of a record, if each page holds the records of a head one after the other, codes before scales; else 0.
fn record_bytes(layout: &CacheLayout) -> u32 {
    let record = |side: Side| {
        let (codes, scales) = (layout.plane(PlaneId::Codes(side)), layout.plane(PlaneId::Scales(side)));
        let unit = layout.element_bytes(PlaneId::Scales(side));
        let head_dim = u64::from(layout.format().head_dim());
        let used = head_dim + u64::from(layout.format().num_groups(side)) * unit;
        let alike = codes.buffer_idx == scales.buffer_idx
            && scales.offset * unit == codes.offset + head_dim
            && scales.page_stride * unit == codes.page_stride
            && scales.slot_stride * unit == codes.slot_stride
            && scales.head_stride * unit == codes.head_stride;
        let whole = codes.slot_stride.is_multiple_of(16) && codes.slot_stride >= used;
        (alike && whole).then_some(codes.slot_stride)
    };
    match (record(Side::K), record(Side::V)) {
        (Some(k), Some(v)) if k == v && layout.page_len() >= RUN_SLOTS => u32::try_from(k).unwrap_or(0),
        _ => 0,
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
