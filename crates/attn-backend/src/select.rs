//! From a descriptor to one backend, and for each other candidate the reason why not.

use crate::backends::BEHIND_FEATURES;
use crate::registry::Verdict;
use crate::{
    Backend, BackendId, Descriptor, Device, Evidence, Isolation, Refusal, Registry, SelectError,
    TrialFailure, trial,
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
///
/// ```
/// use attn_backend::{BackendId, OverridePolicy, SelectOptions};
/// // CUDA if it is there and can do it; otherwise the next best, with a warning in log and selection.
/// let options = SelectOptions { policy: OverridePolicy::Warn, ..SelectOptions::named(BackendId::CUDA) };
/// assert!(options.read_environment);
/// ```
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

/// A candidate that passed.
struct Passed {
    device: Device,
    evidence: Option<Evidence>,
}

/// Selects a backend: looks the key up, filters by capability, ranks, and tries the best of them for real.
///
/// Candidates are tried from the highest rank down until one passes; the others are not tried for nothing.
///
/// ```
/// use attn_backend::{BackendId, Descriptor, Registry, SelectOptions, select};
/// use attn_plan::DecodeSpec;
/// use kv_quant::{CacheFormat, CacheLayout, ScaleType};
/// let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16)?;
/// let descriptor = Descriptor::new(CacheLayout::native(format, 8, 16)?, DecodeSpec::new(6, 2, 64));
/// let selection = select(&Registry::builtin(), &descriptor, &SelectOptions::named(BackendId::CPU))?;
/// assert_eq!(selection.backend, BackendId::CPU);
/// assert!(selection.evidence.is_some_and(|evidence| evidence.worst_share <= 1.0));
///
/// let unknown = SelectOptions::named(BackendId::named("abacus"));
/// let error = select(&Registry::builtin(), &descriptor, &unknown).unwrap_err();
/// assert!(error.to_string().starts_with("no backend is called `abacus`"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`SelectError`], each listing what exists or why each candidate refuses.
pub fn select(
    registry: &Registry,
    descriptor: &Descriptor,
    options: &SelectOptions,
) -> Result<Selection, SelectError> {
    descriptor.check().map_err(SelectError::Descriptor)?;
    let mut candidates: Vec<Arc<dyn Backend>> = registry.candidates(&descriptor.key())?.to_vec();
    // Stable: of equal rank, the one registered first.
    candidates.sort_by_key(|backend| std::cmp::Reverse(backend.rank(descriptor)));

    let mut refused = Vec::new();
    let mut fallback = None;
    if let Some((name, by)) = named(&candidates, descriptor, options)? {
        let backend =
            candidates.iter().position(|backend| backend.id() == name).map(|i| candidates.remove(i));
        let outcome = match &backend {
            Some(backend) => examine(registry, backend, descriptor, options),
            None => Err(behind_feature(&name)),
        };
        match (outcome, backend) {
            (Ok(passed), Some(backend)) => {
                let not_named =
                    |other: &Arc<dyn Backend>| (other.id(), Refusal::NotNamed { chosen: name.clone(), by });
                refused.extend(candidates.iter().map(not_named));
                return Ok(chosen(backend, passed, descriptor, refused, None));
            }
            (Ok(_), None) => {}
            (Err(refusal), _) => {
                if !may_fall_back(options.policy, &refusal) {
                    let descriptor = descriptor.to_string();
                    return Err(SelectError::NamedRefused { name, by, descriptor, refusal });
                }
                tracing::warn!(backend = %name, named_by = %by, %refusal, "the named backend refuses: falling back");
                refused.push((name.clone(), refusal.clone()));
                fallback = Some(Fallback { named: name, by, refusal });
            }
        }
    }

    let mut rest = candidates.into_iter();
    while let Some(backend) = rest.next() {
        match examine(registry, &backend, descriptor, options) {
            Ok(passed) => {
                let by = backend.id();
                refused.extend(rest.map(|other| (other.id(), reason_below(&other, descriptor, by.clone()))));
                return Ok(chosen(backend, passed, descriptor, refused, fallback));
            }
            Err(refusal) => {
                if matches!(refusal, Refusal::Trial(_)) {
                    tracing::warn!(backend = %backend.id(), %refusal, "a backend is refused");
                }
                refused.push((backend.id(), refusal));
            }
        }
    }
    Err(SelectError::AllRefused { descriptor: descriptor.to_string(), refused })
}

fn chosen(
    backend: Arc<dyn Backend>,
    passed: Passed,
    descriptor: &Descriptor,
    refused: Vec<(BackendId, Refusal)>,
    fallback: Option<Fallback>,
) -> Selection {
    let selection = Selection {
        backend: backend.id(),
        device: passed.device,
        evidence: passed.evidence,
        refused,
        fallback,
        chosen: backend,
        descriptor: descriptor.clone(),
    };
    tracing::debug!(backend = %selection.backend, device = %selection.device, %descriptor, "selected");
    selection
}

/// The name given by argument or environment, if it exists at all.
fn named(
    candidates: &[Arc<dyn Backend>],
    descriptor: &Descriptor,
    options: &SelectOptions,
) -> Result<Option<(BackendId, NamedBy)>, SelectError> {
    let existing = || candidates.iter().map(|backend| backend.id()).collect();
    let key = descriptor.key();
    let (name, by) = match &options.backend {
        Some(name) => (name.clone(), NamedBy::Argument),
        None if options.read_environment => match std::env::var(BACKEND_VARIABLE) {
            Ok(name) if !name.is_empty() => (BackendId::named(name), NamedBy::Environment),
            Err(std::env::VarError::NotUnicode(_)) => {
                return Err(SelectError::Environment { key, existing: existing() });
            }
            _ => return Ok(None),
        },
        None => return Ok(None),
    };
    let exists = candidates.iter().any(|backend| backend.id() == name)
        || BEHIND_FEATURES.iter().any(|(behind, _)| *behind == name);
    if exists {
        Ok(Some((name, by)))
    } else {
        Err(SelectError::UnknownBackend { name, by, key, existing: existing() })
    }
}

fn behind_feature(name: &BackendId) -> Refusal {
    let feature =
        BEHIND_FEATURES.iter().find(|(behind, _)| behind == name).map_or("", |(_, feature)| feature);
    Refusal::NotCompiled { feature }
}

fn may_fall_back(policy: OverridePolicy, refusal: &Refusal) -> bool {
    match policy {
        OverridePolicy::Error => false,
        OverridePolicy::Warn => !matches!(refusal, Refusal::Trial(_)),
        OverridePolicy::AllowFallback => true,
    }
}

/// Why a candidate below the chosen one is not it: its own reason if it has one that costs nothing to find.
fn reason_below(backend: &Arc<dyn Backend>, descriptor: &Descriptor, by: BackendId) -> Refusal {
    filter(backend, descriptor).err().unwrap_or(Refusal::Outranked { by })
}

/// Device and capability. Code of the backend runs here, so a panic is caught and is a refusal.
fn filter(backend: &Arc<dyn Backend>, descriptor: &Descriptor) -> Result<Device, Refusal> {
    let ask = std::panic::AssertUnwindSafe(|| {
        let device = backend.probe()?;
        let missing = backend.missing(descriptor);
        if missing.is_empty() { Ok(device) } else { Err(Refusal::Unsupported { missing }) }
    });
    std::panic::catch_unwind(ask)
        .unwrap_or_else(|payload| Err(TrialFailure::Panic(trial::panic_text(payload.as_ref())).into()))
}

/// Everything that can be known of one candidate.
fn examine(
    registry: &Registry,
    backend: &Arc<dyn Backend>,
    descriptor: &Descriptor,
    options: &SelectOptions,
) -> Result<Passed, Refusal> {
    let device = filter(backend, descriptor)?;
    let binary = match &options.trial {
        TrialMode::Skip => return Ok(Passed { device, evidence: None }),
        TrialMode::Thread => None,
        TrialMode::Process(path) => Some(path.clone()),
        TrialMode::Auto => match backend.isolation() {
            Isolation::Thread => None,
            Isolation::Process => {
                let found = trial::find_binary();
                if found.is_none() {
                    tracing::warn!(backend = %backend.id(), "kv8-validate was not found: the trial runs in a thread");
                }
                found
            }
        },
    };
    let isolation = if binary.is_some() { Isolation::Process } else { Isolation::Thread };
    let key = trial::verdict_key(descriptor)?;
    let verdict = Verdict { backend: backend.id(), device: device.clone(), key, isolation };
    let outcome = registry.verdict(&verdict).unwrap_or_else(|| {
        let outcome = match &binary {
            Some(binary) => trial::run_in_child(binary, &backend.id(), descriptor, options.time_limit),
            None => trial::run_in_thread(backend, descriptor, options.time_limit),
        };
        registry.keep_verdict(verdict, outcome.clone());
        outcome
    });
    Ok(Passed { device, evidence: Some(outcome?) })
}
