//! What can be wrong with a call of a session. Each error names what was given and what would be valid.

use crate::{MemoryKind, Refusal};
use kv_quant::FloatType;

/// Which array of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Array {
    /// Queries, `[batch, q_len, num_q_heads, head_dim]`.
    Q,
    /// New keys, `[num_tokens, num_kv_heads, head_dim]`.
    K,
    /// New values, as the keys.
    V,
    /// Output, as the queries.
    Out,
    /// Log-sum-exp, `[batch, q_len, num_q_heads]` f32.
    Lse,
    /// A buffer of the cache.
    Cache(usize),
}

impl std::fmt::Display for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Array::Q => "q",
            Array::K => "k",
            Array::V => "v",
            Array::Out => "out",
            Array::Lse => "lse",
            Array::Cache(buffer_idx) => return write!(f, "cache buffer {buffer_idx}"),
        })
    }
}

/// Every error of opening and using a session. Unless a variant says otherwise, nothing has run and nothing has changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Format, layout, slots, or the data given to append.
    #[error(transparent)]
    Cache(#[from] kv_quant::Error),
    /// Spec, lengths, page table, split.
    #[error(transparent)]
    Plan(#[from] attn_plan::Error),
    /// The environment names no tuning level.
    #[error("{variable}: {0}", variable = attn_tune::TUNE_VARIABLE)]
    TuneLevel(#[from] attn_tune::LevelError),
    /// An array has the wrong number of elements.
    #[error("{array} has {got} elements; needed: {want}")]
    Len {
        /// Which array.
        array: Array,
        /// Its elements.
        got: u64,
        /// Elements needed.
        want: u64,
    },
    /// An array has the wrong element type.
    #[error("{array} is {got}; the session's spec says {want}")]
    Type {
        /// Which array.
        array: Array,
        /// Its type.
        got: FloatType,
        /// The type needed.
        want: FloatType,
    },
    /// lse is wanted by the spec and no memory was given for it.
    #[error("the spec wants lse and none was given")]
    LseMissing,
    /// lse was given, but the spec does not want it.
    #[error("lse was given and the spec does not want it; set want_lse")]
    LseNotWanted,
    /// The number of elements of an array does not fit.
    #[error("the size of {array} overflows: {what}")]
    SizeOverflow {
        /// Which array.
        array: Array,
        /// The product.
        what: &'static str,
    },
    /// Two arrays of one call share bytes, one of them written.
    #[error("{first} and {second} overlap")]
    Overlap {
        /// One array.
        first: Array,
        /// The other.
        second: Array,
    },
    /// A device address that is not a multiple of the element size, or null.
    #[error("{array} is at device address {address:#x}; needed: a nonzero multiple of {align}")]
    Address {
        /// Which array.
        array: Array,
        /// What was given.
        address: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// Arrays of one call must all lie on the host or all on the device.
    #[error("{first} and {second} must both lie on the host or both on the device")]
    MixedMemory {
        /// One array.
        first: Array,
        /// The other.
        second: Array,
    },
    /// The arrays lie where the backend cannot reach them.
    #[error("{array} lies on a device; backend `{backend}` reads host memory only")]
    HostOnly {
        /// Which array.
        array: Array,
        /// The session's backend.
        backend: crate::BackendId,
    },
    /// The backend cannot work on a cache in this memory.
    #[error("cache memory: {got}; backend `{backend}` offers: {offered}")]
    Memory {
        /// What was given.
        got: MemoryKind,
        /// The backend.
        backend: crate::BackendId,
        /// What it can use.
        offered: String,
    },
    /// Append or a raw write to a cache that was borrowed for reading.
    #[error("the cache was given for reading only")]
    ReadOnly,
    /// Decode without a plan, or after a failed one.
    #[error("decode needs a plan: call plan first")]
    NoPlan,
    /// A step of a shape that the session was not opened for.
    #[error("the session was not opened for this step: {asked}; opened for: {opened}")]
    SpecNotSelected {
        /// What was asked.
        asked: String,
        /// What the descriptor holds.
        opened: String,
    },
    /// A request longer than the whole cache: some slot would hold two of its tokens.
    #[error("request {request} has {kv_len} tokens; the cache has {num_slots} slots")]
    KvLen {
        /// Which request.
        request: usize,
        /// Its length.
        kv_len: u32,
        /// Slots of the cache.
        num_slots: u64,
    },
    /// A page index of a copy outside the cache.
    #[error("copy {copy}: page {page} is out of range; valid: 0 to {max}", max = .num_pages - 1)]
    CopyPage {
        /// Position in the list of copies.
        copy: usize,
        /// What was given.
        page: u64,
        /// Pages in the cache.
        num_pages: u64,
    },
    /// A page is written by one copy of a list and read or written by another.
    #[error("copies {first} and {second} both touch page {page}, and one of them writes it")]
    CopyConflict {
        /// One copy.
        first: usize,
        /// The other.
        second: usize,
        /// The page.
        page: u64,
    },
    /// Raw bytes outside a buffer of the cache.
    #[error("bytes {start}..{end} of cache buffer {buffer_idx} are out of range; it holds {have}")]
    ByteRange {
        /// Which buffer.
        buffer_idx: usize,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// Bytes of the buffer; 0 if there is no such buffer.
        have: u64,
    },
    /// Opening was refused.
    #[error("backend `{backend}` refuses: {refusal}")]
    Refused {
        /// The backend.
        backend: crate::BackendId,
        /// Why.
        refusal: Refusal,
    },
    /// Host memory ran out.
    #[error("{bytes} bytes of host memory for {what} could not be had")]
    OutOfMemory {
        /// For what.
        what: &'static str,
        /// How many.
        bytes: u64,
    },
    /// The device ran out of memory.
    #[error("{requested} bytes of device memory were asked for; {free} are free")]
    DeviceOutOfMemory {
        /// Bytes asked for.
        requested: u64,
        /// Bytes free.
        free: u64,
    },
    /// The device or its driver failed. What has run is unknown.
    #[error("backend `{backend}`: {what}{}", if *.is_lost { " (the device is lost for this process)" } else { "" })]
    Device {
        /// The backend.
        backend: crate::BackendId,
        /// The driver's own words and code.
        what: String,
        /// Whether nothing further can run on the device in this process.
        is_lost: bool,
    },
}
