//! The backends that exist, by cache format and operation.

use crate::{Backend, BackendId, Device, Evidence, Isolation, OperationKey, SelectError, TrialFailure};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which backends can be asked. Holds only what exists in this build.
///
/// ```
/// use attn_backend::{BackendId, Registry};
/// let registry = Registry::builtin();
/// assert!(registry.backend_ids().contains(&BackendId::CPU));
/// assert_eq!(registry.keys().next().map(ToString::to_string).as_deref(), Some("normal_decode over int8-group"));
/// ```
#[derive(Debug, Default)]
pub struct Registry {
    entries: BTreeMap<OperationKey, Vec<Arc<dyn Backend>>>,
    /// Verdicts of trials, good and bad, for as long as the registry lives.
    verdicts: Mutex<HashMap<Verdict, Result<Evidence, TrialFailure>>>,
}

/// What a verdict holds for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Verdict {
    pub backend: BackendId,
    pub device: Device,
    /// The descriptor's trial.
    pub key: String,
    pub isolation: Isolation,
}

impl Registry {
    /// Nothing registered.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The backends of this build.
    pub fn builtin() -> Self {
        crate::backends::builtin()
    }

    /// Adds a backend under a key; one of the same name is replaced and its verdicts are forgotten.
    pub fn register(&mut self, key: OperationKey, backend: Arc<dyn Backend>) {
        self.verdicts().retain(|verdict, _| verdict.backend != backend.id());
        let entry = self.entries.entry(key).or_default();
        entry.retain(|other| other.id() != backend.id());
        entry.push(backend);
    }

    /// Keys that have at least one backend.
    pub fn keys(&self) -> impl Iterator<Item = &OperationKey> {
        self.entries.keys()
    }

    /// Names of all backends under any key, each once.
    pub fn backend_ids(&self) -> Vec<BackendId> {
        let mut ids: Vec<BackendId> = self.entries.values().flatten().map(|backend| backend.id()).collect();
        ids.sort();
        ids.dedup();
        ids
    }

    /// Forgets the verdicts of trials: the next selection tries again.
    pub fn forget_verdicts(&self) {
        self.verdicts().clear();
    }

    /// An earlier verdict.
    pub(crate) fn verdict(&self, verdict: &Verdict) -> Option<Result<Evidence, TrialFailure>> {
        let found = self.verdicts().get(verdict).cloned();
        found.map(|outcome| outcome.map(|evidence| Evidence { is_cached: true, ..evidence }))
    }

    pub(crate) fn keep_verdict(&self, verdict: Verdict, outcome: Result<Evidence, TrialFailure>) {
        self.verdicts().insert(verdict, outcome);
    }

    /// The map is consistent between any two of its operations, so a panic elsewhere does not spoil it.
    fn verdicts(&self) -> MutexGuard<'_, HashMap<Verdict, Result<Evidence, TrialFailure>>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The backends of a key, at least one.
    ///
    /// # Errors
    /// [`SelectError::NoBackend`] with the keys that exist.
    pub fn candidates(&self, key: &OperationKey) -> Result<&[Arc<dyn Backend>], SelectError> {
        match self.entries.get(key) {
            Some(candidates) if !candidates.is_empty() => Ok(candidates),
            _ => Err(SelectError::NoBackend { key: key.clone(), existing: self.keys().cloned().collect() }),
        }
    }
}
