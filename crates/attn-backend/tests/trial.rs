//! The trial: a right backend passes for every kind of descriptor, and each fault is found.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a failure is the point")]

mod common;

use attn_backend::{Refusal, SelectError, SelectOptions, TrialFailure, TrialMode, select};
use common::{Fault, Faulty, OUT, descriptor, registry};
use std::time::{Duration, Instant};

fn failure(fault: Fault, options: &SelectOptions) -> TrialFailure {
    let registry = registry(&[Faulty::new("faulty", fault, 1)]);
    match select(&registry, &descriptor(), options) {
        Err(SelectError::AllRefused { refused, .. }) => match &refused[..] {
            [(_, Refusal::Trial(failure))] => failure.clone(),
            other => panic!("{fault:?}: {other:?}"),
        },
        other => panic!("{fault:?} was not found: {other:?}"),
    }
}

fn options() -> SelectOptions {
    SelectOptions { read_environment: false, ..SelectOptions::default() }
}

#[test]
fn the_wrapper_itself_is_right() {
    let selection =
        select(&registry(&[Faulty::new("right", Fault::None, 1)]), &descriptor(), &options()).unwrap();
    let evidence = selection.evidence.unwrap();
    assert!(evidence.num_compared > 1000, "{evidence:?}");
    assert!(evidence.worst_share > 1e-4 && evidence.worst_share <= 1.0, "{evidence:?}");
}

#[test]
fn each_fault_in_the_numbers_is_found() {
    for fault in [
        Fault::Nan,
        Fault::Unwritten,
        Fault::OneElementOff,
        Fault::LastTokenDropped,
        Fault::FirstTokenDropped,
        Fault::NeighboursPage,
        Fault::HeadsSwapped,
        Fault::WindowIgnored,
        Fault::SinkIgnored,
        Fault::LseOff,
    ] {
        let failure = failure(fault, &options());
        println!("{fault:?}: {failure}");
        assert!(matches!(failure, TrialFailure::Wrong { .. }), "{fault:?}: {failure}");
        if fault == Fault::Nan {
            assert!(
                matches!(failure, TrialFailure::Wrong { array, got, .. } if array == OUT && got.is_nan())
            );
        }
    }
}

#[test]
fn each_fault_in_the_cache_is_found() {
    for (fault, where_) in [
        (Fault::AppendTruncates, "append"),
        (Fault::AppendStrays, "append"),
        (Fault::AppendWritesSkipped, "append"),
        (Fault::CopyForgetsScales, "copy_pages"),
    ] {
        let failure = failure(fault, &options());
        println!("{fault:?}: {failure}");
        assert!(
            matches!(&failure, TrialFailure::Bytes { after, .. } if after == where_),
            "{fault:?}: {failure}"
        );
    }
}

#[test]
fn panic_error_and_hang_are_refusals() {
    assert!(
        matches!(failure(Fault::Panics, &options()), TrialFailure::Panic(text) if text.contains("on purpose"))
    );
    assert!(
        matches!(failure(Fault::ProbePanics, &options()), TrialFailure::Panic(text) if text.contains("on purpose"))
    );
    assert!(
        matches!(failure(Fault::Errs, &options()), TrialFailure::Error(text) if text.contains("on purpose"))
    );
    let start = Instant::now();
    let limit = Duration::from_millis(300);
    let hung = failure(Fault::Hangs, &SelectOptions { time_limit: limit, ..options() });
    assert_eq!(hung, TrialFailure::TimeLimit(limit));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_trial_that_is_skipped_finds_nothing_and_says_so() {
    let registry = registry(&[Faulty::new("faulty", Fault::Nan, 1)]);
    let selection =
        select(&registry, &descriptor(), &SelectOptions { trial: TrialMode::Skip, ..options() }).unwrap();
    assert_eq!(selection.evidence, None);
}
