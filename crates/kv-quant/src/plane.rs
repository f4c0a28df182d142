//! The four planes of a cache and their strides.

use crate::Side;

/// Which of the four planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlaneId {
    /// Codes of K or V.
    Codes(Side),
    /// Scales of K or V.
    Scales(Side),
}

impl PlaneId {
    /// All four.
    pub const ALL: [PlaneId; 4] = [
        PlaneId::Codes(Side::K),
        PlaneId::Codes(Side::V),
        PlaneId::Scales(Side::K),
        PlaneId::Scales(Side::V),
    ];
}

impl std::fmt::Display for PlaneId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PlaneId::Codes(side) => write!(f, "{side} codes"),
            PlaneId::Scales(side) => write!(f, "{side} scales"),
        }
    }
}

/// One strided plane. All numbers count elements of the plane: one byte for codes, the scale type for scales.
///
/// Element `(page, slot, head, c)` lies at `offset + page * page_stride + slot * slot_stride + head * head_stride + c`;
/// channels (codes) and groups (scales) are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plane {
    /// Which buffer holds the plane.
    pub buffer_idx: usize,
    /// Element `(0, 0, 0, 0)`.
    pub offset: u64,
    /// Distance between pages.
    pub page_stride: u64,
    /// Distance between slots of a page.
    pub slot_stride: u64,
    /// Distance between kv heads.
    pub head_stride: u64,
}

impl Plane {
    /// Index of the first element of a row. Rows within the layout never overflow: the constructor checked it.
    #[inline]
    pub fn row(&self, page: u64, slot: u64, head: u64) -> u64 {
        self.offset + page * self.page_stride + slot * self.slot_stride + head * self.head_stride
    }
}
