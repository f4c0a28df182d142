//! What can be wrong with a format, a layout or the data given to [`crate::append()`].

use crate::{FloatType, PlaneId, ScaleType};

/// K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The keys.
    K,
    /// The values.
    V,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Side::K => "K",
            Side::V => "V",
        })
    }
}

/// Every error of this crate. Each names what was asked and what would be valid.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A format needs at least one kv head.
    #[error("num_kv_heads is {0}; valid: 1 to 65535")]
    NumKvHeads(u32),
    /// `head_dim` outside the range, or not divisible by both group lengths.
    #[error("head_dim is {head_dim}; valid: 16 to 256, divisible by the group length")]
    HeadDim {
        /// What was asked.
        head_dim: u32,
    },
    /// A group length that the format does not have.
    #[error(
        "{side} group_len is {group_len}; valid: 8, 16, 32, 64, 128 or head_dim ({head_dim}), dividing head_dim"
    )]
    GroupLen {
        /// K or V.
        side: Side,
        /// What was asked.
        group_len: u32,
        /// The head dimension it must divide.
        head_dim: u32,
    },
    /// A page holds at least one slot.
    #[error("page_len is {0}; valid: 1 to 65536")]
    PageLen(u32),
    /// Page indices are `i32`, so there are at most 2^31 - 1 pages.
    #[error("num_pages is {0}; valid: 1 to 2147483647")]
    NumPages(u64),
    /// A product of sizes does not fit in u64, or a buffer does not fit in this machine's address space.
    #[error("the layout needs more than {limit} bytes in buffer {buffer_idx}")]
    TooLarge {
        /// Which buffer.
        buffer_idx: usize,
        /// The largest size that can be addressed.
        limit: u64,
    },
    /// Two planes (or two elements of one plane) of a custom layout share bytes.
    #[error("planes {first} and {second} overlap in buffer {buffer_idx}")]
    Overlap {
        /// One plane.
        first: PlaneId,
        /// The other; equal to `first` when a plane overlaps itself.
        second: PlaneId,
        /// The buffer in which they meet.
        buffer_idx: usize,
    },
    /// A plane names a buffer that the layout does not have.
    #[error("plane {plane} names buffer {buffer_idx}; a layout has at most {max} buffers")]
    BufferIndex {
        /// Which plane.
        plane: PlaneId,
        /// What was asked.
        buffer_idx: usize,
        /// How many there can be.
        max: usize,
    },
    /// The number of buffers given is not the layout's.
    #[error("{got} buffers were given; the layout has {want}")]
    BufferCount {
        /// How many were given.
        got: usize,
        /// How many the layout has.
        want: usize,
    },
    /// A buffer is shorter than its layout.
    #[error("buffer {buffer_idx} holds {got} bytes; the layout needs {want}")]
    BufferLen {
        /// Which buffer.
        buffer_idx: usize,
        /// Bytes given.
        got: u64,
        /// Bytes needed.
        want: u64,
    },
    /// `k`, `v` or an output is not of the length that the other arguments imply.
    #[error("{what} has {got} elements; needed: {want}")]
    Len {
        /// Which argument.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length it must have.
        want: usize,
    },
    /// `k` and `v` are of different element types.
    #[error("k is {k} and v is {v}; both must be of one type")]
    MixedTypes {
        /// Type of `k`.
        k: crate::FloatType,
        /// Type of `v`.
        v: crate::FloatType,
    },
    /// A page outside the cache.
    #[error("page {page} is out of range; valid: 0 to {max}", max = .num_pages - 1)]
    PageOutOfRange {
        /// What was asked.
        page: u64,
        /// Pages that the cache has.
        num_pages: u64,
    },
    /// A slot outside the cache (and not -1).
    #[error("slot {slot} of token {token} is out of range; valid: -1 (skip) or 0 to {max}", max = .num_slots - 1)]
    SlotOutOfRange {
        /// Position in the slot mapping.
        token: usize,
        /// What was asked.
        slot: i64,
        /// Slots that the cache has.
        num_slots: u64,
    },
    /// Two tokens of one append go to the same slot.
    #[error("slot {slot} is named by token {first} and by token {second}")]
    SlotTwice {
        /// The slot.
        slot: i64,
        /// The earlier token.
        first: usize,
        /// The later token.
        second: usize,
    },
    /// A head index outside the format.
    #[error("kv head {head} is out of range; the format has {num_kv_heads}")]
    HeadOutOfRange {
        /// What was asked.
        head: u32,
        /// How many there are.
        num_kv_heads: u32,
    },
    /// NaN or infinity in the input. Nothing was written.
    #[error("{side}[token {token}, head {head}, channel {channel}] is not finite")]
    NonFinite {
        /// K or V.
        side: Side,
        /// Token of the append call.
        token: usize,
        /// kv head.
        head: u32,
        /// Channel within the head.
        channel: u32,
    },
    /// A value does not fit the element type of an unquantized cache. Nothing was written.
    #[error("{side}[token {token}, head {head}, channel {channel}] is {value:e}; largest {float_type}: {max}", max = .float_type.largest())]
    ValueOverflow {
        /// K or V.
        side: Side,
        /// Token of the append call.
        token: usize,
        /// kv head.
        head: u32,
        /// Channel within the head.
        channel: u32,
        /// What was given.
        value: f32,
        /// The cache's element type.
        float_type: FloatType,
    },
    /// Codes were asked of an unquantized cache.
    #[error("the cache holds {0} elements, not int8 codes")]
    NoCodes(crate::Element),
    /// A group's scale does not fit the scale type. Nothing was written.
    #[error(
        "{side}[token {token}, head {head}, channels from {channel}]: scale {scale:e} overflows {scale_type}; \
         largest: {max:e}", max = .scale_type.largest()
    )]
    ScaleOverflow {
        /// K or V.
        side: Side,
        /// Token of the append call.
        token: usize,
        /// kv head.
        head: u32,
        /// First channel of the group.
        channel: u32,
        /// `amax / 127`.
        scale: f32,
        /// The type it does not fit.
        scale_type: ScaleType,
    },
}
