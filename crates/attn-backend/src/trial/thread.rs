//! A trial in a thread of this process.

use super::{Evidence, TrialFailure};
use crate::{Backend, Descriptor};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Runs the trial under a time limit. A thread that hangs is left behind: it cannot be stopped.
pub(crate) fn run_in_thread(
    backend: &Arc<dyn Backend>,
    descriptor: &Descriptor,
    time_limit: Duration,
) -> Result<Evidence, TrialFailure> {
    let (sender, receiver) = sync_channel(1);
    let (backend, descriptor) = (Arc::clone(backend), descriptor.clone());
    let thread = std::thread::Builder::new().name("kv8-trial".to_owned()).spawn(move || {
        // The receiver is gone if the limit has passed.
        let _ = sender.send(super::run(backend.as_ref(), &descriptor));
    });
    let thread = thread.map_err(|error| TrialFailure::Error(format!("no thread: {error}")))?;
    match receiver.recv_timeout(time_limit) {
        Ok(verdict) => verdict,
        Err(RecvTimeoutError::Timeout) => Err(TrialFailure::TimeLimit(time_limit)),
        // The sender was dropped without a verdict.
        Err(RecvTimeoutError::Disconnected) => Err(match thread.join() {
            Err(payload) => TrialFailure::Panic(panic_text(payload.as_ref())),
            Ok(()) => TrialFailure::Error("the trial ended without a verdict".to_owned()),
        }),
    }
}

/// What a panic said.
pub(crate) fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no text".to_owned())
}
