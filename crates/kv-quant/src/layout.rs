//! Where codes and scales lie: four strided planes over one to four buffers.

use crate::layout_kind::native_record;
use crate::{CacheFormat, Error, LayoutKind, Plane, PlaneId, Side};

/// A layout has at most this many buffers.
pub const MAX_BUFFERS: usize = 4;

/// A cache's format, size and strides: valid by construction (nothing overlaps, every offset fits u64).
/// ```
/// use kv_quant::{CacheFormat, CacheLayout, Error, Plane, PlaneId, ScaleType, Side};
/// let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16)?;
/// let layout = CacheLayout::nhd(format, 4, 16)?;
/// // Buffer and bytes of the K codes of head 1 at slot 5 of page 2: [page, slot, head, channel].
/// let row = ((2 * 16 + 5) * 2 + 1) * 64;
/// assert_eq!(layout.row_bytes(PlaneId::Codes(Side::K), 2 * 16 + 5, 1), (0, row..row + 64));
/// // Strides of one's own: the V plane may not lie in the K plane's bytes.
/// let mut planes = PlaneId::ALL.map(|id| *layout.plane(id));
/// planes[1] = Plane { buffer_idx: 0, ..planes[1] };
/// assert!(matches!(CacheLayout::custom(format, 4, 16, planes), Err(Error::Overlap { .. })));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CacheLayout {
    format: CacheFormat,
    kind: LayoutKind,
    num_pages: u64,
    page_len: u32,
    planes: [Plane; 4],
    buffer_bytes: Vec<u64>,
}

impl CacheLayout {
    /// LightLLM's buffers: codes `[num_slots, 2 * num_kv_heads, head_dim]`, scales
    /// `[num_slots, 2 * num_kv_heads, head_dim / group_len]`, K heads first. K and V share one group length.
    pub fn lightllm(format: CacheFormat, num_slots: u64) -> Result<Self, Error> {
        let (heads, dim) = (u64::from(format.num_kv_heads()), u64::from(format.head_dim()));
        if format.group_len(Side::K) != format.group_len(Side::V) {
            let group_len = format.group_len(Side::V);
            return Err(Error::GroupLen { side: Side::V, group_len, head_dim: format.head_dim() });
        }
        let groups = u64::from(format.num_groups(Side::K));
        let plane = |buffer_idx, row: u64, first_head: u64| Plane {
            buffer_idx,
            offset: first_head * row,
            page_stride: 2 * heads * row,
            slot_stride: 2 * heads * row,
            head_stride: row,
        };
        let planes = [plane(0, dim, 0), plane(0, dim, heads), plane(1, groups, 0), plane(1, groups, heads)];
        Self::build(format, LayoutKind::LightLlm, num_slots, 1, planes)
    }

    /// Paged, head-major: `[num_pages, num_kv_heads, page_len, head_dim]`; buffers are K codes, V codes, K scales,
    /// V scales.
    pub fn hnd(format: CacheFormat, num_pages: u64, page_len: u32) -> Result<Self, Error> {
        Self::paged(format, LayoutKind::Hnd, num_pages, page_len)
    }

    /// Paged, slot-major: `[num_pages, page_len, num_kv_heads, head_dim]`; buffers as in [`Self::hnd`].
    pub fn nhd(format: CacheFormat, num_pages: u64, page_len: u32) -> Result<Self, Error> {
        Self::paged(format, LayoutKind::Nhd, num_pages, page_len)
    }

    fn paged(format: CacheFormat, kind: LayoutKind, num_pages: u64, page_len: u32) -> Result<Self, Error> {
        let (heads, slots) = (u64::from(format.num_kv_heads()), u64::from(page_len));
        let plane = |buffer_idx, row: u64| {
            let page_stride = heads * slots * row;
            match kind {
                LayoutKind::Hnd => {
                    Plane { buffer_idx, offset: 0, page_stride, slot_stride: row, head_stride: slots * row }
                }
                _ => Plane { buffer_idx, offset: 0, page_stride, slot_stride: heads * row, head_stride: row },
            }
        };
        let dim = u64::from(format.head_dim());
        let (k, v) = (u64::from(format.num_groups(Side::K)), u64::from(format.num_groups(Side::V)));
        Self::build(
            format,
            kind,
            num_pages,
            page_len,
            [plane(0, dim), plane(1, dim), plane(2, k), plane(3, v)],
        )
    }

    /// The native layout: one buffer `[num_pages, num_kv_heads, 2, page_len, record]`, K before V. A record is
    /// `head_dim` codes, then the scales, padded to [`crate::NATIVE_RECORD_ALIGN`] bytes; K and V records have one size.
    pub fn native(format: CacheFormat, num_pages: u64, page_len: u32) -> Result<Self, Error> {
        let (code_bytes, scale_bytes) = (format.element().bytes() as u64, format.scale_type().bytes() as u64);
        let (codes, record) = native_record(&format);
        let half = u64::from(page_len) * record;
        let plane = |first: u64, bytes: u64| Plane {
            buffer_idx: 0,
            offset: first / bytes,
            page_stride: u64::from(format.num_kv_heads()) * 2 * half / bytes,
            slot_stride: record / bytes,
            head_stride: 2 * half / bytes,
        };
        let planes = [
            plane(0, code_bytes),
            plane(half, code_bytes),
            plane(codes, scale_bytes),
            plane(half + codes, scale_bytes),
        ];
        let mut layout = Self::build(format, LayoutKind::Native, num_pages, page_len, planes)?;
        // Records are read whole: the last one's padding is in the buffer too.
        let bytes = u64::from(format.num_kv_heads()) * 2 * half * num_pages;
        layout.buffer_bytes.iter_mut().for_each(|end| *end = bytes);
        Ok(layout)
    }

    /// Any strides: planes in the order of [`PlaneId::ALL`]. Refused if two elements share bytes.
    pub fn custom(
        format: CacheFormat,
        num_pages: u64,
        page_len: u32,
        planes: [Plane; 4],
    ) -> Result<Self, Error> {
        Self::build(format, LayoutKind::Custom, num_pages, page_len, planes)
    }

    fn build(
        format: CacheFormat,
        kind: LayoutKind,
        num_pages: u64,
        page_len: u32,
        planes: [Plane; 4],
    ) -> Result<Self, Error> {
        if page_len == 0 || page_len > 65536 {
            return Err(Error::PageLen(page_len));
        }
        if num_pages == 0 || num_pages > i32::MAX as u64 {
            return Err(Error::NumPages(num_pages));
        }
        let mut layout = Self { format, kind, num_pages, page_len, planes, buffer_bytes: Vec::new() };
        for (id, plane) in PlaneId::ALL.into_iter().zip(planes) {
            if plane.buffer_idx >= MAX_BUFFERS {
                return Err(Error::BufferIndex { plane: id, buffer_idx: plane.buffer_idx, max: MAX_BUFFERS });
            }
            let end = layout.end_byte(id, &plane)?;
            if layout.buffer_bytes.len() <= plane.buffer_idx {
                layout.buffer_bytes.resize(plane.buffer_idx + 1, 0);
            }
            if let Some(bytes) = layout.buffer_bytes.get_mut(plane.buffer_idx) {
                *bytes = (*bytes).max(end);
            }
        }
        crate::overlap::check(&layout)?;
        Ok(layout)
    }

    /// One past the plane's last byte, or an error if a 63-bit offset cannot hold it.
    fn end_byte(&self, id: PlaneId, plane: &Plane) -> Result<u64, Error> {
        let last = |count: u64, stride: u64| u128::from(count - 1) * u128::from(stride);
        let end = (u128::from(plane.offset)
            + last(self.num_pages, plane.page_stride)
            + last(u64::from(self.page_len), plane.slot_stride)
            + last(u64::from(self.format.num_kv_heads()), plane.head_stride)
            + u128::from(self.row_len(id)))
            * u128::from(self.element_bytes(id));
        let limit = i64::MAX as u64;
        match u64::try_from(end) {
            Ok(end) if end <= limit => Ok(end),
            _ => Err(Error::TooLarge { buffer_idx: plane.buffer_idx, limit }),
        }
    }

    /// The format.
    pub fn format(&self) -> &CacheFormat {
        &self.format
    }

    /// The arrangement the layout was made from.
    pub fn kind(&self) -> LayoutKind {
        self.kind
    }

    /// Pages in the cache.
    pub fn num_pages(&self) -> u64 {
        self.num_pages
    }

    /// Slots of a page.
    pub fn page_len(&self) -> u32 {
        self.page_len
    }

    /// Slots in all: `num_pages * page_len`.
    pub fn num_slots(&self) -> u64 {
        self.num_pages * u64::from(self.page_len)
    }

    /// Bytes that each buffer must hold.
    pub fn buffer_bytes(&self) -> &[u64] {
        &self.buffer_bytes
    }

    /// Strides of one plane.
    pub fn plane(&self, id: PlaneId) -> &Plane {
        let [k_codes, v_codes, k_scales, v_scales] = &self.planes;
        match id {
            PlaneId::Codes(Side::K) => k_codes,
            PlaneId::Codes(Side::V) => v_codes,
            PlaneId::Scales(Side::K) => k_scales,
            PlaneId::Scales(Side::V) => v_scales,
        }
    }

    /// Contiguous elements of a row: channels for codes, groups for scales.
    pub fn row_len(&self, id: PlaneId) -> u32 {
        match id {
            PlaneId::Codes(_) => self.format.head_dim(),
            PlaneId::Scales(side) => self.format.num_groups(side),
        }
    }

    /// Bytes of one element of a plane.
    pub fn element_bytes(&self, id: PlaneId) -> u64 {
        match id {
            PlaneId::Codes(_) => self.format.element().bytes() as u64,
            PlaneId::Scales(_) => self.format.scale_type().bytes() as u64,
        }
    }

    /// Buffer and byte range of one row. `slot` is a global slot index below [`Self::num_slots`].
    #[inline]
    pub fn row_bytes(&self, id: PlaneId, slot: u64, head: u32) -> (usize, std::ops::Range<u64>) {
        let plane = self.plane(id);
        let page_len = u64::from(self.page_len);
        let start = plane.row(slot / page_len, slot % page_len, u64::from(head)) * self.element_bytes(id);
        (plane.buffer_idx, start..start + u64::from(self.row_len(id)) * self.element_bytes(id))
    }

    /// Bytes of one page over all buffers, padding included: what a new page costs. For custom strides, the buffers'
    /// bytes over the pages, rounded up.
    pub fn bytes_per_page(&self) -> u64 {
        self.kind.bytes_per_page(&self.format, self.page_len).unwrap_or_else(|| {
            let bytes = self.buffer_bytes.iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes));
            bytes.div_ceil(self.num_pages)
        })
    }

    /// How many tokens fit in `bytes`, whole pages only, for a layout of this kind and page length.
    pub fn tokens_in(&self, bytes: u64) -> u64 {
        (bytes / self.bytes_per_page()).saturating_mul(u64::from(self.page_len))
    }
}
