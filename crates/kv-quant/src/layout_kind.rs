//! The named arrangements, and what a page of each costs.

use crate::{CacheFormat, Side};

/// A native record is padded to a multiple of this many bytes, so that 16-byte copies never straddle records.
pub const NATIVE_RECORD_ALIGN: u64 = 16;

/// The named arrangement that a layout was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayoutKind {
    /// LightLLM's token-major buffers `[slot, 2 * num_kv_heads, head_dim]`, K heads first; a page is one slot.
    LightLlm,
    /// `[page, kv_head, slot, channel]`, K and V apart.
    Hnd,
    /// `[page, slot, kv_head, channel]`, K and V apart.
    Nhd,
    /// `[page, kv_head, K or V, slot, record]` in one buffer; a record is codes then scales, padded to 16 bytes.
    Native,
    /// Any other strides.
    Custom,
}

impl LayoutKind {
    /// Bytes that one page costs, padding included: capacity planning before there is a layout. `None` for
    /// [`LayoutKind::Custom`], whose strides decide.
    ///
    /// ```
    /// use kv_quant::{CacheFormat, LayoutKind, ScaleType};
    /// let format = CacheFormat::new(8, 128, 8, 8, ScaleType::F16)?;
    /// // 160 bytes a record, K and V, 8 heads, 16 slots.
    /// assert_eq!(LayoutKind::Native.bytes_per_page(&format, 16), Some(160 * 2 * 8 * 16));
    /// assert_eq!(LayoutKind::Native.tokens_in(&format, 16, 1 << 30), Some(419_424));
    /// # Ok::<(), kv_quant::Error>(())
    /// ```
    pub fn bytes_per_page(self, format: &CacheFormat, page_len: u32) -> Option<u64> {
        let bytes_per_token = match self {
            LayoutKind::LightLlm | LayoutKind::Hnd | LayoutKind::Nhd => format.bytes_per_token(),
            LayoutKind::Native => 2 * u64::from(format.num_kv_heads()) * native_record(format).1,
            LayoutKind::Custom => return None,
        };
        Some(bytes_per_token * u64::from(page_len))
    }

    /// How many tokens fit in `bytes`, whole pages only. `None` for [`LayoutKind::Custom`] or pages of no slot.
    pub fn tokens_in(self, format: &CacheFormat, page_len: u32, bytes: u64) -> Option<u64> {
        let pages = bytes.checked_div(self.bytes_per_page(format, page_len)?)?;
        Some(pages.saturating_mul(u64::from(page_len)))
    }
}

/// Bytes before the scales of a native record, and of the whole record. K and V records have one size.
pub(crate) fn native_record(format: &CacheFormat) -> (u64, u64) {
    let groups = u64::from(format.num_groups(Side::K).max(format.num_groups(Side::V)));
    // Codes of odd head dimensions are padded too, so that scales are aligned to their own size.
    let codes = (u64::from(format.head_dim()) * format.element().bytes() as u64).next_multiple_of(4);
    let scales = groups * format.scale_type().bytes() as u64;
    (codes, (codes + scales).next_multiple_of(NATIVE_RECORD_ALIGN))
}

impl std::fmt::Display for LayoutKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LayoutKind::LightLlm => "lightllm",
            LayoutKind::Hnd => "hnd",
            LayoutKind::Nhd => "nhd",
            LayoutKind::Native => "native",
            LayoutKind::Custom => "custom",
        })
    }
}
