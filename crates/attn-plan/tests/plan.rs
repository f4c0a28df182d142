//! Properties of the split schedule: every visible token in exactly one item, workers balanced, invariance.

use attn_plan::{
    DecodeSpec, MAX_OWN_ITEMS, MAX_SHARES, NO_PARTIAL, SplitConfig, SplitPlan, SplitPolicy, WorkItem,
};
use proptest::prelude::*;

fn policies() -> impl Strategy<Value = SplitPolicy> {
    prop_oneof![
        Just(SplitPolicy::Throughput),
        (1u32..9).prop_map(|n| SplitPolicy::BatchInvariant { split_len: n * 64 }),
    ]
}

fn configs() -> impl Strategy<Value = SplitConfig> {
    (policies(), 1u32..200, prop::sample::select(vec![16u32, 32, 64]), 0u32..8, 1u32..5).prop_map(
        |(policy, num_workers, tile_len, item_overhead, min_split_tiles)| SplitConfig {
            policy,
            num_workers,
            tile_len,
            item_overhead,
            min_split_tiles,
            heads_per_block: 1,
            num_shares: 0,
            item_tiles: 0,
        },
    )
}

fn lens() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![Just(0u32), 1u32..70, 1u32..5000, 60_000u32..1_048_577], 0..40)
}

fn specs() -> impl Strategy<Value = DecodeSpec> {
    (1u32..9, prop::option::of(1u32..3000)).prop_map(|(q_len, window)| DecodeSpec {
        q_len,
        window,
        ..DecodeSpec::new(32, 8, 128)
    })
}

proptest! {
    /// The last busy worker has items, those after it have none.
    #[test]
    fn workers_after_the_busy_ones_have_no_items(spec in specs(), lens in lens(), config in configs()) {
        let plan = SplitPlan::new(&spec, &lens, &config).unwrap();
        let busy = plan.num_busy_workers() as usize;
        prop_assert!(busy >= 1 && busy <= config.num_workers as usize);
        prop_assert_eq!(plan.worker_items(busy - 1).is_empty(), plan.items().is_empty());
        for worker in busy..config.num_workers as usize {
            prop_assert!(plan.worker_items(worker).is_empty(), "worker {} of {}", worker, busy);
        }
    }

    /// A request's shares cover it, differ by a tile at most, and are the same whatever stands beside it.
    #[test]
    fn shares_are_equal_and_their_own(spec in specs(), lens in lens(), num_shares in 1u32..=MAX_SHARES) {
        let config = SplitConfig::shares(num_shares);
        let plan = SplitPlan::new(&spec, &lens, &config).unwrap();
        let shares = num_shares as usize;
        prop_assert_eq!(plan.worker_starts().len(), lens.len() * shares + 1);
        for (request, &kv_len) in lens.iter().enumerate() {
            let alone = SplitPlan::new(&spec, &[kv_len], &config).unwrap();
            let visible = spec.visible_any(kv_len);
            let (mut next, mut least, mut most) = (visible.start, u32::MAX, 0);
            for rank in 0..shares {
                let items = plan.worker_items(request * shares + rank);
                prop_assert!(items.len() <= 1);
                let bounds = |items: &[WorkItem]| items.first().map(|item| (item.token_start, item.token_end));
                prop_assert_eq!(bounds(items), bounds(alone.worker_items(rank)));
                let Some(item) = items.first() else {
                    least = 0;
                    continue;
                };
                prop_assert_eq!((item.request_idx as usize, item.token_start), (request, next));
                let tiles = item.token_end.div_ceil(64) - item.token_start / 64;
                (least, most) = (least.min(tiles), most.max(tiles));
                next = item.token_end;
            }
            prop_assert_eq!(next, visible.end);
            prop_assert!(visible.is_empty() || most - least <= 1);
            let partials = plan.request_partials()[request + 1] - plan.request_partials()[request];
            prop_assert_eq!(partials > 0, most > 0 && (visible.end.div_ceil(64) - visible.start / 64) > 1 && num_shares > 1);
        }
    }

    #[test]
    fn every_visible_token_is_in_one_item(spec in specs(), lens in lens(), config in configs()) {
        let plan = SplitPlan::new(&spec, &lens, &config).unwrap();
        let mut items = plan.items().iter().peekable();
        for (request, &kv_len) in lens.iter().enumerate() {
            let visible = spec.visible_any(kv_len);
            let mut next = visible.start;
            let mut partials = Vec::new();
            let mut count = 0;
            while let Some(item) = items.next_if(|item| item.request_idx as usize == request) {
                prop_assert_eq!(item.token_start, next);
                prop_assert!(item.num_tokens() > 0 || visible.is_empty());
                next = item.token_end;
                if item.partial_idx != NO_PARTIAL { partials.push(item.partial_idx) }
                if next != visible.end { prop_assert_eq!(next % config.tile_len, 0) }
                count += 1;
            }
            prop_assert_eq!(next, visible.end);
            prop_assert_eq!(partials.len(), if count > 1 { count } else { 0 });
            let range = plan.request_partials()[request]..plan.request_partials()[request + 1];
            prop_assert_eq!(partials, range.collect::<Vec<_>>());
        }
        prop_assert!(items.next().is_none());
        let starts = plan.worker_starts();
        prop_assert_eq!(starts.len(), config.num_workers as usize + 1);
        prop_assert!(starts.windows(2).all(|w| w[0] <= w[1]));
        prop_assert_eq!(*starts.last().unwrap() as usize, plan.items().len());
    }

    /// Items with a worker each are those of the policy, or equal and short enough; the longest come first.
    #[test]
    fn own_workers_get_the_longest_first(spec in specs(), lens in lens(), config in configs(), item_tiles in 1u32..50) {
        let config = SplitConfig { item_tiles, num_workers: 1, ..config };
        let plan = SplitPlan::new(&spec, &lens, &config).unwrap();
        let count = |&kv_len: &u32| {
            let visible = spec.visible_any(kv_len);
            let tiles = visible.end.div_ceil(config.tile_len) - visible.start / config.tile_len;
            u64::from(tiles.div_ceil(item_tiles).max(1))
        };
        let is_own = match config.policy {
            SplitPolicy::Throughput => lens.iter().map(count).sum::<u64>() <= MAX_OWN_ITEMS,
            SplitPolicy::BatchInvariant { .. } => plan.items().len() as u64 <= MAX_OWN_ITEMS,
        };
        if !is_own {
            return Ok(());
        }
        let tiles = |item: &WorkItem| item.token_end.div_ceil(config.tile_len) - item.token_start / config.tile_len;
        prop_assert!(plan.worker_starts().iter().copied().eq(0..=plan.items().len() as u32));
        prop_assert_eq!(plan.num_busy_workers() as usize, plan.items().len().max(1));
        prop_assert!(plan.items().is_sorted_by(|a, b| a.num_tokens() == 0 && b.num_tokens() == 0 || tiles(a) >= tiles(b)));
        let mut items = plan.items().to_vec();
        items.sort_by_key(|item| (item.request_idx, item.token_start));
        let dealt = SplitPlan::new(&spec, &lens, &SplitConfig { item_tiles: 0, ..config }).unwrap();
        match config.policy {
            SplitPolicy::BatchInvariant { .. } => prop_assert!(items == dealt.items()),
            SplitPolicy::Throughput => {
                for (request, &kv_len) in lens.iter().enumerate() {
                    let visible = spec.visible_any(kv_len);
                    let own: Vec<_> = items.iter().filter(|item| item.request_idx as usize == request).collect();
                    let mut ends = own.iter().map(|item| item.token_end);
                    let starts = own.iter().map(|item| item.token_start);
                    prop_assert!(starts.eq(std::iter::once(visible.start).chain(ends.clone()).take(own.len())));
                    prop_assert_eq!(ends.next_back(), Some(visible.end));
                    let most = own.iter().map(|item| tiles(item)).max().unwrap();
                    let least = own.iter().map(|item| tiles(item)).min().unwrap();
                    prop_assert!(most <= item_tiles && (visible.is_empty() || most - least <= 1));
                    let range = plan.request_partials()[request]..plan.request_partials()[request + 1];
                    let partials = own.iter().map(|item| item.partial_idx).filter(|partial| *partial != NO_PARTIAL);
                    prop_assert!(partials.eq(range));
                }
            }
        }
    }

    #[test]
    // At least 15 tiles a worker: whole tiles and one overhead leave at most 2 of 17 idle.
    fn long_work_is_balanced(lens in prop::collection::vec(60_000u32..400_000, 1..30), workers in 1u32..60) {
        let config = SplitConfig::throughput(workers);
        let plan = SplitPlan::new(&DecodeSpec::new(8, 8, 64), &lens, &config).unwrap();
        prop_assert!(plan.efficiency() > 0.88, "{plan}");
    }

    #[test]
    fn invariant_cuts_do_not_see_neighbours(spec in specs(), lens in lens(), own in 0u32..100_000, at in 0usize..40,
                                            config in configs(), split in 1u32..9) {
        let config = config.with_policy(SplitPolicy::BatchInvariant { split_len: split * 64 });
        let mut lens = lens;
        let at = at.min(lens.len());
        lens.insert(at, own);
        let bounds = |plan: &SplitPlan, request: u32| -> Vec<(u32, u32, bool)> {
            plan.items().iter().filter(|item| item.request_idx == request)
                .map(|item| (item.token_start, item.token_end, item.partial_idx == NO_PARTIAL)).collect()
        };
        let crowd = SplitPlan::new(&spec, &lens, &config).unwrap();
        let alone = SplitPlan::new(&spec, &[own], &config).unwrap();
        prop_assert_eq!(bounds(&crowd, at as u32), bounds(&alone, 0));
    }

    #[test]
    fn update_gives_what_new_gives(spec in specs(), first in lens(), second in lens(), config in configs()) {
        let mut plan = SplitPlan::new(&spec, &first, &config).unwrap();
        plan.update(&spec, &second, &config).unwrap();
        prop_assert_eq!(plan, SplitPlan::new(&spec, &second, &config).unwrap());
    }
}
