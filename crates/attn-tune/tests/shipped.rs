//! The profiles that ship: whole, for the device that they are named after, and harmless under every policy.
#![allow(clippy::expect_used, clippy::panic, reason = "a test")]

mod common;

use attn_plan::{DecodeSpec, NO_PARTIAL, SplitConfig, SplitPlan, SplitPolicy};
use attn_tune::{Level, Machine, PolicyClass, Profile, RunKey, Shape, StaticKey, Tuner, file_name, shipped};
use proptest::prelude::*;

fn profiles() -> Vec<Profile> {
    let parse = |(name, text): &(&str, &str)| {
        let (profile, left_out) = Profile::parse(text).unwrap_or_else(|cause| panic!("{name}: {cause}"));
        assert!(left_out.is_empty(), "{name}: {left_out:?}");
        assert_eq!(file_name(&profile.device), *name);
        profile
    };
    shipped().iter().map(parse).collect()
}

/// Where one request of a batch is cut, and whether its parts are merged.
fn cuts(lens: &[u32], split: &SplitConfig, request_idx: u32) -> Vec<(u32, u32, bool)> {
    let plan = SplitPlan::new(&DecodeSpec::new(8, 8, 128), lens, split).expect("a plan");
    let items = plan.items().iter().filter(|item| item.request_idx == request_idx);
    items.map(|item| (item.token_start, item.token_end, item.partial_idx == NO_PARTIAL)).collect()
}

fn tuner(profile: &Profile) -> Tuner {
    let machine = Machine {
        device: profile.device.clone(),
        arch: profile.arch.clone(),
        build: profile.build.clone(),
        ..common::machine()
    };
    Tuner::new(machine, Level::Profiles, None)
}

#[test]
fn every_shipped_profile_is_whole_and_loads() {
    let profiles = profiles();
    assert!(!profiles.is_empty());
    for profile in &profiles {
        let tuner = tuner(profile);
        assert!(tuner.warnings().is_empty(), "{:?}", tuner.warnings());
        assert_eq!(tuner.keys().count(), profile.tables.len());
        assert!((tuner.machine().read_gb_per_s - profile.read_gb_per_s).abs() < 1e-9);
        for (key, table) in &profile.tables {
            for (run, point) in table {
                let timing = point.timing;
                assert!(timing.us <= timing.model_us, "{key}, {run}: tuned is slower than the model");
            }
        }
    }
}

#[test]
fn other_kernels_make_a_shipped_profile_stale() {
    for profile in profiles() {
        let stale = Tuner::new(
            Machine { build: "other".to_owned(), ..tuner(&profile).machine().clone() },
            Level::Profiles,
            None,
        );
        assert_eq!((stale.keys().count(), stale.warnings().len()), (0, 1));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the batch and its order, nothing that changes bits follows it under the batch-invariant policy.
    #[test]
    fn batch_invariance_holds_under_every_shipped_profile(
        lens in proptest::collection::vec(prop_oneof![1u32..3000, 1u32..200_000], 1..24),
        swap in any::<prop::sample::Index>(),
        heads in prop::sample::select(vec![1u32, 2, 4, 8]),
    ) {
        for profile in profiles() {
            let tuner = tuner(&profile);
            for key in profile.tables.keys() {
                let key = StaticKey { policy: PolicyClass::BatchInvariant { split_len: 512 }, ..*key };
                let chooser = tuner.chooser(key, Shape { max_heads_per_block: 4, ..common::shape() });
                let policy = SplitPolicy::BatchInvariant { split_len: 512 };
                let split = |lens: &[u32]| {
                    let choice = chooser.choose(&RunKey::of(lens.iter().copied(), heads)).choice;
                    choice.split(policy, heads, 1)
                };
                let fixed = |lens: &[u32]| common::what_changes_bits(&split(lens));
                let mut permuted = lens.clone();
                permuted.reverse();
                let at = swap.index(lens.len());
                permuted.swap(0, at);
                prop_assert_eq!(fixed(&lens), fixed(&permuted));
                prop_assert_eq!(fixed(&lens), fixed(&lens[..1]));
                // And in the plans: each request is cut as it is alone, wherever it stands.
                for (at, &len) in permuted.iter().enumerate() {
                    let together = cuts(&permuted, &split(&permuted), at as u32);
                    prop_assert_eq!(together, cuts(&[len], &split(&[len]), 0));
                }
            }
        }
    }
}
