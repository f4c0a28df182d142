//! One suite for every backend. Nothing here knows which backend it judges.

mod append;
mod company;
mod directed;
mod exact;
mod fuzz;
pub mod judge;
mod pages;
mod public_cases;
mod real_data;
mod runner;

use crate::subject::Subject;

pub use judge::{Verdict, judge};

/// How much is run.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Random cases.
    pub num_cases: u32,
    /// Rounds of appended bytes, some six million elements each.
    pub append_rounds: usize,
    /// Whether there is a case of 1,048,576 tokens.
    pub has_longest: bool,
}

/// One part of the suite.
pub struct Suite {
    /// Its name.
    pub name: &'static str,
    /// Runs it; the error says what is wrong, and in which case.
    pub run: fn(&Subject, &Effort) -> Result<(), String>,
}

/// The whole suite, cheap parts first.
pub const SUITES: &[Suite] = &[
    Suite { name: "empty", run: |subject, _| directed::empty(subject) },
    Suite { name: "needles", run: |subject, _| directed::needles(subject) },
    Suite { name: "exact", run: |subject, _| exact::exact(subject) },
    Suite { name: "append_refused", run: |subject, _| append::non_finite(subject) },
    Suite { name: "append_bytes", run: |subject, effort| append::bytes(subject, effort.append_rounds) },
    Suite { name: "pages", run: |subject, _| pages::pages(subject) },
    Suite { name: "partial_results", run: |subject, _| pages::partial_results(subject) },
    Suite { name: "windows", run: |subject, _| directed::windows(subject) },
    Suite { name: "masks", run: |subject, _| directed::masks(subject) },
    Suite { name: "heads", run: |subject, _| directed::heads(subject) },
    Suite { name: "types", run: |subject, _| directed::types(subject) },
    Suite { name: "layouts", run: |subject, _| directed::layouts(subject) },
    Suite { name: "lengths", run: |subject, _| directed::lengths(subject) },
    Suite { name: "formats", run: |subject, _| directed::formats(subject) },
    Suite { name: "batches", run: |subject, _| directed::batches(subject) },
    Suite { name: "runs", run: |subject, _| directed::runs(subject) },
    Suite { name: "invariance", run: |subject, _| company::invariance(subject) },
    Suite { name: "determinism", run: |subject, _| company::determinism(subject) },
    Suite { name: "real_data", run: |subject, _| real_data::real_data(subject) },
    Suite { name: "long", run: |subject, effort| directed::long(subject, effort.has_longest) },
    Suite {
        name: "public_cases",
        run: |subject, effort| public_cases::public_cases(subject, (effort.num_cases / 2).min(2000)),
    },
    Suite { name: "fuzz", run: |subject, effort| fuzz::fuzz(subject, effort.num_cases) },
];
