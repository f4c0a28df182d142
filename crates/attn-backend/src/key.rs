//! Names: of backends, of cache formats, of operations, and the key under which a backend is registered.

use std::borrow::Cow;

/// The name of a backend, as an override or a report spells it.
///
/// ```
/// use attn_backend::BackendId;
/// assert_eq!(BackendId::CPU.as_str(), "cpu");
/// assert_eq!(BackendId::named("my-npu".to_owned()).to_string(), "my-npu");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendId(Cow<'static, str>);

impl BackendId {
    /// The rayon backend of `cpu-reference`.
    pub const CPU: Self = Self(Cow::Borrowed("cpu"));
    /// The same with q.k in integers: [`crate::CpuInt8Backend`].
    pub const CPU_INT8: Self = Self(Cow::Borrowed("cpu-int8"));
    /// The CUDA backend of `attn-kernels` (feature `cuda`).
    pub const CUDA: Self = Self(Cow::Borrowed("cuda"));

    /// Any other name.
    pub fn named(name: impl Into<Cow<'static, str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for BackendId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a cache format: how values are coded, apart from numbers such as group lengths.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FormatKey(Cow<'static, str>);

impl FormatKey {
    /// Symmetric INT8 codes with one scale a group: [`kv_quant::CacheFormat`].
    pub const INT8_GROUP: Self = Self(Cow::Borrowed("int8-group"));

    /// Floats without scales, for comparison: [`kv_quant::CacheFormat::unquantized`].
    pub const UNQUANTIZED: Self = Self(Cow::Borrowed("unquantized"));

    /// The key of a cache's format.
    pub fn of(format: &kv_quant::CacheFormat) -> Self {
        match format.element() {
            kv_quant::Element::Int8 => Self::INT8_GROUP,
            kv_quant::Element::Float(_) => Self::UNQUANTIZED,
        }
    }

    /// Any other name.
    pub fn named(name: impl Into<Cow<'static, str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for FormatKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a backend is asked to do with a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Operation {
    /// Ordinary decode: each request reads its own tokens.
    NormalDecode,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Operation::NormalDecode => "normal_decode",
        })
    }
}

/// The key of the registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OperationKey {
    /// Cache format.
    pub format: FormatKey,
    /// What is done with it.
    pub operation: Operation,
}

impl std::fmt::Display for OperationKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} over {}", self.operation, self.format)
    }
}
