//! Selections that cannot be.

use super::bench::{Bench, Seen};
use super::rows;
use crate::mutant::{Fault, MutantBackend};
use attn_backend::{
    BackendId, Descriptor, Error, FormatKey, Operation, OperationKey, OverridePolicy, Refusal, Registry,
    SelectError, SelectOptions, TrialMode,
};
use attn_plan::{DecodeSpec, SplitPolicy};
use std::sync::Arc;

fn options() -> SelectOptions {
    SelectOptions { read_environment: false, trial: TrialMode::Thread, ..Default::default() }
}

/// Selects among the builtin backends by name.
fn named(bench: &Bench, name: &'static str, policy: OverridePolicy) -> Seen {
    let options = SelectOptions { backend: Some(BackendId::named(name)), policy, ..options() };
    attn_backend::select(&Registry::builtin(), &bench.descriptor(), &options).into()
}

fn descriptor(bench: &Bench, change: impl FnOnce(&mut DecodeSpec)) -> Seen {
    let mut descriptor = bench.descriptor();
    change(&mut descriptor.spec);
    bench.select(&descriptor).into()
}

/// Selects a mutant, which its trial must refuse.
fn mutant(bench: &Bench, fault: Fault) -> Seen {
    let mut registry = Registry::empty();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    registry.register(key, Arc::new(MutantBackend(fault)));
    attn_backend::select(&registry, &bench.descriptor(), &options()).into()
}

/// Whether the only candidate failed its trial.
fn failed_trial(refused: &[(BackendId, Refusal)]) -> bool {
    matches!(refused, [(_, Refusal::Trial(_))])
}

rows! {
    "select from an empty registry" => Seen::Select(SelectError::NoBackend { .. }),
        |b| attn_backend::select(&Registry::empty(), &b.descriptor(), &options()).into();
    "select under a key that nothing is registered for" => Seen::Select(SelectError::NoBackend { .. }), |b| {
        let mut registry = Registry::empty();
        let key = OperationKey { format: FormatKey::named("int4"), operation: Operation::NormalDecode };
        registry.register(key, Arc::new(b.backend.clone()));
        attn_backend::select(&registry, &b.descriptor(), &options()).into()
    };
    "select an unknown backend" => Seen::Select(SelectError::UnknownBackend { .. }),
        |b| named(b, "tpu", OverridePolicy::Error);
    "select an unknown backend with a fallback allowed" => Seen::Select(SelectError::UnknownBackend { .. }),
        |b| named(b, "CPU ", OverridePolicy::AllowFallback);
    "select a backend with an empty name" => Seen::Select(SelectError::UnknownBackend { .. }),
        |b| named(b, "", OverridePolicy::Warn);
    "select for a head_dim that is not the cache's"
        => Seen::Select(SelectError::Descriptor(Error::Plan(attn_plan::Error::CacheMismatch { .. }))),
        |b| descriptor(b, |spec| spec.head_dim = 48);
    "select with a NaN scale" => Seen::Select(SelectError::Descriptor(Error::Plan(attn_plan::Error::SoftmaxScale(_)))),
        |b| descriptor(b, |spec| spec.softmax_scale = f32::NAN);
    "select with slopes of too few heads"
        => Seen::Select(SelectError::Descriptor(Error::Plan(attn_plan::Error::PerHead { .. }))),
        |b| descriptor(b, |spec| spec.alibi_slopes = Some(vec![1.0]));
    "select with a broken second step"
        => Seen::Select(SelectError::Descriptor(Error::Plan(attn_plan::Error::QLen { .. }))), |b| {
        let chunk = DecodeSpec { q_len: 0, ..b.spec.clone() };
        b.select(&b.descriptor().also(chunk)).into()
    };
    "select a window where none is offered" => Seen::Select(SelectError::AllRefused { .. }), |b| {
        b.backend.is_narrow = true;
        descriptor(b, |spec| spec.window = Some(3))
    };
    "select batch invariance where none is offered" => Seen::Select(SelectError::AllRefused { .. }), |b| {
        b.backend.is_narrow = true;
        let descriptor: Descriptor = b.descriptor().with_split(SplitPolicy::BatchInvariant { split_len: 8 });
        b.select(&descriptor).into()
    };
    "select a backend that drops the last token"
        => Seen::Select(SelectError::AllRefused { refused, .. }) if failed_trial(refused),
        |b| mutant(b, Fault::LastTokenDropped);
    "select a backend whose append truncates"
        => Seen::Select(SelectError::AllRefused { refused, .. }) if failed_trial(refused),
        |b| mutant(b, Fault::AppendTruncates);
    "select a backend whose lse is in base 2"
        => Seen::Select(SelectError::AllRefused { refused, .. }) if failed_trial(refused),
        |b| mutant(b, Fault::LseInBase2);
    "select a backend that reads past the end"
        => Seen::Select(SelectError::AllRefused { refused, .. }) if failed_trial(refused),
        |b| mutant(b, Fault::OnePastTheEndWithWeightZero);
    "select a backend with scales of the next group"
        => Seen::Select(SelectError::AllRefused { refused, .. }) if failed_trial(refused),
        |b| mutant(b, Fault::KScaleOfNextGroup);
}
