//! The look-up: near is measured, far is modelled, and no profile can break batch invariance.
#![allow(clippy::panic, reason = "a test")]

mod common;

use attn_plan::SplitPolicy;
use attn_tune::{MAX_DISTANCE, RunKey, SAME_STEP, Why};
use common::{PROFILE, key, shape, tuner};
use proptest::prelude::*;

const KEY: &str = "d128 k8 v8 f16 gqa4 q1 records-paged throughput";

fn uniform(batch: u32, kv_len: u32) -> RunKey {
    RunKey { batch, num_kv_heads: 8, kv_tokens: u64::from(batch) * u64::from(kv_len), longest: kv_len }
}

#[test]
fn the_nearest_measured_step_decides() {
    let tuner = tuner(PROFILE);
    let chooser = tuner.chooser(key(KEY), shape());
    let exact = chooser.choose(&uniform(8, 2048));
    assert_eq!(exact.choice.num_blocks, 264);
    assert_eq!(exact.why, Why::Measured { nearest: uniform(8, 2048), distance: 0.0 });
    assert_eq!(chooser.choose(&uniform(9, 2000)).choice.num_blocks, 264);
    assert_eq!(chooser.choose(&uniform(1, 1400)).choice.num_blocks, 128);
    assert!(exact.to_string().contains("measured at 8 requests"), "{exact}");
}

#[test]
fn both_sides_of_the_bound() {
    let tuner = tuner(PROFILE);
    let chooser = tuner.chooser(key(KEY), shape());
    let base = uniform(128, 8192);
    // Longer lengths move one coordinate alone.
    let at = |octaves: f32| uniform(128, (8192.0 * octaves.exp2()) as u32);
    let (inside, outside) = (at(MAX_DISTANCE - 0.001), at(MAX_DISTANCE + 0.001));
    assert!(base.distance(&inside) < MAX_DISTANCE && base.distance(&outside) > MAX_DISTANCE);
    assert!(chooser.choose(&inside).why.is_measured());
    assert!(matches!(chooser.choose(&outside).why, Why::Modelled { nearest: Some(_), .. }));
}

#[test]
fn where_nothing_beat_the_model_its_choice_for_the_step_at_hand_is_taken() {
    let chooser = tuner(PROFILE).chooser(key(KEY), shape());
    let of_model = tuner("").chooser(key(KEY), shape());
    // Measured at 128 x 8192, where the model's choice was the fastest: within half an octave its numbers, beyond its rule.
    let at = |octaves: f32| uniform(128, (8192.0 * octaves.exp2()) as u32);
    let (near, far) = (at(SAME_STEP - 0.01), at(SAME_STEP + 0.01));
    assert!(matches!(chooser.choose(&near).why, Why::Measured { .. }));
    let decision = chooser.choose(&far);
    assert!(matches!(decision.why, Why::Agreed { .. }), "{decision}");
    assert_eq!(decision.choice, of_model.choose(&far).choice);
    assert!(
        decision.to_string().contains("nothing was faster than its choice at 128 requests"),
        "{decision}"
    );
    // Where another was faster, that one is taken as far as the look-up goes.
    let decision = chooser.choose(&uniform(1, 2800));
    assert!(matches!(decision.why, Why::Measured { .. }), "{decision}");
    assert_eq!(decision.choice.num_blocks, 128);
}

#[test]
fn an_unknown_key_is_modelled() {
    let tuner = tuner(PROFILE);
    let chooser = tuner.chooser(key("d64 k32 v32 f16 gqa3 q1 records-paged throughput"), shape());
    let decision = chooser.choose(&uniform(8, 2048));
    assert!(matches!(decision.why, Why::Modelled { nearest: None, .. }), "{decision}");
    assert!(decision.to_string().contains("nothing was measured"), "{decision}");
}

#[test]
fn a_point_for_more_heads_than_the_variant_takes_is_passed_over() {
    let tuner = tuner(PROFILE);
    let key = key("d128 k8 v8 f16 gqa4 q1 planes-scattered throughput");
    let four = tuner.chooser(key, shape()).choose(&uniform(128, 8192));
    assert_eq!(four.choice.heads_per_block, 4);
    let one = tuner.chooser(key, attn_tune::Shape { max_heads_per_block: 1, ..shape() });
    assert_eq!(one.choose(&uniform(128, 8192)).choice.heads_per_block, 1);
    // Three heads cannot be taken four at a time.
    let three = RunKey { num_kv_heads: 3, ..uniform(128, 20000) };
    assert_eq!(tuner.chooser(key, shape()).choose(&three).choice.heads_per_block, 1);
}

#[test]
fn the_model_fills_the_device_with_long_work_and_not_with_short() {
    let tuner = tuner("");
    let chooser = tuner.chooser(key(KEY), shape());
    let long = chooser.choose(&uniform(128, 8192)).choice;
    assert!(long.num_blocks >= 132 * 2, "{long}");
    let short = chooser.choose(&uniform(1, 1024)).choice;
    let used = short.num_blocks.min(8 * 1024 / 64 / short.min_split_tiles);
    assert!(used <= 132, "{short}");
}

#[test]
fn short_even_work_is_shared_out_and_other_work_is_not() {
    let tuner = tuner("");
    let shares = |name, shape, run: &RunKey| tuner.chooser(key(name), shape).choose(run).choice.num_shares;
    // Blocks of four warps, two a multiprocessor.
    let narrow = attn_tune::Shape { blocks_per_sm: 2, row_bytes: 640, ..shape() };
    let of = |run: &RunKey| shares("d256 k8 v8 f16 gqa4 q1 records-paged throughput", narrow, run);
    assert_eq!([of(&uniform(1, 512)), of(&uniform(4, 1024)), of(&uniform(16, 1024))], [8, 4, 2]);
    // Long, or of unequal lengths: workers, who all end together.
    assert_eq!([of(&uniform(2, 32_768)), of(&uniform(1, 131_072))], [0; 2]);
    assert_eq!(of(&RunKey::of([8192, 500, 500, 500, 500, 500, 500, 500], 8)), 0);
    // Where there are no clusters, or the cuts are fixed.
    assert_eq!(shares(KEY, attn_tune::Shape { most_shares: 0, ..shape() }, &uniform(1, 1024)), 0);
    assert!(shares(KEY, shape().with_shares(8), &uniform(1, 1024)) <= 8);
    let invariant = "d128 k8 v8 f16 gqa4 q1 records-paged batch-invariant-512";
    assert_eq!(shares(invariant, shape(), &uniform(1, 1024)), 0);
}

#[test]
fn blocks_of_eight_warps_share_out_more() {
    let tuner = tuner("");
    let wide = shape().with_share_blocks((2, 8));
    let of = |run: &RunKey| tuner.chooser(key(KEY), wide).choose(run).choice.num_shares;
    assert_eq!([of(&uniform(1, 1024)), of(&uniform(8, 2048))], [8, 2]);
    assert!((8..=16).contains(&of(&uniform(1, 8192))));
    // Clusters of four spread.
    assert_eq!([of(&uniform(8, 8192)), of(&uniform(32, 2048)), of(&uniform(32, 8192))], [4, 1, 1]);
    let single = |batch, kv_len| RunKey { num_kv_heads: 1, ..RunKey::of(vec![kv_len; batch], 1) };
    assert_eq!([of(&single(8, 1024)), of(&single(64, 1024)), of(&single(128, 2048))], [8, 2, 2]);
    assert_eq!([of(&uniform(1, 131_072)), of(&uniform(16, 2048))], [0, 2]);
    assert_eq!(of(&RunKey::of([8192, 500, 500, 500, 500, 500, 500, 500], 8)), 0);
}

#[test]
fn all_numbers_of_shares_are_candidates_of_a_search() {
    let run = uniform(1, 1024);
    let shares = |shape: attn_tune::Shape| -> Vec<u32> {
        let all = attn_tune::Candidates::all(132, &key(KEY), &shape, &run);
        all.map(|choice| choice.num_shares).filter(|shares| *shares > 0).collect()
    };
    assert_eq!(shares(shape()), (1..=16).collect::<Vec<_>>());
    assert!(shares(shape().with_shares(0)).is_empty());
}

#[test]
fn scattered_rows_are_searched_with_items_of_several_heads() {
    let ragged = RunKey { batch: 64, num_kv_heads: 8, kv_tokens: 321_000, longest: 16_384 };
    let items = |name| -> Vec<(u32, u32)> {
        attn_tune::Candidates::all(132, &key(name), &shape(), &ragged)
            .filter(|choice| choice.num_shares == 0 && choice.item_tiles > 0)
            .map(|choice| (choice.heads_per_block, choice.item_tiles))
            .collect()
    };
    let scattered = items("d128 k8 v8 f16 gqa4 q1 planes-scattered throughput");
    // As long as a worker's load and two parts of it, shorter by as much as a block has more heads.
    assert_eq!(scattered, [(1, 101), (1, 65), (1, 40), (2, 50), (2, 32), (2, 20), (4, 25), (4, 16), (4, 10)]);
    assert_eq!(items(KEY), [(1, 101), (1, 65), (1, 40)]);
    assert_eq!(items("d128 k8 v8 f16 gqa4 q1 planes-scattered batch-invariant-512"), [(1, 1)]);
}

#[test]
fn several_heads_a_block_are_for_long_work_and_a_block_fewer_for_short_heads() {
    let dealt = |name, shape, run: &RunKey| -> Vec<(u32, u32, u32)> {
        attn_tune::Candidates::few(132, &key(name), &shape, run)
            .filter(|choice| choice.num_shares == 0 && choice.item_tiles == 0)
            .map(|choice| (choice.num_blocks, choice.heads_per_block, choice.min_split_tiles))
            .collect()
    };
    let (short, long) = (uniform(4, 2048), uniform(64, 8192));
    let scattered = "d128 k8 v8 f16 gqa4 q1 planes-scattered throughput";
    assert_eq!(dealt(scattered, shape(), &short), [(396, 1, 1), (396, 1, 4)]);
    assert_eq!(dealt(scattered, shape(), &long), [(396, 4, 1)]);
    assert_eq!(dealt(KEY, shape(), &long), [(396, 1, 1)]);
    let two = attn_tune::Shape { blocks_per_sm: 2, row_bytes: 640, ..shape() };
    assert_eq!(
        dealt("d256 k8 v8 f16 gqa4 q1 planes-scattered throughput", two, &long),
        [(264, 1, 1), (264, 4, 1)]
    );
    let four = attn_tune::Shape { blocks_per_sm: 4, row_bytes: 160, ..shape() };
    assert_eq!(dealt("d64 k8 v8 f16 gqa4 q1 planes-scattered throughput", four, &long), [(396, 4, 1)]);
    assert_eq!(dealt("d64 k8 v8 f16 gqa4 q1 records-paged throughput", four, &long), [(528, 1, 1)]);
}

#[test]
fn clusters_of_unequal_requests_take_turns_where_shares_are_long() {
    let offered = |name, lens: [u32; 4]| {
        let run = RunKey::of(lens, 8);
        let shape = attn_tune::Shape { share_blocks_per_sm: 2, share_warps: 8, ..shape() };
        attn_tune::Candidates::few(132, &key(name), &shape, &run).any(|choice| choice.num_shares == 8)
    };
    let paged = "d128 k8 v8 f16 gqa4 q1 records-paged throughput";
    // Eight blocks of each of 32 pairs stand side by side on fewer multiprocessors than there are.
    assert!(offered(paged, [4971, 1000, 600, 402]));
    assert!(!offered(paged, [3500, 700, 400, 300]), "shares of less than eight tiles");
    assert!(!offered(paged, [4971; 4]), "none makes room soon");
    assert!(!offered("d128 k8 v8 f16 gqa4 q1 planes-scattered throughput", [4971, 1000, 600, 402]));
}

#[test]
fn items_have_wide_kernels_where_the_key_says_so() {
    use attn_kernels::key::{Arithmetic, Groups, INSTANCES, KernelKind, Scales, items_of};
    let (mut with, mut without) = (0, 0);
    for instance in INSTANCES {
        let of = &instance.key;
        let group_len = match of.groups {
            Groups::G8 => 8,
            Groups::G16 => 16,
            _ => continue,
        };
        let scale = match of.scales {
            Scales::F16 => "f16",
            Scales::Bf16 => "bf16",
            Scales::F32 => "f32",
            Scales::Any => continue,
        };
        if of.kind != KernelKind::Stage1 || of.arithmetic != Arithmetic::Mma {
            continue;
        }
        let rows = of.rows();
        let name = format!(
            "d{} k{group_len} v{group_len} {scale} gqa{rows} q1 records-paged throughput",
            of.head_dim
        );
        let has = items_of(of).is_some();
        assert_eq!(key(&name).has_wide_items(), has, "{name}");
        with += u32::from(has);
        without += u32::from(!has);
    }
    assert!(with > 2 && without > 2, "{with}, {without}");
}

#[test]
fn fixed_cuts_with_a_wide_kernel_cost_the_same_whatever_is_chosen() {
    let key = key("d128 k8 v8 f16 gqa4 q1 records-paged batch-invariant-512");
    let (machine, run) = (common::machine(), uniform(32, 8192));
    let model = attn_tune::CostModel::default();
    let expected = |shape: attn_tune::Shape| -> Vec<f64> {
        let all = attn_tune::Candidates::all(132, &key, &shape, &run);
        all.map(|choice| model.predict(&machine, &key, &shape, &run, &choice)).collect()
    };
    let differ = |times: &[f64]| times.iter().any(|us| *us != times[0]);
    assert!(!differ(&expected(shape().with_share_blocks((2, 8)))));
    assert!(differ(&expected(shape())));
}

#[test]
fn distance_is_a_metric_on_what_matters() {
    let (a, b) = (uniform(8, 2048), uniform(4, 4096));
    assert_eq!(a.distance(&b), b.distance(&a));
    // As many rows in half the requests: half an octave.
    assert_eq!(a.distance(&b), 0.5);
    let ragged = RunKey { longest: 8192, ..a };
    assert_eq!(a.distance(&ragged), 1.0);
    // Empty steps have a place too.
    assert!(RunKey::of([], 8).distance(&a).is_finite());
}

fn run() -> impl Strategy<Value = RunKey> {
    let lens = proptest::collection::vec(prop_oneof![0u32..300, 0u32..1_048_576], 0..40);
    (lens, 1u32..17).prop_map(|(lens, heads)| RunKey::of(lens, heads))
}

fn name() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(vec![
        KEY,
        "d128 k8 v8 f16 gqa4 q1 planes-scattered throughput",
        "d128 k8 v8 f16 gqa4 q1 planes-scattered batch-invariant-512",
        "d128 k8 v8 f16 gqa4 q1 records-paged batch-invariant-512",
        "d256 k128 v128 bf16 gqa8 q4 records-paged throughput",
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every decision can be planned and launched, and is the same when asked again.
    #[test]
    fn decisions_are_valid_and_pure(run in run(), name in name(), row_blocks in 1u32..9, max_heads in 0u32..3) {
        let tuner = tuner(PROFILE);
        let shape = attn_tune::Shape { row_blocks, max_heads_per_block: 1 << max_heads, ..shape() };
        let chooser = tuner.chooser(key(name), shape);
        let decision = chooser.choose(&run);
        prop_assert_eq!(decision, chooser.choose(&run));
        let choice = decision.choice;
        prop_assert!(choice.heads_per_block <= 1 << max_heads);
        prop_assert!(run.num_kv_heads.is_multiple_of(choice.heads_per_block));
        for policy in [SplitPolicy::Throughput, SplitPolicy::BatchInvariant { split_len: 96 }] {
            let split = choice.split(policy, run.num_kv_heads, row_blocks);
            prop_assert_eq!(split.check(), Ok(()));
        }
    }

    /// The walk from the middle finds what looking at every point finds.
    #[test]
    fn the_nearest_is_the_nearest_of_all(
        run in run(),
        known in proptest::collection::vec(run(), 1..60),
    ) {
        let mut tuner = tuner(PROFILE);
        let key = key("d64 k8 v8 f16 gqa4 q1 records-paged throughput");
        let point = tuner.chooser(common::key(KEY), shape()).points()[0].1;
        for known in &known {
            tuner.learn(key, *known, point);
        }
        let want = known.iter().map(|known| known.distance(&run)).fold(f32::INFINITY, f32::min);
        let got = match tuner.chooser(key, shape()).choose(&run).why {
            Why::Measured { nearest, distance }
            | Why::Agreed { nearest, distance, .. }
            | Why::Outweighed { nearest, distance, .. } => {
                prop_assert_eq!(nearest.distance(&run), distance);
                distance
            }
            Why::Modelled { nearest, .. } => nearest.unwrap_or(f32::INFINITY),
            why => panic!("{why}"),
        };
        prop_assert_eq!(got, want);
    }

    /// What changes bits does not follow the batch where the policy forbids it.
    #[test]
    fn batch_invariance_survives_every_profile(run in run(), other in run(), layout in 0usize..2) {
        let names = [
            "d128 k8 v8 f16 gqa4 q1 records-paged batch-invariant-512",
            "d128 k8 v8 f16 gqa4 q1 planes-scattered batch-invariant-512",
        ];
        let tuner = tuner(PROFILE);
        let chooser = tuner.chooser(key(names[layout]), shape());
        let policy = SplitPolicy::BatchInvariant { split_len: 512 };
        let [a, b] = [run, other].map(|run| {
            let split = chooser.choose(&run).choice.split(policy, 8, 1);
            common::what_changes_bits(&split)
        });
        prop_assert_eq!(a, b);
    }

    /// The model orders sensibly: four times the tokens never take much less (they may spare a merge, or a second item).
    #[test]
    fn more_work_costs_more(batch in 1u32..64, kv_len in 64u32..65_536) {
        let chooser = tuner("").chooser(key(KEY), shape());
        let us = |kv_len| match chooser.choose(&uniform(batch, kv_len)).why {
            Why::Modelled { expected_us, .. } => expected_us,
            why => panic!("{why}"),
        };
        prop_assert!(us(kv_len).is_finite() && us(kv_len) > 0.0);
        prop_assert!(us(4 * kv_len) >= 0.8 * us(kv_len), "{} then {}", us(kv_len), us(4 * kv_len));
    }
}

#[test]
fn ragged_long_batches_get_items_of_their_own_and_four_heads_cheaper_ones() {
    let tuner = tuner("");
    let chooser = tuner.chooser(key(KEY), shape());
    let mut lens = vec![1000u32; 255];
    lens.push(100_000);
    let ragged = RunKey::of(lens.iter().copied(), 8);
    // 0.65 of what each of 49 workers would have.
    let fair = lens.iter().sum::<u32>() / 64 / 49;
    let few = attn_tune::Candidates::few(132, &key(KEY), &shape(), &ragged);
    let own: Vec<u32> = few.map(|choice| choice.item_tiles).filter(|tiles| *tiles > 0).collect();
    assert!(own.len() == 1 && (fair / 2..fair).contains(&own[0]), "{own:?}");
    assert_eq!(chooser.choose(&uniform(32, 8192)).choice.item_tiles, 0);
    let run = RunKey::of(lens.iter().copied(), 8);
    let all = |name| attn_tune::Candidates::few(132, &key(name), &shape(), &run).collect::<Vec<_>>();
    assert!(all(KEY).iter().all(|choice| choice.num_blocks == 396), "a full device");
    let scattered = all("d128 k32 v32 f16 gqa4 q1 planes-scattered throughput");
    for choice in &scattered {
        assert_eq!(choice.item_overhead, 4 / choice.heads_per_block);
    }
    // There in blocks of two heads.
    let own: Vec<u32> = scattered
        .iter()
        .filter(|choice| choice.item_tiles > 0)
        .map(|choice| choice.heads_per_block)
        .collect();
    assert_eq!(own, [2]);
    // Four heads in step are as good.
    let in_step = all("d128 k8 v8 f16 gqa4 q1 planes-scattered throughput");
    assert!(in_step.iter().all(|choice| choice.item_tiles == 0));
    for choice in all("d128 k8 v8 f16 gqa4 q1 records-paged batch-invariant-512") {
        assert_eq!((choice.heads_per_block, choice.num_shares), (1, 0));
    }
}
