//! Checks that need a real GPU: every kernel of the image once, pools beyond 4 GiB, graphs over growing lengths, leaks,
//! memory that runs out, images with a seeded bug.

mod bad_indices;
mod every_kernel;
mod far_pool;
mod growing_graph;
mod leaks;
pub mod seeded_bug;

use crate::count::Ledger;
use std::sync::RwLock;

/// Held for reading by whatever uses the device, for writing by what needs it alone: the checks that fill its memory, or
/// count what is free.
pub static DEVICE: RwLock<()> = RwLock::new(());

/// One check.
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// Whether it wants the device alone.
    pub is_alone: bool,
    /// Runs it; the error says what is wrong.
    pub run: fn(&Ledger) -> Result<(), String>,
}

/// All checks but [`seeded_bug`], which has a process of its own.
pub const CHECKS: &[Check] = &[
    Check { name: "bad_indices", is_alone: false, run: bad_indices::bad_indices },
    Check { name: "every_kernel", is_alone: false, run: every_kernel::every_kernel },
    Check { name: "far_pool", is_alone: true, run: far_pool::far_pool },
    Check { name: "growing_graph", is_alone: false, run: growing_graph::growing_graph },
    Check { name: "leaks", is_alone: true, run: leaks::leaks },
    Check { name: "out_of_memory", is_alone: true, run: leaks::out_of_memory },
];

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Straight out: whoever runs many processes reads these lines.
fn say(line: &str) {
    use std::io::Write as _;
    // Nothing can be done about a closed stream.
    let _ = writeln!(std::io::stderr(), "{line}");
}
