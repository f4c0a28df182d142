//! The trial in a child process.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a failure is the point")]

mod common;

use attn_backend::{
    BackendId, Isolation, Refusal, Registry, SelectError, SelectOptions, TrialFailure, TrialMode, select,
};
use common::{Fault, Faulty, descriptor, registry};
use std::path::PathBuf;
use std::time::{Duration, Instant};

fn options(binary: PathBuf, time_limit: Duration) -> SelectOptions {
    SelectOptions {
        read_environment: false,
        trial: TrialMode::Process(binary),
        time_limit,
        ..SelectOptions::default()
    }
}

fn binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_kv8-validate"))
}

fn failure(registry: &Registry, options: &SelectOptions) -> TrialFailure {
    match select(registry, &descriptor(), options) {
        Err(SelectError::AllRefused { refused, .. }) => match &refused[..] {
            [(_, Refusal::Trial(failure))] => failure.clone(),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_right_backend_passes_in_a_child() {
    let mut builtin = Registry::empty();
    builtin.register(common::key(), std::sync::Arc::new(attn_backend::CpuBackend));
    let selection = select(&builtin, &descriptor(), &options(binary(), Duration::from_secs(60))).unwrap();
    assert_eq!(selection.backend, BackendId::CPU);
    let evidence = selection.evidence.unwrap();
    assert_eq!(evidence.isolation, Isolation::Process);
    assert!(evidence.num_compared > 1000);
}

#[test]
fn a_child_that_knows_no_such_backend_says_what_it_has() {
    let registry = registry(&[Faulty::new("mine", Fault::None, 1)]);
    let failure = failure(&registry, &options(binary(), Duration::from_secs(60)));
    assert!(matches!(&failure, TrialFailure::Child(text) if text.contains("`mine`") && text.contains("cpu")));
}

#[cfg(unix)]
#[test]
fn a_child_that_hangs_dies_or_talks_nonsense_is_a_refusal() {
    use std::os::unix::fs::PermissionsExt;
    let folder = std::env::temp_dir().join(format!("kv8-child-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let script = |name: &str, body: &str| {
        let path = folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    let registry = registry(&[Faulty::new("x", Fault::None, 1)]);
    let limit = Duration::from_millis(200);

    let start = Instant::now();
    let hung = failure(&registry, &options(script("hang", "exec sleep 20"), limit));
    assert_eq!(hung, TrialFailure::TimeLimit(limit));
    assert!(start.elapsed() < Duration::from_secs(5));

    registry.forget_verdicts();
    let long = Duration::from_secs(20);
    let died = failure(&registry, &options(script("die", "kill -SEGV $$"), long));
    assert!(matches!(&died, TrialFailure::Child(text) if text.contains("signal: 11")), "{died}");

    registry.forget_verdicts();
    let nonsense = failure(&registry, &options(script("talk", "cat > /dev/null; echo fine"), long));
    assert!(
        matches!(&nonsense, TrialFailure::Child(text) if text.contains("without a verdict")),
        "{nonsense}"
    );

    registry.forget_verdicts();
    let absent = failure(&registry, &options(folder.join("absent"), long));
    assert!(matches!(&absent, TrialFailure::Child(text) if text.contains("absent")), "{absent}");
    std::fs::remove_dir_all(&folder).unwrap();
}
