//! A trial in a child process: the `kv8-validate` binary, told what to try on its standard input.

use super::wire::WireTask;
use super::{Evidence, TrialFailure};
use crate::{BackendId, Descriptor, Isolation, Registry};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Names the binary if it is not beside the running program.
const BINARY_VARIABLE: &str = "KV8_VALIDATE";
const BINARY: &str = if cfg!(windows) { "kv8-validate.exe" } else { "kv8-validate" };
/// How often the parent looks whether the child has ended.
const POLL: Duration = Duration::from_millis(2);

/// The binary: where `KV8_VALIDATE` says, or beside the running program, or one folder up (test programs).
pub(crate) fn find_binary() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY_VARIABLE).filter(|path| !path.is_empty()) {
        return Some(PathBuf::from(path));
    }
    let program = std::env::current_exe().ok()?;
    let folders = program.ancestors().skip(1).take(2);
    folders.map(|folder| folder.join(BINARY)).find(|path| path.is_file())
}

/// Runs the trial in a child process and kills it at the time limit.
///
/// The child tries the backend of that name in its own built-in registry, so this serves the backends of this project.
pub(crate) fn run_in_child(
    binary: &Path,
    backend: &BackendId,
    descriptor: &Descriptor,
    time_limit: Duration,
) -> Result<Evidence, TrialFailure> {
    let broken = |what: &str, error: &dyn std::fmt::Display| TrialFailure::Child(format!("{what}: {error}"));
    let start = Instant::now();
    let task =
        serde_json::to_vec(&WireTask::new(backend, descriptor)).map_err(|error| broken("task", &error))?;
    let mut child = Command::new(binary)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| broken(&binary.display().to_string(), &error))?;
    // Both pipes are served by threads, so that neither side can block the other past the limit.
    let stdin = child.stdin.take();
    let writer = std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&task)));
    let stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        // What cannot be read cannot be parsed either, and is reported then.
        let _ = stdout.map(|mut stdout| stdout.read_to_string(&mut text));
        text
    });
    let ended = wait(&mut child, start + time_limit);
    let text = reader.join().unwrap_or_default();
    let _ = writer.join();
    let status = match ended {
        Ok(Some(status)) => status,
        Ok(None) => return Err(TrialFailure::TimeLimit(time_limit)),
        Err(error) => return Err(broken("wait", &error)),
    };
    match serde_json::from_str::<Result<Evidence, TrialFailure>>(&text) {
        Ok(verdict) => verdict.map(|evidence| Evidence {
            isolation: Isolation::Process,
            elapsed: start.elapsed(),
            ..evidence
        }),
        Err(_) => Err(TrialFailure::Child(format!("it ended without a verdict, {status}"))),
    }
}

/// The exit status, or `None` if the deadline passed and the child was killed.
fn wait(child: &mut Child, deadline: Instant) -> std::io::Result<Option<std::process::ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

/// The child's side: from the task's JSON to the verdict's. The binary's whole work.
///
/// # Errors
/// Text that is no task.
pub fn answer(task: &str) -> Result<String, String> {
    let task: WireTask = serde_json::from_str(task).map_err(|error| error.to_string())?;
    let verdict = try_by_name(&task);
    serde_json::to_string(&verdict).map_err(|error| error.to_string())
}

fn try_by_name(task: &WireTask) -> Result<Evidence, TrialFailure> {
    let descriptor = task.descriptor.parse().map_err(TrialFailure::Child)?;
    let registry = Registry::builtin();
    let candidates =
        registry.candidates(&descriptor.key()).map_err(|error| TrialFailure::Child(error.to_string()))?;
    let backend =
        candidates.iter().find(|backend| backend.id().as_str() == task.backend).ok_or_else(|| {
            let existing: Vec<String> = candidates.iter().map(|backend| backend.id().to_string()).collect();
            TrialFailure::Child(format!(
                "it has no backend `{}`; it has: {}",
                task.backend,
                existing.join(", ")
            ))
        })?;
    backend.probe().map_err(|refusal| TrialFailure::Child(refusal.to_string()))?;
    // A panic ends the child with no verdict, which its parent reports; in the same words as in a thread it is clearer.
    let run = std::panic::AssertUnwindSafe(|| super::run(backend.as_ref(), &descriptor));
    std::panic::catch_unwind(run)
        .unwrap_or_else(|payload| Err(TrialFailure::Panic(super::thread::panic_text(payload.as_ref()))))
}
