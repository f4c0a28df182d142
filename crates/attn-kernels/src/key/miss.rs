//! What a miss in the table says: the thing asked for, and what there is.

use thiserror::Error;

use super::{Arithmetic, KernelKey};

/// Why no variant serves.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyMiss {
    /// No variant for this head dimension.
    #[error("no kernel for head_dim {head_dim}; there are kernels for {existing:?}")]
    HeadDim {
        /// What was asked.
        head_dim: u32,
        /// What there is.
        existing: Vec<u32>,
    },
    /// The kernels shift and mask token positions.
    #[error("page_len is {0}; the kernels take powers of two")]
    PageLen(u32),
    /// A plane whose rows do not start where the kernels can load them.
    #[error("{plane}: {what} is {value} bytes, the kernels need multiples of {align}")]
    Alignment {
        /// Which plane.
        plane: &'static str,
        /// Base or stride.
        what: &'static str,
        /// Its value in bytes.
        value: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// A code plane that spans more than offsets of 32 bits in units of 16 bytes reach.
    #[error("{plane} spans {span} bytes, the kernels reach {limit}")]
    Span {
        /// Which plane.
        plane: &'static str,
        /// Bytes from the first element to the end of the last page.
        span: u128,
        /// Most that is reached.
        limit: u64,
    },
    /// No variant takes the groups and scales. Lists the symbols of the head dimension.
    #[error(
        "no {arithmetic:?} kernel for head_dim {head_dim}, groups of {k_group_len} and {v_group_len}, scales {scale_type} in {shared_bytes} bytes of shared memory; there are {existing:?}"
    )]
    NoInstance {
        /// What was asked.
        head_dim: u32,
        /// What was asked.
        k_group_len: u32,
        /// What was asked.
        v_group_len: u32,
        /// What was asked, as the number in the parameters.
        scale_type: u32,
        /// What was asked.
        arithmetic: Arithmetic,
        /// Shared memory of the device.
        shared_bytes: u32,
        /// Symbols of variants for the head dimension.
        existing: Vec<String>,
    },
    /// A row of channels that append and dequantize cannot hold.
    #[error("head_dim is {head_dim}; append takes multiples of 8 up to 256")]
    RowLen {
        /// What was asked.
        head_dim: u32,
    },
    /// The cache has other groups, scales or alignment than the one that the variant was chosen for.
    #[error("{key} was chosen for another cache")]
    OtherCache {
        /// The variant.
        key: KernelKey,
    },
    /// The table has no such variant.
    #[error("no kernel {key}; for this head_dim there are {existing:?}")]
    NoKey {
        /// What was asked.
        key: KernelKey,
        /// Symbols of variants for the head dimension.
        existing: Vec<String>,
    },
}
