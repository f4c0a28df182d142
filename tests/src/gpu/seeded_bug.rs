//! The suite against an image with a seeded bug (`crates/attn-kernels/cuda/mutants.md`), in a process of its own: it must
//! object. Against an image without one it must not.

use super::bad_indices::bad_indices;
use super::text;
use crate::conformance::{Effort, SUITES};
use crate::count::Ledger;
use crate::guarded::Guarded;
use crate::subject::Subject;
use attn_backend::{Backend, CudaBackend};
use attn_kernels::image;
use attn_kernels::key::Arithmetic;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Fewer random cases than a backend gets: what they find, directed cases should have found.
const EFFORT: Effort = Effort { num_cases: 200, append_rounds: 1, has_longest: false };
/// Suites that are slow, or about what no kernel does.
const LEFT_OUT: [&str; 4] = ["long", "real_data", "public_cases", "determinism"];

/// How the driver's error of a kernel that was not built into an image begins: no bug's doing.
const NO_KERNEL: &str = "the kernel image has no";

/// Which seeded bug the image was built with; 0 is none.
fn bug() -> Result<u32, String> {
    let manifest = image::embedded().map_err(text)?.manifest;
    let defined = manifest.split("KV8_MUTANT=").nth(1);
    let digits = defined.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    Ok(digits.and_then(|digits| digits.parse().ok()).unwrap_or(0))
}

/// The first suite that objects, and what it says.
///
/// # Errors
/// An image that cannot be judged: it lacks a kernel.
fn objection() -> Result<Option<String>, String> {
    for arithmetic in [Arithmetic::Mma, Arithmetic::F32] {
        let backends: [Arc<dyn Backend>; 2] = [
            Arc::new(Guarded { arithmetic, heads_per_block: None }),
            Arc::new(CudaBackend { arithmetic, ..CudaBackend::default() }),
        ];
        for backend in backends {
            // Its counts are not the backends': they go nowhere.
            let subject = Subject::new(backend, &Arc::default());
            subject.keep_open();
            for suite in SUITES.iter().filter(|suite| !LEFT_OUT.contains(&suite.name)) {
                let outcome = catch_unwind(AssertUnwindSafe(|| (suite.run)(&subject, &EFFORT)));
                if let Err(error) = outcome.unwrap_or_else(|_| Err("panicked".to_owned())) {
                    let first = error.lines().next().unwrap_or_default();
                    let objection = format!("{}::{}: {first}", subject.name, suite.name);
                    return if first.contains(NO_KERNEL) { Err(objection) } else { Ok(Some(objection)) };
                }
            }
            // No backend's session lets such indices through, so the suite of all backends has none.
            if let Err(error) = bad_indices(&Ledger::default()) {
                let first = error.lines().next().unwrap_or_default();
                return Ok(Some(format!("gpu::bad_indices: {first}")));
            }
        }
    }
    Ok(None)
}

/// Prints one line: the bug, and who found it.
///
/// # Errors
/// A bug that nobody found; an objection to an image without one; an image that lacks a kernel.
pub fn is_found() -> Result<(), String> {
    let (line, is_right) = match (bug()?, objection()?) {
        (0, None) => ("no bug: passes".to_owned(), true),
        (0, Some(who)) => (format!("no bug: FAILS {who}"), false),
        (bug, Some(who)) => (format!("bug {bug}: killed by {who}"), true),
        (bug, None) => (format!("bug {bug}: SURVIVES"), false),
    };
    super::say(&line);
    if is_right { Ok(()) } else { Err(line) }
}
