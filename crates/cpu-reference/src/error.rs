//! What the oracle and the CPU backend refuse. Everything about the request itself is refused earlier, by
//! `DecodeRequest::check`.

/// Every error of this crate.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array is not of the length that the request implies.
    #[error("{what} has {got} elements; needed: {want}")]
    Len {
        /// Which argument.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length it must have.
        want: usize,
    },
    /// `q` or `out` is of another element type than the spec says.
    #[error("{what} is {got}; the spec says {want}")]
    FloatType {
        /// Which argument.
        what: &'static str,
        /// Its type.
        got: kv_quant::FloatType,
        /// The type in the spec.
        want: kv_quant::FloatType,
    },
    /// The plan was made for another batch.
    #[error("the plan is for {plan} requests; the step has {batch}")]
    PlanBatch {
        /// Requests of the plan.
        plan: usize,
        /// Requests of the step.
        batch: usize,
    },
    /// A work item names tokens that its request does not have: the plan is for other lengths.
    #[error("request {request} has {kv_len} tokens; the plan names tokens up to {token_end}")]
    PlanRange {
        /// Which request.
        request: usize,
        /// Its length.
        kv_len: u32,
        /// One past the last token that the plan names.
        token_end: u32,
    },
    /// An instruction set that does not exist or that this machine does not have.
    #[error("instruction set {asked} cannot run here; available: {}", .available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "))]
    Isa {
        /// What was asked.
        asked: String,
        /// What this machine can run.
        available: Vec<crate::Isa>,
    },
    /// The spec's shapes differ from the cache's, or it fails its own check.
    #[error(transparent)]
    Request(#[from] attn_plan::Error),
    /// The cache cannot be read as the layout says.
    #[error(transparent)]
    Cache(#[from] kv_quant::Error),
}

impl Error {
    /// An instruction set that this machine cannot run.
    pub(crate) fn unavailable(isa: crate::Isa) -> Self {
        Self::Isa { asked: isa.name().into(), available: crate::Isa::available() }
    }
}
