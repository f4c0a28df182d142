//! Parameters of the plain streaming kernels that measure a device's bandwidth. Twin: `cuda/params/stream.h`.

use bytemuck::{Pod, Zeroable};

use super::assert_layout;

/// The one argument of `stream_read` and `stream_copy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct StreamParams {
    /// `num_vectors * 16` bytes, aligned to 16.
    pub src: u64,
    /// Copy: the same size; read: u32 `[1]`, never written.
    pub dst: u64,
    /// Vectors of 16 bytes.
    pub num_vectors: u64,
}
assert_layout!(StreamParams, size 24, align 8, { src @ 0, dst @ 8, num_vectors @ 16 });
