//! The split schedule where it hurts: no requests, very many, the longest length, one worker, the most workers.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use attn_plan::{DecodeSpec, Error, MAX_ITEMS, NO_PARTIAL, SplitConfig, SplitPlan, SplitPolicy, WorkItem};
use proptest::prelude::*;

const INVARIANT: SplitPolicy = SplitPolicy::BatchInvariant { split_len: 1024 };

fn spec() -> DecodeSpec {
    DecodeSpec::new(32, 8, 128)
}

/// Every visible token once, in order; every worker start in order and the last one at the end.
fn assert_covers(plan: &SplitPlan, spec: &DecodeSpec, lens: &[u32], workers: u32) {
    let mut items = plan.items().iter().peekable();
    for (request, &kv_len) in lens.iter().enumerate() {
        let visible = spec.visible_any(kv_len);
        let mut next = visible.start;
        let mut count = 0u32;
        while let Some(item) = items.next_if(|item| item.request_idx as usize == request) {
            assert_eq!(item.token_start, next);
            next = item.token_end;
            count += 1;
        }
        assert!(count > 0 && next == visible.end, "request {request} of {kv_len} tokens");
        let partials = plan.request_partials();
        assert_eq!(partials[request + 1] - partials[request], if count > 1 { count } else { 0 });
    }
    assert!(items.next().is_none());
    assert_eq!(plan.worker_starts().len(), workers as usize + 1);
    assert!(plan.worker_starts().is_sorted());
    assert_eq!(*plan.worker_starts().last().unwrap() as usize, plan.items().len());
    let loads = (0..workers as usize).map(|worker| plan.load(worker));
    assert_eq!(plan.makespan(), loads.max().unwrap());
}

#[test]
fn no_requests() {
    for policy in [SplitPolicy::Throughput, INVARIANT] {
        let config = SplitConfig::throughput(132).with_policy(policy);
        let plan = SplitPlan::new(&spec(), &[], &config).unwrap();
        assert_covers(&plan, &spec(), &[], 132);
        assert_eq!((plan.batch(), plan.items().len(), plan.num_partials()), (0, 0, 0));
        assert_eq!(plan.efficiency(), 1.0);
    }
}

#[test]
fn only_empty_requests() {
    for (policy, item_overhead) in
        [(SplitPolicy::Throughput, 1), (INVARIANT, 1), (SplitPolicy::Throughput, 0)]
    {
        let config = SplitConfig { item_overhead, ..SplitConfig::throughput(4).with_policy(policy) };
        let plan = SplitPlan::new(&spec(), &[0; 9], &config).unwrap();
        assert_covers(&plan, &spec(), &[0; 9], 4);
        let empty = |item: &WorkItem| item.num_tokens() == 0 && item.partial_idx == NO_PARTIAL;
        assert!(plan.items().iter().all(empty));
    }
}

#[test]
fn a_hundred_thousand_requests() {
    let lens: Vec<u32> = (0..100_000u32).map(|i| i.wrapping_mul(2_654_435_761) >> 20).collect();
    for policy in [SplitPolicy::Throughput, INVARIANT] {
        for workers in [1, 132, 1 << 20] {
            let config = SplitConfig::throughput(workers).with_policy(policy);
            let plan = SplitPlan::new(&spec(), &lens, &config).unwrap();
            assert_covers(&plan, &spec(), &lens, workers);
            if workers == 132 {
                assert!(plan.efficiency() > 0.99, "{}", plan.efficiency());
            }
        }
    }
}

#[test]
fn the_longest_length() {
    let windowed = DecodeSpec { window: Some(4096), q_len: 5, ..spec() };
    for (spec, lens) in [(spec(), vec![u32::MAX]), (windowed, vec![u32::MAX, 0, 3, u32::MAX - 1])] {
        for workers in [1, 3, 132, 1 << 20] {
            let plan = SplitPlan::new(&spec, &lens, &SplitConfig::throughput(workers)).unwrap();
            assert_covers(&plan, &spec, &lens, workers);
        }
    }
    // The invariant cut of the same length: refused if it is too fine to hold, done if the window leaves little.
    let fine = SplitConfig::throughput(8).with_policy(SplitPolicy::BatchInvariant { split_len: 64 });
    let error = SplitPlan::new(&spec(), &[u32::MAX], &fine).unwrap_err();
    assert_eq!(error, Error::TooManyItems(1 << 26));
    let windowed = DecodeSpec { window: Some(100), ..spec() };
    let plan = SplitPlan::new(&windowed, &[u32::MAX], &fine).unwrap();
    assert_eq!(plan.items().first().unwrap().token_start, u32::MAX - 100);
    assert_covers(&plan, &windowed, &[u32::MAX], 8);
}

#[test]
fn a_refused_update_leaves_the_plan() {
    let mut plan = SplitPlan::new(&spec(), &[1000, 70], &SplitConfig::throughput(4)).unwrap();
    let before = plan.to_string();
    let fine = SplitConfig { tile_len: 1, ..SplitConfig::throughput(4) };
    let fine = fine.with_policy(SplitPolicy::BatchInvariant { split_len: 1 });
    assert_eq!(plan.update(&spec(), &[MAX_ITEMS as u32 + 1], &fine), Err(Error::TooManyItems(MAX_ITEMS + 1)));
    assert_eq!(plan.update(&spec(), &[1], &SplitConfig::throughput(0)), Err(Error::NumWorkers(0)));
    assert_eq!(plan.to_string(), before);
}

#[test]
fn refused_configs() {
    let good = SplitConfig::throughput(8);
    let bad = |config: SplitConfig| config.check().unwrap_err();
    assert_eq!(good.check(), Ok(()));
    assert_eq!(bad(SplitConfig { num_workers: 0, ..good }), Error::NumWorkers(0));
    assert_eq!(bad(SplitConfig { num_workers: (1 << 20) + 1, ..good }), Error::NumWorkers((1 << 20) + 1));
    assert_eq!(bad(SplitConfig { heads_per_block: 3, ..good }), Error::HeadsPerBlock(3));
    assert_eq!(bad(SplitConfig { tile_len: 0, ..good }), Error::TileLen(0));
    assert_eq!(bad(SplitConfig { num_shares: 17, ..good }), Error::NumShares(17));
    let invariant = good.with_policy(SplitPolicy::BatchInvariant { split_len: 64 });
    assert_eq!(bad(SplitConfig { num_shares: 1, ..invariant }), Error::NumShares(1));
    assert_eq!(bad(SplitConfig { tile_len: 65537, ..good }), Error::TileLen(65537));
    for split_len in [0, 63, 100] {
        let config = good.with_policy(SplitPolicy::BatchInvariant { split_len });
        assert_eq!(bad(config), Error::SplitLen { split_len, tile_len: 64 });
    }
}

#[test]
fn requests_stay_whole_where_it_costs_little() {
    let config = SplitConfig { item_overhead: 4, min_split_tiles: 4, ..SplitConfig::throughput(33) };
    let partials =
        |batch: usize| SplitPlan::new(&spec(), &vec![8192; batch], &config).unwrap().num_partials();
    // Two each on 32 of them: 264 tiles, where cuts would make it 256. Four each: 528, and 512.
    assert_eq!((partials(32), partials(64)), (0, 0));
    assert!(partials(128) > 0 && partials(8) > 0);
}

#[test]
fn many_workers_never_make_it_slower() {
    let lens = [8192, 100, 0, 31_000, 5, 777];
    for policy in [SplitPolicy::Throughput, INVARIANT] {
        let mut last = u64::MAX;
        for workers in 1..400 {
            let config = SplitConfig::throughput(workers).with_policy(policy);
            let makespan = SplitPlan::new(&spec(), &lens, &config).unwrap().makespan();
            assert!(makespan <= last, "{workers} workers: {makespan} after {last}");
            last = makespan;
        }
    }
}

proptest! {
    /// The bound that the search for a budget rests on; `docs/split-schedule.md` proves it.
    #[test]
    fn makespan_is_within_the_bound(
        lens in prop::collection::vec(prop_oneof![0u32..300, 0u32..100_000], 1..60),
        workers in 1u32..300, overhead in 0u32..9, piece in 1u32..9, window in prop::option::of(1u32..5000),
        split in prop::option::of(1u32..20),
    ) {
        let spec = DecodeSpec { window, ..spec() };
        let policy = split.map_or(SplitPolicy::Throughput, |n| SplitPolicy::BatchInvariant { split_len: n * 64 });
        let config = SplitConfig {
            policy, num_workers: workers, tile_len: 64, item_overhead: overhead, min_split_tiles: piece,
            heads_per_block: 1,
            num_shares: 0,
            item_tiles: 0,
        };
        let plan = SplitPlan::new(&spec, &lens, &config).unwrap();
        assert_covers(&plan, &spec, &lens, workers);
        let tiles = |range: std::ops::Range<u32>| match range.is_empty() {
            true => 0,
            false => u64::from(range.end.div_ceil(64) - range.start / 64),
        };
        let (overhead, piece, workers) = (u64::from(overhead), u64::from(piece), u64::from(workers));
        let bound = match split {
            None => {
                let total: u64 = lens.iter().map(|&len| tiles(spec.visible_any(len)) + overhead).sum();
                total.div_ceil(workers).max(piece + overhead) + 2 * piece + 4 * overhead
            }
            Some(split) => {
                let cost = |item: &WorkItem| tiles(item.token_start..item.token_end) + overhead;
                let total: u64 = plan.items().iter().map(cost).sum();
                let largest = u64::from(split) + overhead;
                total.div_ceil(workers).max(largest) + largest
            }
        };
        prop_assert!(plan.makespan() <= bound, "{} > {bound}", plan.makespan());
    }

    /// No item but the last of its worker or of its request is shorter than a piece.
    #[test]
    fn pieces_are_worth_it(lens in prop::collection::vec(0u32..100_000, 1..20), workers in 1u32..100, piece in 1u32..9) {
        let config = SplitConfig { min_split_tiles: piece, ..SplitConfig::throughput(workers) };
        let plan = SplitPlan::new(&spec(), &lens, &config).unwrap();
        for item in plan.items() {
            let whole = item.partial_idx == NO_PARTIAL;
            let last = item.token_end == lens[item.request_idx as usize];
            prop_assert!(whole || last || item.num_tokens() >= piece * 64);
        }
    }
}
