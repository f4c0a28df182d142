//! Which variant of a kernel: the key, its symbol, and the choice for a cache and a number of query rows.
//!
//! Pure functions over the table; no device is asked. A miss says what was asked and why each thing that exists was
//! refused.

mod miss;

use core::fmt;

use kv_quant::ScaleType;

use crate::abi::{PagedCache, Plane};
pub use crate::instances::INSTANCES;
pub use miss::KeyMiss;

/// Threads of a block of stage 1 and of the reader; `kNumThreads` in `cuda/decode/traits.cuh`.
pub const STAGE1_THREADS: u32 = 128;
/// Threads of a block of the kernels of shares and of items; `kWideWarps` in `cuda/decode/wide.cuh`.
pub const WIDE_THREADS: u32 = 256;
/// Query rows of one row tile.
pub const ROWS_PER_TILE: u32 = 8;

/// The kernels that come in variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KernelKind {
    /// Decode stage 1.
    Stage1,
    /// Reads what stage 1 reads and computes nothing.
    Reader,
    /// Stage 1 of requests in shares, and of nothing else, in blocks of eight warps.
    Shares,
    /// Stage 1 of the items of a plan, and of nothing else, in blocks of eight warps.
    Items,
}

/// Group lengths that a variant takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Groups {
    /// K and V groups of 8, scale rows aligned to 16 bytes, or to their length if that is less.
    G8,
    /// K and V groups of 16 or more, alike or not, up to the whole head.
    G16,
    /// Any two groups of 8 or more.
    Any,
    /// K and V groups are the whole head.
    Whole,
}

/// Scale types that a variant takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    /// f16.
    F16,
    /// bf16.
    Bf16,
    /// f32.
    F32,
    /// Any, decided at run time.
    Any,
}

/// How a variant computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Tensor cores, f16 operands.
    #[default]
    Mma,
    /// Plain f32, for tests: a dropped token cannot hide in its rounding.
    F32,
}

/// What tells one variant from another. Its `Display` is the symbol in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelKey {
    /// Which kernel.
    pub kind: KernelKind,
    /// Channels of a head.
    pub head_dim: u32,
    /// Group lengths it takes.
    pub groups: Groups,
    /// Scale types it takes.
    pub scales: Scales,
    /// Query rows of a block, in units of [`ROWS_PER_TILE`].
    pub row_tiles: u32,
    /// How it computes.
    pub arithmetic: Arithmetic,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Which variant.
    pub key: KernelKey,
    /// Blocks that a multiprocessor of sm_90 holds at once.
    pub min_ctas: u32,
    /// kv heads that a block may take, a warp each, instead of one head with four warps along its tokens.
    pub max_heads: u32,
    /// Tiles of 16 tokens in flight a warp.
    pub stages: u32,
    /// Dynamic shared memory of a launch, in bytes.
    pub shared_bytes: u32,
    /// Architectures with machine code.
    pub archs: &'static [&'static str],
}

impl fmt::Display for KernelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = match self.groups {
            Groups::G8 => "g8",
            Groups::G16 => "g16",
            Groups::Any => "gx",
            Groups::Whole => "gw",
        };
        let scales = match self.scales {
            Scales::F16 => "sf16",
            Scales::Bf16 => "sbf16",
            Scales::F32 => "sf32",
            Scales::Any => "sx",
        };
        let name = match self.kind {
            KernelKind::Stage1 => "stage1",
            KernelKind::Reader => "reader",
            KernelKind::Shares => "shares",
            KernelKind::Items => "items",
        };
        write!(f, "kv8_{name}_d{}_{groups}_{scales}", self.head_dim)?;
        if self.kind != KernelKind::Reader {
            write!(f, "_n{}", self.row_tiles)?;
        }
        match self.arithmetic {
            Arithmetic::Mma => Ok(()),
            Arithmetic::F32 => f.write_str("_f32"),
        }
    }
}

impl KernelKey {
    /// The row of this key.
    ///
    /// # Errors
    /// [`KeyMiss::NoKey`], listing what there is.
    pub fn instance(&self) -> Result<&'static Instance, KeyMiss> {
        INSTANCES
            .iter()
            .find(|instance| instance.key == *self)
            .ok_or_else(|| KeyMiss::NoKey { key: *self, existing: existing(self.head_dim) })
    }

    /// Query rows of one block.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.row_tiles * ROWS_PER_TILE
    }
}

/// What is asked of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyQuery {
    /// Which kernel.
    pub kind: KernelKind,
    /// Query rows of a (request, kv head): `gqa_group * q_len`.
    pub num_rows: u32,
    /// How to compute.
    pub arithmetic: Arithmetic,
    /// Shared memory that a block may have, in bytes.
    pub shared_bytes: u32,
}

/// Chooses the variant for a cache: the one made for its groups and scales before those for any, then as few blocks of
/// query rows as possible, then the fewest idle rows.
///
/// # Errors
/// [`KeyMiss`]: the cache has a property that no kernel takes, or the table has no variant for it.
pub fn select(cache: &PagedCache, query: &KeyQuery) -> Result<&'static Instance, KeyMiss> {
    check_cache(cache)?;
    let mut head_dims: Vec<u32> = INSTANCES.iter().map(|instance| instance.key.head_dim).collect();
    head_dims.sort_unstable();
    head_dims.dedup();
    if !head_dims.contains(&cache.head_dim) {
        return Err(KeyMiss::HeadDim { head_dim: cache.head_dim, existing: head_dims });
    }
    let fits = |instance: &&Instance| {
        instance.key.kind == query.kind
            && instance.key.head_dim == cache.head_dim
            && instance.key.arithmetic == query.arithmetic
            && instance.shared_bytes <= query.shared_bytes
            && instance.key.groups.take(cache)
            && instance.key.scales.take(cache.scale_type)
    };
    let rank = |instance: &&Instance| {
        let key = &instance.key;
        let blocks = query.num_rows.div_ceil(key.rows());
        let is_whole = key.groups == Groups::Whole;
        // One scale a row costs nothing a channel, whatever its type.
        let is_general = key.scales == Scales::Any && !is_whole;
        (key.groups == Groups::Any, is_general, blocks, key.row_tiles, !is_whole)
    };
    INSTANCES.iter().filter(fits).min_by_key(rank).ok_or_else(|| KeyMiss::NoInstance {
        head_dim: cache.head_dim,
        k_group_len: cache.k_group_len,
        v_group_len: cache.v_group_len,
        scale_type: cache.scale_type,
        arithmetic: query.arithmetic,
        shared_bytes: query.shared_bytes,
        existing: existing(cache.head_dim),
    })
}

/// The variant that does a variant of stage 1's work in shares alone, where there is one.
#[must_use]
pub fn shares_of(stage1: &KernelKey) -> Option<&'static Instance> {
    of_kind(KernelKind::Shares, stage1)
}

/// The variant that does the items of a plan in a variant of stage 1's place, where there is one.
#[must_use]
pub fn items_of(stage1: &KernelKey) -> Option<&'static Instance> {
    of_kind(KernelKind::Items, stage1)
}

fn of_kind(kind: KernelKind, stage1: &KernelKey) -> Option<&'static Instance> {
    let key = KernelKey { kind, ..*stage1 };
    INSTANCES.iter().find(|instance| instance.key == key)
}

/// Whether a variant chosen before takes this cache: the same checks as [`select`], without the choice.
///
/// # Errors
/// [`KeyMiss`].
pub fn check_instance(instance: &Instance, cache: &PagedCache) -> Result<(), KeyMiss> {
    check_cache(cache)?;
    let key = &instance.key;
    if key.head_dim == cache.head_dim && key.groups.take(cache) && key.scales.take(cache.scale_type) {
        return Ok(());
    }
    Err(KeyMiss::OtherCache { key: *key })
}

/// Whether append and dequantize take this cache. They have one variant each and ask less than stage 1.
///
/// # Errors
/// [`KeyMiss`].
pub fn check_append(cache: &PagedCache) -> Result<(), KeyMiss> {
    if !cache.head_dim.is_multiple_of(ROW_CHANNELS) || cache.head_dim > MAX_ROW_CHANNELS {
        return Err(KeyMiss::RowLen { head_dim: cache.head_dim });
    }
    if !cache.page_len.is_power_of_two() {
        return Err(KeyMiss::PageLen(cache.page_len));
    }
    check_alignment(cache, ROW_CHANNELS.into())
}

fn existing(head_dim: u32) -> Vec<String> {
    let of_head_dim = INSTANCES.iter().filter(|instance| instance.key.head_dim == head_dim);
    of_head_dim.map(|instance| instance.key.to_string()).collect()
}

impl Groups {
    fn take(self, cache: &PagedCache) -> bool {
        let (k, v) = (cache.k_group_len, cache.v_group_len);
        match self {
            Groups::G8 => {
                k == 8
                    && v == 8
                    && [&cache.k_scales, &cache.v_scales].iter().all(|plane| {
                        let unit = scale_bytes(cache.scale_type);
                        let row_bytes = u64::from(cache.head_dim / 8) * unit;
                        misaligned(plane, unit, 1 << (row_bytes | 16).trailing_zeros()).is_none()
                    })
            }
            Groups::G16 => k >= 16 && v >= 16,
            Groups::Any => k >= 8 && v >= 8,
            Groups::Whole => k == cache.head_dim && v == cache.head_dim,
        }
    }
}

impl Scales {
    fn take(self, scale_type: u32) -> bool {
        match self {
            Scales::F16 => scale_type == ScaleType::F16 as u32,
            Scales::Bf16 => scale_type == ScaleType::Bf16 as u32,
            Scales::F32 => scale_type == ScaleType::F32 as u32,
            Scales::Any => true,
        }
    }
}

fn scale_bytes(scale_type: u32) -> u64 {
    if scale_type == ScaleType::F32 as u32 { 4 } else { 2 }
}

/// The part of a plane that is no multiple of `align` bytes.
fn misaligned(plane: &Plane, element_bytes: u64, align: u64) -> Option<(&'static str, u64)> {
    [
        ("base", plane.base),
        ("page_stride", plane.page_stride.wrapping_mul(element_bytes)),
        ("slot_stride", plane.slot_stride.wrapping_mul(element_bytes)),
        ("head_stride", plane.head_stride.wrapping_mul(element_bytes)),
    ]
    .into_iter()
    .find(|(_, value)| value % align != 0)
}

/// Append and dequantize hold a row in up to 32 lanes of 8 channels.
const ROW_CHANNELS: u32 = 8;
const MAX_ROW_CHANNELS: u32 = 256;

/// Codes are copied 16 bytes at a time, and their offsets are counted in 16 bytes, in 32 bits.
const CODE_ALIGN: u64 = 16;
const CODE_SPAN: u64 = CODE_ALIGN << 32;

/// What holds for all kernels that read a cache through tiles.
fn check_cache(cache: &PagedCache) -> Result<(), KeyMiss> {
    if !cache.page_len.is_power_of_two() {
        return Err(KeyMiss::PageLen(cache.page_len));
    }
    check_alignment(cache, CODE_ALIGN)?;
    for (plane, strides) in [("K codes", &cache.k_codes), ("V codes", &cache.v_codes)] {
        let last = |count: u32, stride: u64| u128::from(count.saturating_sub(1)) * u128::from(stride);
        let span = last(cache.num_pages, strides.page_stride)
            + last(cache.page_len, strides.slot_stride)
            + u128::from(cache.head_dim);
        if span > u128::from(CODE_SPAN) {
            return Err(KeyMiss::Span { plane, span, limit: CODE_SPAN });
        }
    }
    Ok(())
}

fn check_alignment(cache: &PagedCache, code_align: u64) -> Result<(), KeyMiss> {
    let unit = scale_bytes(cache.scale_type);
    let planes = [
        ("K codes", &cache.k_codes, 1, code_align),
        ("V codes", &cache.v_codes, 1, code_align),
        ("K scales", &cache.k_scales, unit, unit),
        ("V scales", &cache.v_scales, unit, unit),
    ];
    for (plane, strides, element_bytes, align) in planes {
        if let Some((what, value)) = misaligned(strides, element_bytes, align) {
            return Err(KeyMiss::Alignment { plane, what, value, align });
        }
    }
    Ok(())
}
