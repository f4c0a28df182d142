//! What needs a real GPU and is no part of the suite of every backend.

use attn_backend::{Backend as _, CudaBackend};
use attn_tests::count::Ledger;
use attn_tests::gpu::{CHECKS, Check, DEVICE, seeded_bug};
use libtest_mimic::{Failed, Trial};
use std::sync::{Arc, PoisonError};

pub fn trials(ledger: &Arc<Ledger>) -> Vec<Trial> {
    // Without a GPU the conformance suite has said so, and failed where one is required.
    if CudaBackend::default().probe().is_err() {
        return Vec::new();
    }
    let stamp = |check: &'static Check| {
        let ledger = Arc::clone(ledger);
        Trial::test(format!("gpu::{}", check.name), move || {
            // A check that has panicked has told so itself.
            let _shared = (!check.is_alone).then(|| DEVICE.read().unwrap_or_else(PoisonError::into_inner));
            let _alone = check.is_alone.then(|| DEVICE.write().unwrap_or_else(PoisonError::into_inner));
            (check.run)(&ledger).map_err(Failed::from)
        })
    };
    let mut trials: Vec<Trial> = CHECKS.iter().map(stamp).collect();
    // The whole suite once more, alone in its process: by name only.
    let bug = || seeded_bug::is_found().map_err(Failed::from);
    trials.push(Trial::test("gpu::seeded_bug", bug).with_ignored_flag(true));
    trials
}
