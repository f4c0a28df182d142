//! From a descriptor to one backend, and for each other candidate the reason why not.

use crate::{
    Backend, BackendId, Descriptor, Device, Error, Evidence, OperationKey, Refusal, Registry, TrialFailure,
};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The environment variable that names a backend; an argument goes before it. Empty counts as unset.
pub const BACKEND_VARIABLE: &str = "KV8_BACKEND";

/// Who named a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBy {
    /// [`SelectOptions::backend`].
    Argument,
    /// [`BACKEND_VARIABLE`].
    Environment,
}

impl std::fmt::Display for NamedBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            NamedBy::Argument => "argument",
            NamedBy::Environment => BACKEND_VARIABLE,
        })
    }
}

/// What to do if the backend that was named refuses. A name that exists nowhere is an error under every policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OverridePolicy {
    /// The named backend or an error.
    #[default]
    Error,
    /// Fall back if it is unavailable or cannot do the descriptor, with a warning; a failed trial is an error, since
    /// wrong numbers are a fault to be looked at.
    Warn,
    /// Fall back whatever the reason, with a warning.
    AllowFallback,
}

/// How a candidate is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrialMode {
    /// As the backend asks ([`Backend::isolation`]); a process only if the binary is found, else a thread, said so in
    /// the log.
    Auto,
    /// A thread of this process.
    Thread,
    /// A child process running this `kv8-validate` binary.
    Process(PathBuf),
    /// None: for those who have tried the same build on the same machine.
    Skip,
}

/// How to select.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectOptions {
    /// A backend by name.
    pub backend: Option<BackendId>,
    /// Whether [`BACKEND_VARIABLE`] is read when no backend is named here.
    pub read_environment: bool,
    /// What to do if the named one refuses.
    pub policy: OverridePolicy,
    /// How candidates are tried.
    pub trial: TrialMode,
    /// Time limit of one trial.
    pub time_limit: Duration,
}

impl Default for SelectOptions {
    fn default() -> Self {
        Self {
            backend: None,
            read_environment: true,
            policy: OverridePolicy::Error,
            trial: TrialMode::Auto,
            time_limit: Duration::from_secs(30),
        }
    }
}

impl SelectOptions {
    /// Names a backend.
    pub fn named(backend: BackendId) -> Self {
        Self { backend: Some(backend), ..Self::default() }
    }
}

/// A fallback that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Fallback {
    /// The backend that was named.
    pub named: BackendId,
    /// Who named it.
    pub by: NamedBy,
    /// Why it is not the one.
    pub refusal: Refusal,
}

/// The outcome: one backend, and why not the others.
#[derive(Clone, Debug)]
pub struct Selection {
    /// The chosen backend.
    pub backend: BackendId,
    /// What it runs on.
    pub device: Device,
    /// What its trial showed; `None` if trials were skipped.
    pub evidence: Option<Evidence>,
    /// Every other candidate, with its reason.
    pub refused: Vec<(BackendId, Refusal)>,
    /// Set if another backend was named and refused.
    pub fallback: Option<Fallback>,
    pub(crate) chosen: Arc<dyn Backend>,
    pub(crate) descriptor: Descriptor,
}

impl Selection {
    /// What was asked.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The chosen backend's object.
    pub fn chosen(&self) -> &Arc<dyn Backend> {
        &self.chosen
    }
}

impl std::fmt::Display for Selection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}", self.backend, self.device)?;
        for (backend, refusal) in &self.refused {
            write!(f, "\n  not {backend}: {refusal}")?;
        }
        Ok(())
    }
}

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

/// Selects a backend: looks the key up, filters by capability, ranks, and tries the best of them for real.
///
/// # Errors
/// [`SelectError`], each listing what exists or why each candidate refuses.
pub fn select(
    registry: &Registry,
    descriptor: &Descriptor,
    options: &SelectOptions,
) -> Result<Selection, SelectError> {
    descriptor.check().map_err(SelectError::Descriptor)?;
    let _ = (options, TrialFailure::TimeLimit(options.time_limit));
    let candidates = registry.candidates(&descriptor.key())?;
    let mut refused = Vec::new();
    for backend in candidates {
        match backend.probe() {
            Ok(device) => {
                return Ok(Selection {
                    backend: backend.id(),
                    device,
                    evidence: None,
                    refused,
                    fallback: None,
                    chosen: Arc::clone(backend),
                    descriptor: descriptor.clone(),
                });
            }
            Err(refusal) => refused.push((backend.id(), refusal)),
        }
    }
    Err(SelectError::AllRefused { descriptor: descriptor.to_string(), refused })
}
