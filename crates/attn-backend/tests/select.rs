//! Selection: order, reasons, names, policies, the environment variable.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a failure is the point")]

mod common;

use attn_backend::{
    BACKEND_VARIABLE, BackendId, Descriptor, FormatKey, MemoryKind, Missing, NamedBy, Operation,
    OperationKey, OverridePolicy, Refusal, Registry, SelectError, SelectOptions, TrialFailure, normal_decode,
    select,
};
use attn_plan::SplitPolicy;
use common::{Fault, Faulty, descriptor, key, registry};
use std::process::Command;
use std::sync::atomic::Ordering;

fn options() -> SelectOptions {
    SelectOptions { read_environment: false, ..SelectOptions::default() }
}

fn named(name: &'static str, policy: OverridePolicy) -> SelectOptions {
    SelectOptions { policy, ..SelectOptions::named(BackendId::named(name)) }
}

#[test]
fn the_highest_rank_that_passes_is_chosen_and_each_other_has_its_reason() {
    let backends = [
        Faulty::new("slow", Fault::None, 1),
        Faulty::new("gone", Fault::Unavailable, 50),
        Faulty::new("wrong", Fault::LastTokenDropped, 40),
        Faulty::new("narrow", Fault::NoWindow, 30),
        Faulty::new("good", Fault::None, 20),
        Faulty::new("low-and-gone", Fault::Unavailable, 0),
    ];
    let selection = select(&registry(&backends), &descriptor(), &options()).unwrap();
    assert_eq!(selection.backend.as_str(), "good");
    assert!(selection.fallback.is_none());
    let names: Vec<&str> = selection.refused.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(names, ["gone", "wrong", "narrow", "slow", "low-and-gone"]);
    let reasons: Vec<&Refusal> = selection.refused.iter().map(|(_, refusal)| refusal).collect();
    assert_eq!(reasons[0], &Refusal::Unavailable { reason: "no driver".to_owned() });
    assert!(matches!(reasons[1], Refusal::Trial(TrialFailure::Wrong { .. })));
    assert_eq!(reasons[2], &Refusal::Unsupported { missing: vec![Missing::new("window", 100, "none")] });
    assert_eq!(reasons[3], &Refusal::Outranked { by: selection.backend.clone() });
    assert_eq!(reasons[4], &Refusal::Unavailable { reason: "no driver".to_owned() });
    // What is outranked was not tried for nothing.
    assert_eq!(backends[0].opened.load(Ordering::Relaxed), 0);
    println!("{selection}");
}

#[test]
fn a_verdict_is_kept_whatever_the_size_of_the_cache() {
    let backend = Faulty::new("good", Fault::None, 1);
    let registry = registry(std::slice::from_ref(&backend));
    let first = select(&registry, &descriptor(), &options()).unwrap();
    let tried = backend.opened.load(Ordering::Relaxed);
    assert!(!first.evidence.unwrap().is_cached && tried > 0);

    let smaller = attn_backend::Descriptor {
        layout: kv_quant::CacheLayout::native(*descriptor().layout.format(), 7, 16).unwrap(),
        ..descriptor()
    };
    let second = select(&registry, &smaller, &options()).unwrap();
    assert!(second.evidence.unwrap().is_cached);
    assert_eq!(backend.opened.load(Ordering::Relaxed), tried);

    for other in [
        descriptor().with_split(SplitPolicy::BatchInvariant { split_len: 64 }),
        Descriptor { spec: attn_plan::DecodeSpec { window: Some(101), ..descriptor().spec }, ..descriptor() },
        Descriptor { spec: attn_plan::DecodeSpec { want_lse: false, ..descriptor().spec }, ..descriptor() },
    ] {
        assert!(!select(&registry, &other, &options()).unwrap().evidence.unwrap().is_cached);
    }
    registry.forget_verdicts();
    assert!(!select(&registry, &descriptor(), &options()).unwrap().evidence.unwrap().is_cached);
}

#[test]
fn a_replaced_backend_is_tried_again() {
    let mut registry = registry(&[Faulty::new("x", Fault::None, 1)]);
    select(&registry, &descriptor(), &options()).unwrap();
    registry.register(key(), Faulty::new("x", Fault::Nan, 1));
    assert_eq!(registry.candidates(&key()).unwrap().len(), 1);
    assert!(select(&registry, &descriptor(), &options()).is_err());
}

#[test]
fn a_key_without_backends_lists_the_keys_that_exist() {
    let builtin = Registry::builtin();
    let absent = OperationKey { format: FormatKey::named("fp8"), operation: Operation::NormalDecode };
    let error = builtin.candidates(&absent).unwrap_err();
    let floats = OperationKey { format: FormatKey::UNQUANTIZED, operation: Operation::NormalDecode };
    assert_eq!(error, SelectError::NoBackend { key: absent, existing: vec![key(), floats] });
    assert_eq!(
        error.to_string(),
        "no backend for normal_decode over fp8; there are backends for: normal_decode over int8-group, \
         normal_decode over unquantized"
    );
    let error = select(&Registry::empty(), &descriptor(), &options()).unwrap_err();
    assert_eq!(error, SelectError::NoBackend { key: key(), existing: vec![] });
}

#[test]
fn an_unknown_name_is_an_error_under_every_policy() {
    let registry = registry(&[Faulty::new("b", Fault::None, 1), Faulty::new("a", Fault::None, 2)]);
    for policy in [OverridePolicy::Error, OverridePolicy::Warn, OverridePolicy::AllowFallback] {
        let error = select(&registry, &descriptor(), &named("typo", policy)).unwrap_err();
        let existing = vec![BackendId::named("a"), BackendId::named("b")];
        let name = BackendId::named("typo");
        assert_eq!(error, SelectError::UnknownBackend { name, by: NamedBy::Argument, key: key(), existing });
    }
}

#[test]
fn a_named_backend_is_taken_over_a_higher_rank() {
    let registry = registry(&[Faulty::new("low", Fault::None, 1), Faulty::new("high", Fault::None, 2)]);
    let selection = select(&registry, &descriptor(), &named("low", OverridePolicy::Error)).unwrap();
    assert_eq!(selection.backend.as_str(), "low");
    let refusal = Refusal::NotNamed { chosen: BackendId::named("low"), by: NamedBy::Argument };
    assert_eq!(selection.refused, [(BackendId::named("high"), refusal)]);
}

#[test]
fn policies_say_when_a_named_backend_may_be_left() {
    let registry = registry(&[
        Faulty::new("gone", Fault::Unavailable, 3),
        Faulty::new("wrong", Fault::Nan, 2),
        Faulty::new("good", Fault::None, 1),
    ]);
    for name in ["gone", "wrong"] {
        let error = select(&registry, &descriptor(), &named(name, OverridePolicy::Error)).unwrap_err();
        assert!(matches!(error, SelectError::NamedRefused { .. }), "{error}");
    }
    let fallen = select(&registry, &descriptor(), &named("gone", OverridePolicy::Warn)).unwrap();
    assert_eq!(fallen.backend.as_str(), "good");
    let fallback = fallen.fallback.unwrap();
    assert_eq!((fallback.named.as_str(), fallback.by), ("gone", NamedBy::Argument));
    assert!(fallen.refused.iter().any(|(id, _)| id.as_str() == "gone"));
    // Wrong numbers are a fault to be looked at, unless the caller says otherwise.
    assert!(select(&registry, &descriptor(), &named("wrong", OverridePolicy::Warn)).is_err());
    let fallen = select(&registry, &descriptor(), &named("wrong", OverridePolicy::AllowFallback)).unwrap();
    assert!(matches!(fallen.fallback.unwrap().refusal, Refusal::Trial(_)));
}

#[test]
fn everything_refused_lists_every_reason() {
    let registry =
        registry(&[Faulty::new("gone", Fault::Unavailable, 3), Faulty::new("narrow", Fault::NoWindow, 2)]);
    let error = select(&registry, &descriptor(), &options()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("gone: unavailable: no driver"), "{text}");
    assert!(text.contains("narrow: unsupported: window 100 (offered: none)"), "{text}");
}

#[test]
fn memory_that_no_backend_offers_is_a_missing_part() {
    let error = select(&Registry::builtin(), &descriptor().with_memory(MemoryKind::Device), &options());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("cache memory device (offered: owned, host, host read-only)"), "{text}");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_without_the_feature_is_known_but_not_there() {
    assert!(!Registry::builtin().backend_ids().contains(&BackendId::CUDA));
    let error =
        select(&Registry::builtin(), &descriptor(), &SelectOptions::named(BackendId::CUDA)).unwrap_err();
    assert!(matches!(
        &error,
        SelectError::NamedRefused { refusal: Refusal::NotCompiled { feature: "cuda" }, .. }
    ));
    let options = SelectOptions { policy: OverridePolicy::Warn, ..SelectOptions::named(BackendId::CUDA) };
    let selection = select(&Registry::builtin(), &descriptor(), &options).unwrap();
    assert_eq!(selection.backend, BackendId::CPU);
    assert_eq!(selection.fallback.unwrap().named, BackendId::CUDA);
}

/// Run by the test below in processes with the variable set.
#[test]
#[ignore = "a part of environment_variable"]
fn environment_child() {
    let layout = kv_quant::CacheLayout::native(*descriptor().layout.format(), 7, 16).unwrap();
    let descriptor = Descriptor { layout, ..descriptor() };
    let outcome = normal_decode::open(&Registry::builtin(), &descriptor, &SelectOptions::default());
    match outcome {
        Ok((session, selection)) => println!("chose {} refused {:?}", session.backend(), selection.refused),
        Err(error) => println!("error: {error}"),
    }
}

#[test]
fn environment_variable() {
    let child = |value: &std::ffi::OsStr| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "environment_child", "--ignored", "--nocapture"])
            .env(BACKEND_VARIABLE, value)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(child("cpu".as_ref()).contains("chose cpu"));
    assert!(child("".as_ref()).contains("chose "));
    let unknown = child("abacus".as_ref());
    assert!(unknown.contains("no backend is called `abacus` (named by KV8_BACKEND)"), "{unknown}");
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let nonsense = child(std::ffi::OsStr::from_bytes(&[0xff, 0xfe]));
        assert!(nonsense.contains("KV8_BACKEND is not UTF-8"), "{nonsense}");
    }
}
