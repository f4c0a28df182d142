//! The conformance suite, stamped on every backend of the registry.

use attn_backend::{FormatKey, Operation, OperationKey, Registry};
use attn_tests::conformance::{Effort, SUITES};
use attn_tests::count::{Ledger, num_cases};
use attn_tests::subject::Subject;
use libtest_mimic::{Failed, Trial};
use std::sync::Arc;

pub fn trials(ledger: &Arc<Ledger>) -> Vec<Trial> {
    let registry = Registry::builtin();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    let candidates = registry.candidates(&key).expect("a backend in every build");
    let mut trials = Vec::new();
    for backend in candidates {
        for suite in SUITES {
            let subject = Subject::new(Arc::clone(backend), ledger);
            let name = format!("conformance::{}::{}", subject.name, suite.name);
            trials.push(Trial::test(name, move || {
                let effort = Effort { num_cases: num_cases(2000) };
                (suite.run)(&subject, &effort).map_err(Failed::from)
            }));
        }
    }
    trials
}
