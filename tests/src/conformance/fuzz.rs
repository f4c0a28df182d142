//! Random cases through proptest, judged one by one.

use super::{Verdict, judge};
use crate::case::{Profile, cases};
use crate::count;
use crate::subject::Subject;
use proptest::test_runner::{Config, TestError, TestRunner};

/// The oracle's multiplications of one ordinary random case.
const BUDGET: u64 = 1_000_000;

/// Judges `num_cases` random cases.
///
/// # Errors
/// The smallest failing case that was found.
pub fn fuzz(subject: &Subject, num_cases: u32) -> Result<(), String> {
    let profile = Profile::new(&subject.capability(), subject.tile_len(), BUDGET);
    let config = Config {
        cases: num_cases,
        // Each step of shrinking runs the backend again.
        max_shrink_iters: 200,
        failure_persistence: count::persistence("conformance"),
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&cases(&profile), |case| match judge(subject, "fuzz", &case) {
        Ok(Verdict::Right(_) | Verdict::Skipped(_)) => Ok(()),
        Err(error) => Err(proptest::test_runner::TestCaseError::fail(error)),
    });
    outcome.map_err(|error| match error {
        TestError::Fail(reason, case) => format!("{reason}\n  shrunk to {case:?}"),
        TestError::Abort(reason) => format!("aborted: {reason}"),
    })
}
