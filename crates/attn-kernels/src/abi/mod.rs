//! Parameter structs: the Rust twins of `cuda/params/*.h`.
//!
//! A kernel takes exactly one argument, one of these structs by value. Each twin asserts its size, alignment and
//! the offset of every field at compile time; the headers assert their sizes on the other side. Addresses are plain
//! `u64` device addresses, so that any engine's allocations fit. A shape stands on each address's line.

mod append;
mod decode;
mod paged_cache;
mod stream;

pub use append::{AppendParams, DequantizeParams};
pub use attn_plan::{NO_PARTIAL, WorkItem};
pub use decode::{DecodeParams, Ready};
pub use paged_cache::{ErrorKind, ErrorRecord, PagedCache, Plane};
pub use stream::StreamParams;

/// Asserts size, alignment and field offsets of a twin.
macro_rules! assert_layout {
    ($name:ty, size $size:expr, align $align:expr, { $($field:ident @ $offset:expr),* $(,)? }) => {
        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!(align_of::<$name>() == $align);
            $(assert!(core::mem::offset_of!($name, $field) == $offset);)*
        };
    };
}
use assert_layout;

assert_layout!(WorkItem, size 16, align 4, { request_idx @ 0, token_start @ 4, token_end @ 8, partial_idx @ 12 });
const _: () = assert!(NO_PARTIAL == u32::MAX);
