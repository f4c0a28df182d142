//! Why no backend could be selected.

use crate::{BACKEND_VARIABLE, BackendId, Error, NamedBy, OperationKey, Refusal};

fn list<T: std::fmt::Display>(items: &[T]) -> String {
    let names: Vec<String> = items.iter().map(ToString::to_string).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn reasons(refused: &[(BackendId, Refusal)]) -> String {
    refused.iter().map(|(backend, refusal)| format!("\n  {backend}: {refusal}")).collect()
}

/// Why no backend could be selected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectError {
    /// The descriptor itself means nothing.
    #[error("the descriptor is wrong: {0}")]
    Descriptor(#[source] Error),
    /// No backend of this build does this operation over this format.
    #[error("no backend for {key}; there are backends for: {}", list(.existing))]
    NoBackend {
        /// What was looked up.
        key: OperationKey,
        /// The keys that exist.
        existing: Vec<OperationKey>,
    },
    /// A name that no backend of this project has.
    #[error("no backend is called `{name}` (named by {by}); for {key} there are: {}", list(.existing))]
    UnknownBackend {
        /// The name.
        name: BackendId,
        /// Who named it.
        by: NamedBy,
        /// What was looked up.
        key: OperationKey,
        /// The backends that exist for it.
        existing: Vec<BackendId>,
    },
    /// The environment variable holds no UTF-8.
    #[error("{BACKEND_VARIABLE} is not UTF-8; for {key} there are: {}", list(.existing))]
    Environment {
        /// What was looked up.
        key: OperationKey,
        /// The backends that exist for it.
        existing: Vec<BackendId>,
    },
    /// The named backend refuses and the policy forbids the fallback.
    #[error("backend `{name}` (named by {by}) refuses {descriptor}: {refusal}")]
    NamedRefused {
        /// The named backend.
        name: BackendId,
        /// Who named it.
        by: NamedBy,
        /// What was asked.
        descriptor: String,
        /// Why it refuses.
        refusal: Refusal,
    },
    /// Every candidate refuses.
    #[error("every backend refuses {descriptor}:{}", reasons(.refused))]
    AllRefused {
        /// What was asked.
        descriptor: String,
        /// Each candidate's reason.
        refused: Vec<(BackendId, Refusal)>,
    },
    /// The selected backend could not be opened.
    #[error("backend `{backend}` was selected and could not be opened: {error}")]
    Open {
        /// The selected backend.
        backend: BackendId,
        /// Why.
        #[source]
        error: Error,
    },
}
