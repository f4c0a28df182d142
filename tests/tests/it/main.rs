//! The integration tests of the workspace, in one binary that can be carried to a machine with no Rust.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    reason = "a test program: it reports on stdout, and what cannot go on must fail loudly"
)]

mod conformance;
#[cfg(feature = "cuda")]
mod gpu;
mod malformed;
mod mutants;

use attn_tests::count::Ledger;
use libtest_mimic::{Arguments, Trial};
use std::sync::Arc;

fn main() {
    let arguments = Arguments::from_args();
    let ledger = Arc::new(Ledger::default());
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(conformance::trials(&ledger));
    #[cfg(feature = "cuda")]
    trials.extend(gpu::trials(&ledger));
    trials.extend(malformed::trials(&ledger));
    trials.extend(mutants::trials(&ledger));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // This harness captures nothing, so the counts show in a plain `cargo test`.
    print!("{}", ledger.report());
    conclusion.exit();
}
