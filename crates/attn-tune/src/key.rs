//! What is fixed while a session lives.

use attn_plan::{DecodeSpec, SplitPolicy};
use kv_quant::{CacheLayout, LayoutKind, ScaleType, Side};
use std::fmt;
use std::str::FromStr;

/// Pages shorter than this scatter the rows of one head.
const SCATTERED_PAGE_LEN: u32 = 16;

/// How the rows of a head lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayoutClass {
    /// Codes and scales in planes of their own, pages of at least 16 tokens.
    PlanesPaged,
    /// Codes and scales in planes of their own, shorter pages or single slots.
    PlanesScattered,
    /// Codes and scales together, pages of at least 16 tokens.
    RecordsPaged,
    /// Codes and scales together, shorter pages or single slots.
    RecordsScattered,
}

impl LayoutClass {
    const ALL: [(Self, &'static str); 4] = [
        (Self::PlanesPaged, "planes-paged"),
        (Self::PlanesScattered, "planes-scattered"),
        (Self::RecordsPaged, "records-paged"),
        (Self::RecordsScattered, "records-scattered"),
    ];

    /// The class of a layout.
    pub fn of(layout: &CacheLayout) -> Self {
        match (layout.kind() == LayoutKind::Native, layout.page_len() < SCATTERED_PAGE_LEN) {
            (true, true) => Self::RecordsScattered,
            (true, false) => Self::RecordsPaged,
            (false, true) => Self::PlanesScattered,
            (false, false) => Self::PlanesPaged,
        }
    }

    /// Whether the rows of one head are scattered, and those of a token's heads are neighbours.
    pub fn is_scattered(self) -> bool {
        matches!(self, Self::PlanesScattered | Self::RecordsScattered)
    }
}

/// What a split may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyClass {
    /// [`SplitPolicy::BatchInvariant`].
    BatchInvariant {
        /// Tokens between the cuts.
        split_len: u32,
    },
    /// [`SplitPolicy::Throughput`].
    Throughput,
}

impl PolicyClass {
    /// The class of a policy.
    pub fn of(policy: SplitPolicy) -> Self {
        match policy {
            SplitPolicy::Throughput => Self::Throughput,
            SplitPolicy::BatchInvariant { split_len } => Self::BatchInvariant { split_len },
        }
    }

    fn parse(name: &str) -> Option<Self> {
        if name == THROUGHPUT {
            return Some(Self::Throughput);
        }
        let split_len =
            name.strip_prefix(BATCH_INVARIANT)?.parse().ok().filter(|split_len| *split_len > 0)?;
        Some(Self::BatchInvariant { split_len })
    }
}

const THROUGHPUT: &str = "throughput";
const BATCH_INVARIANT: &str = "batch-invariant-";
/// Ends the name of a key with it.
const SOFT_CAP: &str = "soft-cap";

impl fmt::Display for PolicyClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Throughput => f.write_str(THROUGHPUT),
            Self::BatchInvariant { split_len } => write!(f, "{BATCH_INVARIANT}{split_len}"),
        }
    }
}

/// Shapes, types and policy of a step. Its `Display` is how a profile names it.
/// ```
/// use attn_tune::StaticKey;
/// let key: StaticKey = "d128 k8 v8 f16 gqa4 q1 records-paged throughput".parse()?;
/// assert_eq!((key.head_dim, key.gqa_group), (128, 4));
/// assert_eq!(key.to_string().parse(), Ok(key));
/// let other = "d128 k8 v8 f16 gqa4 q1 records-paged batch-invariant-512 soft-cap";
/// assert_eq!(other.parse::<StaticKey>()?.to_string(), other);
/// # Ok::<(), attn_tune::StaticKeyError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StaticKey {
    /// Channels of a head.
    pub head_dim: u32,
    /// Channels of a group of K.
    pub k_group_len: u32,
    /// Channels of a group of V.
    pub v_group_len: u32,
    /// Type of the scales.
    pub scale_type: ScaleType,
    /// Query heads of a kv head.
    pub gqa_group: u32,
    /// Query tokens of a request.
    pub q_len: u32,
    /// How rows lie.
    pub layout: LayoutClass,
    /// Whether logits are capped, which every one of them pays for.
    pub soft_cap: bool,
    /// What a split may depend on.
    pub policy: PolicyClass,
}

impl StaticKey {
    /// Whether four heads of a block go through scattered rows in step, and gain by it (`docs/kernel-log.md`, section 17).
    pub fn goes_in_step(&self) -> bool {
        self.layout.is_scattered()
            && self.head_dim == 128
            && (self.k_group_len, self.v_group_len) == (8, 8)
            && self.scale_type == ScaleType::F16
            && self.gqa_group * self.q_len <= 8
    }

    /// Whether items of one head a block have a kernel of eight warps, where the architecture has such (`KernelKind::Items` of attn-kernels; a test
    /// holds both together).
    pub fn has_wide_items(&self) -> bool {
        let most_rows = match self.head_dim {
            64 => 16,
            128 => 8,
            _ => 0,
        };
        (self.k_group_len, self.v_group_len) == (8, 8)
            && (self.scale_type == ScaleType::F16
                || (self.scale_type, self.head_dim) == (ScaleType::Bf16, 128))
            && self.gqa_group * self.q_len <= most_rows
    }

    /// The key of a cache, a spec and a policy.
    pub fn of(layout: &CacheLayout, spec: &DecodeSpec, policy: SplitPolicy) -> Self {
        let format = layout.format();
        Self {
            head_dim: format.head_dim(),
            k_group_len: format.group_len(Side::K),
            v_group_len: format.group_len(Side::V),
            scale_type: format.scale_type(),
            gqa_group: spec.gqa_group(),
            q_len: spec.q_len,
            layout: LayoutClass::of(layout),
            soft_cap: spec.soft_cap.is_some(),
            policy: PolicyClass::of(policy),
        }
    }
}

fn name_of<T: PartialEq + Copy>(all: &[(T, &'static str)], value: T) -> &'static str {
    all.iter().find(|(known, _)| *known == value).map_or("", |(_, name)| *name)
}

impl fmt::Display for StaticKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            head_dim,
            k_group_len,
            v_group_len,
            scale_type,
            gqa_group,
            q_len,
            layout,
            soft_cap,
            policy,
        } = *self;
        let layout = name_of(&LayoutClass::ALL, layout);
        write!(
            f,
            "d{head_dim} k{k_group_len} v{v_group_len} {scale_type} gqa{gqa_group} q{q_len} {layout} {policy}"
        )?;
        if soft_cap { write!(f, " {SOFT_CAP}") } else { Ok(()) }
    }
}

/// A name that is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no key; a valid one is \"d128 k8 v8 f16 gqa4 q1 records-paged throughput\"")]
pub struct StaticKeyError {
    /// What was given.
    pub name: String,
}

impl FromStr for StaticKey {
    type Err = StaticKeyError;

    fn from_str(name: &str) -> Result<Self, StaticKeyError> {
        parse(name).ok_or_else(|| StaticKeyError { name: name.to_owned() })
    }
}

fn parse(name: &str) -> Option<StaticKey> {
    let mut words = name.split(' ');
    let mut number = |prefix: &str| words.next()?.strip_prefix(prefix)?.parse::<u32>().ok();
    let (head_dim, k_group_len, v_group_len) = (number("d")?, number("k")?, number("v")?);
    let scale_type = words.next()?;
    let scale_type = [ScaleType::F16, ScaleType::Bf16, ScaleType::F32]
        .into_iter()
        .find(|known| known.to_string() == scale_type)?;
    let mut number = |prefix: &str| words.next()?.strip_prefix(prefix)?.parse::<u32>().ok();
    let (gqa_group, q_len) = (number("gqa")?, number("q")?);
    let (layout, policy) = (words.next()?, words.next()?);
    let layout = LayoutClass::ALL.iter().find(|(_, known)| *known == layout)?.0;
    let policy = PolicyClass::parse(policy)?;
    let soft_cap = match words.next() {
        None => false,
        Some(word) if word == SOFT_CAP => words.next().is_none().then_some(true)?,
        Some(_) => return None,
    };
    Some(StaticKey {
        head_dim,
        k_group_len,
        v_group_len,
        scale_type,
        gqa_group,
        q_len,
        layout,
        soft_cap,
        policy,
    })
}
