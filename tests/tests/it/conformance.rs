//! The conformance suite, stamped on every backend of the registry.

use attn_backend::{Backend, BackendId, FormatKey, Operation, OperationKey, Registry};
use attn_tests::conformance::{Effort, SUITES, Suite};
use attn_tests::count::{Ledger, num_cases};
use attn_tests::forced_isa::ForcedIsa;
use attn_tests::subject::Subject;
use cpu_reference::{DotProduct, Isa};
use libtest_mimic::{Failed, Trial};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Set to 1 where a missing GPU is a failure.
const REQUIRE_GPU: &str = "KV8_REQUIRE_GPU";

pub fn trials(ledger: &Arc<Ledger>) -> Vec<Trial> {
    let registry = Registry::builtin();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    let candidates = registry.candidates(&key).expect("a backend in every build");
    let all = num_cases(2000);
    let mut trials: Vec<Trial> =
        candidates.iter().flat_map(|backend| of_backend(backend, all, ledger)).collect();
    // The preferred instruction set is what the CPU backend itself runs.
    for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::best()) {
        let forced: Arc<dyn Backend> = Arc::new(ForcedIsa { isa, dot: DotProduct::F32 });
        trials.extend(of_backend(&forced, all / 4, ledger));
    }
    // Integer dot products where there are instructions for them, and where there are none.
    for isa in BTreeSet::from([Isa::Portable, Isa::best()]) {
        let forced: Arc<dyn Backend> = Arc::new(ForcedIsa { isa, dot: DotProduct::Int8 });
        trials.extend(of_backend(&forced, all / 8, ledger));
    }
    if !candidates.iter().any(|backend| backend.id() == BackendId::CUDA) {
        let reason = "not in this build: feature `cuda` is off".to_owned();
        trials.push(absent(BackendId::CUDA, reason, ledger));
    }
    trials
}

fn of_backend(backend: &Arc<dyn Backend>, num_cases: u32, ledger: &Arc<Ledger>) -> Vec<Trial> {
    let subject = Subject::new(Arc::clone(backend), ledger);
    if let Err(refusal) = subject.probe() {
        return vec![absent(backend.id(), refusal.to_string(), ledger)];
    }
    let stamp = |suite: &'static Suite| {
        let subject = subject.clone();
        Trial::test(format!("conformance::{}::{}", subject.name, suite.name), move || {
            (suite.run)(&subject, &Effort { num_cases }).map_err(Failed::from)
        })
    };
    SUITES.iter().map(stamp).collect()
}

/// A backend that cannot run here: said aloud, and a failure where a GPU is required.
fn absent(backend: BackendId, reason: String, ledger: &Arc<Ledger>) -> Trial {
    let ledger = Arc::clone(ledger);
    Trial::test(format!("conformance::{backend}::is_available"), move || {
        ledger.skipped(backend.as_str(), &format!("the whole suite: {reason}"));
        let is_required = std::env::var(REQUIRE_GPU).is_ok_and(|value| value == "1");
        if is_required { Err(format!("{REQUIRE_GPU}=1, and {backend} is {reason}").into()) } else { Ok(()) }
    })
}
