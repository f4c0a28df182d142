//! The power of the suite: every deliberately broken backend is found, and the unbroken twin passes.

use attn_tests::conformance::{Effort, SUITES};
use attn_tests::count::Ledger;
use attn_tests::mutant::{Fault, MutantBackend};
use attn_tests::subject::Subject;
use libtest_mimic::{Failed, Trial};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A mutant is worth fewer random cases than a backend.
const EFFORT: Effort = Effort { num_cases: 64, append_rounds: 1, has_longest: false };

pub fn trials(ledger: &Arc<Ledger>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for &fault in Fault::ALL {
        let ledger = Arc::clone(ledger);
        trials.push(Trial::test(format!("mutants::{fault:?}"), move || is_found(fault, &ledger)));
    }
    trials.push(Trial::test("mutants::None", the_twin_passes));
    trials
}

/// The first suite that objects; a panic is an objection too.
fn objection(fault: Fault) -> Option<(&'static str, String)> {
    // Its counts are not the backends': they go nowhere.
    let subject = Subject::new(Arc::new(MutantBackend(fault)), &Arc::default());
    SUITES.iter().find_map(|suite| {
        let outcome = catch_unwind(AssertUnwindSafe(|| (suite.run)(&subject, &EFFORT)));
        let error = outcome.unwrap_or_else(|_| Err("panicked".to_owned())).err()?;
        Some((suite.name, error))
    })
}

fn is_found(fault: Fault, ledger: &Ledger) -> Result<(), Failed> {
    let Some((suite, _)) = objection(fault) else {
        return Err(format!("{fault:?} passes the whole suite").into());
    };
    ledger.tally(&format!("broken backends found by {suite}"), 1);
    Ok(())
}

fn the_twin_passes() -> Result<(), Failed> {
    match objection(Fault::None) {
        None => Ok(()),
        Some((suite, error)) => Err(format!("no fault, and {suite} objects: {error}").into()),
    }
}
