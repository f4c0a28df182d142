//! The generator of cases, for proptest: shapes shrink, numbers follow from a seed.

use super::{Case, Data, Profile, Rows};
use attn_plan::{MAX_SHARES, SplitConfig, SplitPolicy};
use kv_quant::{FloatType, LayoutKind, ScaleType};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Lengths at and around every edge of the first tiles, and 0, 1, 2.
pub fn lens_around(tile_len: u32) -> impl Strategy<Value = u32> {
    let edge = (1u32..6, 0u32..3).prop_map(move |(tiles, delta)| tiles * tile_len + delta - 1);
    prop_oneof![
        2 => Just(0u32),
        3 => 1u32..4,
        4 => 1u32..40,
        6 => edge,
        4 => 1u32..700,
        1 => 700u32..3000,
    ]
}

fn options<T: Clone + std::fmt::Debug + 'static>(
    offered: bool,
    value: impl Strategy<Value = T> + 'static,
) -> BoxedStrategy<Option<T>> {
    if offered { prop::option::weighted(0.3, value).boxed() } else { Just(None).boxed() }
}

fn flag(offered: bool, share: f64) -> BoxedStrategy<bool> {
    if offered { prop::bool::weighted(share).boxed() } else { Just(false).boxed() }
}

fn data() -> impl Strategy<Value = Data> {
    prop_oneof![
        4 => select(vec![1.0f32, 1e-4, 0.03, 30.0]).prop_map(Data::Normal),
        2 => select(vec![10.0f32, 20.0, 50.0]).prop_map(Data::Outliers),
        3 => (0.0f32..=1.0).prop_map(Data::Needle),
        2 => Just(Data::Raw),
    ]
}

fn policy(offered: bool, tile_len: u32) -> BoxedStrategy<SplitPolicy> {
    let invariant = (1u32..5).prop_map(move |n| SplitPolicy::BatchInvariant { split_len: n * tile_len });
    if offered {
        prop_oneof![Just(SplitPolicy::Throughput), invariant].boxed()
    } else {
        Just(SplitPolicy::Throughput).boxed()
    }
}

fn config(offered: bool, tile_len: u32) -> impl Strategy<Value = SplitConfig> {
    (
        policy(offered, tile_len),
        select(vec![1u32, 2, 3, 5, 8, 17, 33, 132]),
        0u32..3,
        1u32..4,
        select(vec![1u32, 2, 4]),
        // Of the throughput policy alone; every third time.
        prop_oneof![2 => Just(0u32), 1 => 1u32..=MAX_SHARES],
        // Where there are no shares.
        prop_oneof![2 => Just(0u32), 1 => 1u32..9],
    )
        .prop_map(
            move |(
                policy,
                num_workers,
                item_overhead,
                min_split_tiles,
                heads_per_block,
                shares,
                item_tiles,
            )| {
                let num_shares = if policy == SplitPolicy::Throughput { shares } else { 0 };
                SplitConfig {
                    policy,
                    num_workers,
                    tile_len,
                    item_overhead,
                    min_split_tiles,
                    heads_per_block,
                    num_shares,
                    item_tiles,
                }
            },
        )
}

fn batches(tile_len: u32) -> impl Strategy<Value = Vec<u32>> {
    prop_oneof![
        3 => prop::collection::vec(lens_around(tile_len), 1..2),
        4 => prop::collection::vec(lens_around(tile_len), 2..6),
        1 => prop::collection::vec(0u32..90, 6..24),
    ]
}

/// The oracle's multiplications of a case at most. Most cases are small, so that there can be many; some have long
/// requests of many heads.
fn budget() -> impl Strategy<Value = u64> {
    prop_oneof![10 => Just(100_000u64), 5 => Just(500_000), 1 => Just(4_000_000)]
}

/// Cases within a profile.
pub fn cases(profile: &Profile) -> impl Strategy<Value = Case> + use<> {
    let profile = profile.clone();
    let [window, soft_cap, alibi, sinks, lse, invariant] = profile.features;
    let tile_len = profile.tile_len;
    let dims = proptest::strategy::Union::new_weighted(
        profile.head_dims.iter().map(|&(dim, weight)| (weight, Just(dim).boxed())).collect(),
    );
    // The format that most caches have, and kernels have most variants for, oftener than one in a hundred.
    let common = prop::bool::weighted(0.25);
    let format = (dims, any::<Index>(), any::<Index>(), select(profile.scale_types.clone()), common);
    let cache = (select(profile.layouts.clone()), select(profile.page_lens.clone()), any::<bool>());
    let heads = (
        prop_oneof![6 => 1u32..5, 1 => Just(8u32)],
        select(profile.gqa_groups.clone()),
        prop_oneof![3 => Just(1u32), 2 => 1u32..9],
    );
    let window_len = prop_oneof![1u32..4, tile_len - 1..tile_len + 2, 1u32..500, Just(u32::MAX)];
    let mask = (
        options(window, window_len),
        options(soft_cap, select(vec![0.5f32, 2.0, 30.0, 50.0, 1000.0])),
        flag(alibi, 0.3),
        flag(sinks, 0.3),
        flag(lse, 0.7),
        prop_oneof![6 => Just(1.0f32), 2 => Just(4.0), 1 => Just(0.0), 1 => Just(-1.0), 1 => 0.01f32..2.0],
    );
    let types =
        (select(FloatType::ALL.to_vec()), select(profile.q_types.clone()), select(profile.out_types.clone()));
    let rows = (select(vec![Rows::Padded, Rows::Scattered]), prop::bool::weighted(0.2));
    let split = config(invariant, tile_len);
    (format, cache, heads, batches(tile_len), mask, types, rows, split, data(), (any::<u64>(), budget()))
        .prop_map(move |(format, cache, heads, kv_lens, mask, types, rows, config, data, (seed, budget))| {
            let (head_dim, k_index, v_index, mut scale_type, is_common) = format;
            let groups = profile.groups_of(head_dim);
            let (mut k_group_len, mut v_group_len) = (*k_index.get(&groups), *v_index.get(&groups));
            if is_common && groups.contains(&8) && profile.scale_types.contains(&ScaleType::F16) {
                (k_group_len, v_group_len, scale_type) = (8, 8, ScaleType::F16);
            }
            let (layout, mut page_len, mixed) = cache;
            if layout == LayoutKind::LightLlm {
                page_len = 1;
            }
            if layout == LayoutKind::LightLlm || !mixed {
                v_group_len = k_group_len;
            }
            let (num_kv_heads, gqa_group, q_len) = heads;
            let (window, soft_cap, alibi, sinks, want_lse, scale_factor) = mask;
            let mut case = Case {
                head_dim,
                k_group_len,
                v_group_len,
                scale_type,
                layout,
                page_len,
                num_kv_heads,
                gqa_group,
                q_len: q_len.clamp(*profile.q_lens.start(), *profile.q_lens.end()),
                kv_lens,
                scale_factor,
                window,
                soft_cap,
                alibi,
                sinks,
                in_type: types.0,
                q_type: types.1,
                out_type: types.2,
                want_lse,
                config,
                rows: rows.0,
                shares_prefix: rows.1,
                data,
                seed,
            };
            profile.fit(&mut case, budget);
            case
        })
}
