//! The paged INT8 cache as every kernel sees it. Twin: `cuda/params/paged_cache.h`.

use bytemuck::{Pod, Zeroable};
use kv_quant::{FloatType, ScaleType};

use super::assert_layout;

// The kernels read these types as the numbers that `kv-quant` gives them.
const _: () = {
    assert!(ScaleType::F16 as u32 == 0 && ScaleType::Bf16 as u32 == 1 && ScaleType::F32 as u32 == 2);
    assert!(FloatType::F16 as u32 == 0 && FloatType::Bf16 as u32 == 1 && FloatType::F32 as u32 == 2);
};

/// One strided plane. Strides count elements of the plane: one byte for codes, the scale type for scales.
///
/// Element `(page, slot, head, c)` lies at `base + page * page_stride + slot * slot_stride + head * head_stride + c`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Plane {
    /// Device address of element (0, 0, 0, 0).
    pub base: u64,
    /// Elements between pages.
    pub page_stride: u64,
    /// Elements between slots of a page.
    pub slot_stride: u64,
    /// Elements between kv heads of a slot.
    pub head_stride: u64,
}
assert_layout!(Plane, size 32, align 8, { base @ 0, page_stride @ 8, slot_stride @ 16, head_stride @ 24 });

/// The cache: four planes, the page table and the shapes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PagedCache {
    /// i8 `[num_pages, page_len, num_kv_heads, head_dim]` through its strides.
    pub k_codes: Plane,
    /// i8, the same shape.
    pub v_codes: Plane,
    /// scale `[num_pages, page_len, num_kv_heads, head_dim / k_group_len]`.
    pub k_scales: Plane,
    /// scale `[num_pages, page_len, num_kv_heads, head_dim / v_group_len]`.
    pub v_scales: Plane,
    /// i32 page indices; request r's row starts at `page_row_starts[r]`, else at `r * page_row_stride`.
    pub page_table: u64,
    /// u64 `[batch]`, may be 0: then `page_row_stride` holds.
    pub page_row_starts: u64,
    /// Elements between rows of the page table.
    pub page_row_stride: u64,
    /// Pages in the pool.
    pub num_pages: u32,
    /// Slots a page.
    pub page_len: u32,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Channels a head.
    pub head_dim: u32,
    /// Channels that share a scale in K.
    pub k_group_len: u32,
    /// Channels that share a scale in V.
    pub v_group_len: u32,
    /// A [`ScaleType`].
    pub scale_type: u32,
    /// Not 0: a page of 16 slots or more holds, for K and for V of a head, one record after the other: codes, scales from
    /// byte `head_dim` on, padding to this many bytes. Such runs are copied in bulk.
    pub record_bytes: u32,
}
assert_layout!(PagedCache, size 184, align 8, {
    k_codes @ 0, v_codes @ 32, k_scales @ 64, v_scales @ 96,
    page_table @ 128, page_row_starts @ 136, page_row_stride @ 144,
    num_pages @ 152, page_len @ 156, num_kv_heads @ 160, head_dim @ 164,
    k_group_len @ 168, v_group_len @ 172, scale_type @ 176, record_bytes @ 180,
});

/// What a kernel saw wrong. The first error wins (compare-and-swap on `kind`); `count` counts all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ErrorRecord {
    /// An [`ErrorKind`]; 0 = none.
    pub kind: u32,
    /// Request, or token of an append.
    pub request_idx: u32,
    /// KV head, where it applies.
    pub head_idx: u32,
    /// Channel, or position of the token for a page index.
    pub channel: u32,
    /// The offending index, where it applies.
    pub value: i64,
    /// 0 = K, 1 = V.
    pub plane: u32,
    /// How many were seen in all.
    pub count: u32,
}
assert_layout!(ErrorRecord, size 32, align 8, {
    kind @ 0, request_idx @ 4, head_idx @ 8, channel @ 12, value @ 16, plane @ 24, count @ 28,
});

/// Kinds of [`ErrorRecord`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorKind {
    /// A page index outside the pool: request, position of the token, page index.
    PageOutOfRange = 1,
    /// A slot outside the pool: token, slot.
    SlotOutOfRange = 2,
    /// A value that is not finite: token, head, channel, K or V.
    NonFinite = 3,
    /// A scale beyond its type: token, head, first channel of the group, K or V.
    ScaleOverflow = 4,
}

impl ErrorKind {
    /// The kind of a record; `None` for 0 and for numbers that no kernel writes.
    #[must_use]
    pub fn from_u32(kind: u32) -> Option<Self> {
        [Self::PageOutOfRange, Self::SlotOutOfRange, Self::NonFinite, Self::ScaleOverflow]
            .into_iter()
            .find(|known| *known as u32 == kind)
    }
}
