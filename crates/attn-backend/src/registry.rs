//! The backends that exist, by cache format and operation.

use crate::{Backend, BackendId, OperationKey, SelectError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Which backends can be asked. Holds only what exists in this build.
#[derive(Debug, Default)]
pub struct Registry {
    entries: BTreeMap<OperationKey, Vec<Arc<dyn Backend>>>,
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

    /// Adds a backend under a key; one of the same name is replaced.
    pub fn register(&mut self, key: OperationKey, backend: Arc<dyn Backend>) {
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
