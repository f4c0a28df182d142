//! What the caller asks of a backend, before any token exists: operation, cache, shapes, split policy.

use crate::{Error, FormatKey, MemoryKind, Operation, OperationKey};
use attn_plan::{DecodeSpec, SplitPolicy};
use kv_quant::CacheLayout;

/// Everything by which a backend is selected and a session opened.
///
/// ```
/// use attn_backend::Descriptor;
/// use attn_plan::DecodeSpec;
/// use kv_quant::{CacheFormat, CacheLayout, ScaleType};
/// let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16)?;
/// let descriptor = Descriptor::new(CacheLayout::native(format, 8, 16)?, DecodeSpec::new(6, 2, 64));
/// assert_eq!(descriptor.key().to_string(), "normal_decode over int8-group");
/// # Ok::<(), kv_quant::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Descriptor {
    /// What is done with the cache.
    pub operation: Operation,
    /// The cache: format, strides, pages.
    pub layout: CacheLayout,
    /// Shapes, mask and types of a step.
    pub spec: DecodeSpec,
    /// Other steps over the same cache, e.g. a prefill chunk with a larger `q_len`. A session runs these too.
    pub also: Vec<DecodeSpec>,
    /// What a split may depend on.
    pub split: SplitPolicy,
    /// Where the cache will lie.
    pub memory: MemoryKind,
}

impl Descriptor {
    /// Ordinary decode under the throughput policy.
    pub fn new(layout: CacheLayout, spec: DecodeSpec) -> Self {
        Self {
            operation: Operation::NormalDecode,
            layout,
            spec,
            also: Vec::new(),
            split: SplitPolicy::Throughput,
            memory: MemoryKind::Owned,
        }
    }

    /// Adds another kind of step over the same cache.
    pub fn also(mut self, spec: DecodeSpec) -> Self {
        self.also.push(spec);
        self
    }

    /// The same under another split policy.
    pub fn with_split(self, split: SplitPolicy) -> Self {
        Self { split, ..self }
    }

    /// The same over a cache that lies elsewhere, e.g. in the caller's buffers.
    pub fn with_memory(self, memory: MemoryKind) -> Self {
        Self { memory, ..self }
    }

    /// Where the registry looks for it.
    pub fn key(&self) -> OperationKey {
        OperationKey { format: FormatKey::of(self.layout.format()), operation: self.operation }
    }

    /// The main step and the others.
    pub fn specs(&self) -> impl Iterator<Item = &DecodeSpec> {
        std::iter::once(&self.spec).chain(&self.also)
    }

    /// Refuses shapes that mean nothing or do not fit the cache.
    ///
    /// # Errors
    /// [`Error::Plan`] with the number that is wrong.
    pub fn check(&self) -> Result<(), Error> {
        self.specs().try_for_each(|spec| crate::validate::spec(&self.layout, spec))
    }
}

impl std::fmt::Display for Descriptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layout = &self.layout;
        write!(
            f,
            "{}: {} on {} {} page_len{} {}",
            self.key(),
            self.spec,
            layout.format(),
            layout.kind(),
            layout.page_len(),
            self.split
        )?;
        for spec in &self.also {
            write!(f, ", also {spec}")?;
        }
        Ok(())
    }
}
