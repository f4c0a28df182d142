//! What a backend offers, and why it is not the one: both as data.

use crate::{BackendId, Descriptor, MemoryKind};
use attn_plan::{DecodeSpec, SplitPolicy};
use kv_quant::{FloatType, LayoutKind, ScaleType, Side};
use std::ops::RangeInclusive;

/// What a backend can do. A descriptor outside it is refused with every missing part named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Channels of a head; empty: any that the format has.
    pub head_dims: Vec<u32>,
    /// Group lengths of K and V; empty: any that the format has, the whole head included.
    pub group_lens: Vec<u32>,
    /// Scale types.
    pub scale_types: Vec<ScaleType>,
    /// Element types of q.
    pub q_types: Vec<FloatType>,
    /// Element types of the output.
    pub out_types: Vec<FloatType>,
    /// Arrangements of the cache.
    pub layouts: Vec<LayoutKind>,
    /// Slots of a page.
    pub page_lens: RangeInclusive<u32>,
    /// Query heads a kv head.
    pub gqa_groups: RangeInclusive<u32>,
    /// New tokens a sequence.
    pub q_lens: RangeInclusive<u32>,
    /// Sliding window.
    pub window: bool,
    /// Logit soft-cap.
    pub soft_cap: bool,
    /// ALiBi slopes.
    pub alibi: bool,
    /// Attention sinks.
    pub sinks: bool,
    /// Log-sum-exp beside the output.
    pub lse: bool,
    /// Splits that do not depend on the neighbours in the batch.
    pub batch_invariant: bool,
    /// Where the cache may lie.
    pub memory: Vec<MemoryKind>,
    /// Whether q, k, v, out and lse may lie on its device.
    pub device_arrays: bool,
}

impl Capability {
    /// Everything that the request type can ask, cache memory owned by the backend.
    pub fn everything() -> Self {
        Self {
            head_dims: Vec::new(),
            group_lens: Vec::new(),
            scale_types: ScaleType::ALL.to_vec(),
            q_types: FloatType::ALL.to_vec(),
            out_types: FloatType::ALL.to_vec(),
            layouts: vec![
                LayoutKind::LightLlm,
                LayoutKind::Hnd,
                LayoutKind::Nhd,
                LayoutKind::Native,
                LayoutKind::Custom,
            ],
            page_lens: 1..=65536,
            gqa_groups: 1..=attn_plan::MAX_Q_HEADS,
            q_lens: 1..=attn_plan::MAX_Q_LEN,
            window: true,
            soft_cap: true,
            alibi: true,
            sinks: true,
            lse: true,
            batch_invariant: true,
            memory: vec![MemoryKind::Owned],
            device_arrays: false,
        }
    }

    /// Every part of the descriptor that is not offered; empty if all is.
    ///
    /// ```
    /// use attn_backend::{Capability, Descriptor};
    /// # use attn_plan::DecodeSpec;
    /// # use kv_quant::{CacheFormat, CacheLayout, ScaleType};
    /// # let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16)?;
    /// # let layout = CacheLayout::native(format, 8, 16)?;
    /// let descriptor = Descriptor::new(layout, DecodeSpec { window: Some(512), ..DecodeSpec::new(6, 2, 64) });
    /// let offer = Capability { head_dims: vec![128, 256], window: false, ..Capability::everything() };
    /// let missing = offer.missing(&descriptor);
    /// assert_eq!(missing[0].to_string(), "head_dim 64 (offered: 128, 256)");
    /// assert_eq!(missing[1].to_string(), "window 512 (offered: none)");
    /// # Ok::<(), kv_quant::Error>(())
    /// ```
    pub fn missing(&self, descriptor: &Descriptor) -> Vec<Missing> {
        let mut missing = Vec::new();
        let (layout, format) = (&descriptor.layout, descriptor.layout.format());
        listed(&mut missing, "head_dim", &format.head_dim(), &self.head_dims);
        listed(&mut missing, "K group_len", &format.group_len(Side::K), &self.group_lens);
        listed(&mut missing, "V group_len", &format.group_len(Side::V), &self.group_lens);
        one_of(&mut missing, "scale type", &format.scale_type(), &self.scale_types);
        one_of(&mut missing, "layout", &layout.kind(), &self.layouts);
        within(&mut missing, "page_len", layout.page_len(), &self.page_lens);
        one_of(&mut missing, "cache memory", &descriptor.memory, &self.memory);
        for spec in descriptor.specs() {
            self.missing_in_spec(spec, &mut missing);
        }
        if let SplitPolicy::BatchInvariant { .. } = descriptor.split
            && !self.batch_invariant
        {
            missing.push(Missing::new("split policy", descriptor.split, "throughput"));
        }
        missing
    }

    fn missing_in_spec(&self, spec: &DecodeSpec, missing: &mut Vec<Missing>) {
        within(missing, "gqa_group", spec.gqa_group(), &self.gqa_groups);
        within(missing, "q_len", spec.q_len, &self.q_lens);
        one_of(missing, "q type", &spec.q_type, &self.q_types);
        one_of(missing, "out type", &spec.out_type, &self.out_types);
        if let Some(window) = spec.window
            && !self.window
        {
            missing.push(Missing::new("window", window, "none"));
        }
        if let Some(cap) = spec.soft_cap
            && !self.soft_cap
        {
            missing.push(Missing::new("soft_cap", cap, "none"));
        }
        for (what, asked, offered) in [
            ("alibi_slopes", spec.alibi_slopes.is_some(), self.alibi),
            ("sinks", spec.sinks.is_some(), self.sinks),
            ("lse", spec.want_lse, self.lse),
        ] {
            if asked && !offered {
                missing.push(Missing::new(what, "", "none"));
            }
        }
    }
}

fn join<T: std::fmt::Display>(offered: &[T]) -> String {
    let names: Vec<String> = offered.iter().map(ToString::to_string).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// As [`one_of`]; an empty list offers everything.
fn listed<T: PartialEq + std::fmt::Display>(
    missing: &mut Vec<Missing>,
    what: &'static str,
    asked: &T,
    offered: &[T],
) {
    if !offered.is_empty() {
        one_of(missing, what, asked, offered);
    }
}

fn one_of<T: PartialEq + std::fmt::Display>(
    missing: &mut Vec<Missing>,
    what: &'static str,
    asked: &T,
    offered: &[T],
) {
    if !offered.contains(asked) {
        missing.push(Missing::new(what, asked, join(offered)));
    }
}

fn within(missing: &mut Vec<Missing>, what: &'static str, asked: u32, offered: &RangeInclusive<u32>) {
    if !offered.contains(&asked) {
        missing.push(Missing::new(what, asked, format!("{} to {}", offered.start(), offered.end())));
    }
}

/// One part of a descriptor that a backend does not offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which part.
    pub what: &'static str,
    /// What was asked.
    pub asked: String,
    /// What is offered.
    pub offered: String,
}

impl Missing {
    /// Names a part.
    pub fn new(what: &'static str, asked: impl std::fmt::Display, offered: impl std::fmt::Display) -> Self {
        Self { what, asked: asked.to_string(), offered: offered.to_string() }
    }
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.what)?;
        if !self.asked.is_empty() {
            write!(f, " {}", self.asked)?;
        }
        write!(f, " (offered: {})", self.offered)
    }
}

/// Why a backend is not the one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Its device, driver or kernel image is not there.
    #[error("unavailable: {reason}")]
    Unavailable {
        /// What is missing.
        reason: String,
    },
    /// It exists, in a build with another feature.
    #[error("not in this build: it needs feature `{feature}` of attn-backend")]
    NotCompiled {
        /// The cargo feature.
        feature: &'static str,
    },
    /// It cannot do a part of what was asked.
    #[error("unsupported: {}", .missing.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Unsupported {
        /// Every part that it cannot do.
        missing: Vec<Missing>,
    },
    /// A trial decode of the caller's own descriptor went wrong.
    #[error("failed its trial: {0}")]
    Trial(#[from] crate::TrialFailure),
    /// Another one ranks higher.
    #[error("not needed: {by} ranks higher")]
    Outranked {
        /// The chosen backend.
        by: BackendId,
    },
    /// Another one was asked for by name.
    #[error("not asked for: {chosen} was named by {by}")]
    NotNamed {
        /// The named backend.
        chosen: BackendId,
        /// Who named it.
        by: crate::NamedBy,
    },
}
