//! proptest strategies: decode problems for any kernel, judged by the oracle and its bound.
//!
//! A strategy makes a [`CaseConfig`], which is a dozen numbers and a seed; tensors are expanded by
//! [`CaseConfig::build`]. Shrinking therefore works on shapes and is cheap. [`Limits`] says what the kernel under test
//! can do.
//!
//! ```
//! use cpu_reference::{Workspace, strategies::{self, Limits}};
//! use proptest::test_runner::{Config, TestRunner};
//!
//! let limits = Limits { max_kv_len: 100, ..Limits::default() };
//! let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(32) });
//! runner.run(&strategies::cases(&limits), |config| {
//!     let case = config.build()?;
//!     // Your kernel in place of this line: it gets case.layout, case.cache, case.request(), case.plan, case.q.
//!     let (out, lse) = case.run(&mut Workspace::new())?;
//!     case.check(&out, Some(&lse), &case.f32_arithmetic())?;
//!     Ok(())
//! })?;
//! # Ok::<(), proptest::test_runner::TestError<cpu_reference::case::CaseConfig>>(())
//! ```

use crate::case::{CaseConfig, Data};
use attn_plan::{SplitConfig, SplitPolicy};
use kv_quant::{CacheFormat, FloatType, GROUP_LENS, LayoutKind, ScaleType};
use proptest::prelude::*;
use proptest::sample::select;

/// What a kernel under test can do; the default is everything, at sizes that the oracle does in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Head dimensions to draw from.
    pub head_dims: Vec<u32>,
    /// Group lengths to draw from; those that do not divide the head dimension are left out. 0 stands for the whole
    /// head.
    pub group_lens: Vec<u32>,
    /// Whether K and V may have different groups.
    pub mixed_group_lens: bool,
    /// Scale types to draw from.
    pub scale_types: Vec<ScaleType>,
    /// Layouts to draw from.
    pub layouts: Vec<LayoutKind>,
    /// Page lengths to draw from.
    pub page_lens: Vec<u32>,
    /// kv head counts to draw from.
    pub num_kv_heads: Vec<u32>,
    /// Query heads a kv head to draw from.
    pub gqa_groups: Vec<u32>,
    /// Numbers of new tokens to draw from.
    pub q_lens: Vec<u32>,
    /// Element types of q to draw from; those of K and V on append too.
    pub q_types: Vec<FloatType>,
    /// Output types to draw from.
    pub out_types: Vec<FloatType>,
    /// The most requests.
    pub max_batch: usize,
    /// The most tokens of a request.
    pub max_kv_len: u32,
    /// Tokens of a tile of the split schedule.
    pub tile_lens: Vec<u32>,
    /// Whether sliding windows are drawn.
    pub window: bool,
    /// Whether soft-caps are drawn.
    pub soft_cap: bool,
    /// Whether ALiBi slopes are drawn.
    pub alibi: bool,
    /// Whether sinks are drawn.
    pub sinks: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_dims: vec![16, 24, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256],
            group_lens: GROUP_LENS.into_iter().chain([0]).collect(),
            mixed_group_lens: true,
            scale_types: ScaleType::ALL.to_vec(),
            layouts: vec![
                LayoutKind::LightLlm,
                LayoutKind::Hnd,
                LayoutKind::Nhd,
                LayoutKind::Native,
                LayoutKind::Custom,
            ],
            page_lens: vec![1, 2, 3, 7, 16, 17, 64],
            num_kv_heads: vec![1, 2, 3],
            gqa_groups: vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16],
            q_lens: vec![1, 1, 1, 2, 3, 5],
            q_types: FloatType::ALL.to_vec(),
            out_types: FloatType::ALL.to_vec(),
            max_batch: 4,
            max_kv_len: 300,
            tile_lens: vec![1, 8, 16, 64],
            window: true,
            soft_cap: true,
            alibi: true,
            sinks: true,
        }
    }
}

/// Any seed.
pub fn seeds() -> impl Strategy<Value = u64> {
    any::<u64>()
}

/// Formats: head dimension, group lengths of K and V, scale type, within the limits.
pub fn formats(limits: &Limits) -> impl Strategy<Value = CacheFormat> + use<> {
    let Limits { group_lens, mixed_group_lens, .. } = limits.clone();
    let shapes = (select(limits.num_kv_heads.clone()), select(limits.head_dims.clone()));
    (shapes, select(limits.scale_types.clone()), any::<[prop::sample::Index; 2]>()).prop_filter_map(
        "no group length of the limits divides the head dimension",
        move |((num_kv_heads, head_dim), scale_type, picks)| {
            let whole = |g: &u32| if *g == 0 { head_dim } else { *g };
            let valid: Vec<u32> = group_lens.iter().map(whole).filter(|g| head_dim % g == 0).collect();
            if valid.is_empty() {
                return None;
            }
            let [k, v] = picks.map(|pick| *pick.get(&valid));
            let v = if mixed_group_lens { v } else { k };
            CacheFormat::new(num_kv_heads, head_dim, k, v, scale_type).ok()
        },
    )
}

/// How a batch is cut: both policies, few and many workers.
pub fn splits(limits: &Limits) -> impl Strategy<Value = SplitConfig> + use<> {
    (select(limits.tile_lens.clone()), 1u32..9, 0u32..3, 1u32..3, prop::option::of(1u32..5)).prop_map(
        |(tile_len, num_workers, item_overhead, min_split_tiles, invariant)| {
            let config = SplitConfig {
                tile_len,
                item_overhead,
                min_split_tiles,
                ..SplitConfig::throughput(num_workers)
            };
            match invariant {
                Some(tiles) => {
                    config.with_policy(SplitPolicy::BatchInvariant { split_len: tiles * tile_len })
                }
                None => config,
            }
        },
    )
}

/// Lengths of a batch: 0, 1, 2, both sides of every edge of a tile or split, and anything up to `max_kv_len`.
pub fn batches(limits: &Limits, split: &SplitConfig) -> impl Strategy<Value = Vec<u32>> + use<> {
    let max = limits.max_kv_len.max(1);
    let step = match split.policy {
        SplitPolicy::BatchInvariant { split_len } => split_len,
        SplitPolicy::Throughput => split.tile_len,
    };
    let edges = (1u32..5, 0u32..3).prop_map(move |(n, off)| (n * step + off).saturating_sub(1).min(max));
    // Several tiles of any backend's own (16, 32, 64 or 128 tokens) have edges of their own.
    let inner = (1u32..9, 0u32..3).prop_map(move |(n, off)| (n * 16 + off - 1).min(max));
    prop::collection::vec(
        prop_oneof![0u32..=2.min(max), edges, inner, 0..=max, max / 2..=max],
        1..=limits.max_batch,
    )
}

/// Kinds of data, Gaussian and needles most often.
pub fn data() -> impl Strategy<Value = Data> {
    prop_oneof![2 => Just(Data::Gaussian), 3 => Just(Data::Needle), 5 => select(Data::ALL.to_vec())]
}

/// Window, soft-cap, ALiBi, sinks: each on its own, mostly off.
pub fn masks(limits: &Limits) -> impl Strategy<Value = (Option<u32>, Option<f32>, bool, bool)> + use<> {
    let on = |allowed: bool| prop::bool::weighted(if allowed { 0.25 } else { 0.0 });
    let window = prop_oneof![1u32..4, 1u32..40, 1u32..400];
    (on(limits.window), window, on(limits.soft_cap), 0.5f32..60.0, on(limits.alibi), on(limits.sinks))
        .prop_map(|(has_window, window, has_cap, cap, alibi, sinks)| {
            (has_window.then_some(window), has_cap.then_some(cap), alibi, sinks)
        })
}

/// Whole cases within the limits.
pub fn cases(limits: &Limits) -> impl Strategy<Value = CaseConfig> + use<> {
    let limits = limits.clone();
    let batch_limits = limits.clone();
    let cut = splits(&limits).prop_flat_map(move |split| (Just(split), batches(&batch_limits, &split)));
    let cache = (
        formats(&limits),
        select(limits.layouts.clone()),
        select(limits.page_lens.clone()),
        any::<bool>(),
        any::<bool>(),
    );
    let heads = (select(limits.gqa_groups.clone()), select(limits.q_lens.clone()));
    let types =
        (select(limits.q_types.clone()), select(limits.q_types.clone()), select(limits.out_types.clone()));
    (cache, heads, cut, masks(&limits), types, data(), seeds()).prop_filter_map(
        "no layout of the limits can hold the format",
        move |(cache, (gqa_group, q_len), (split, kv_lens), mask, types, data, seed)| {
            let (format, mut layout, page_len, shuffled, ragged_rows) = cache;
            let [k_group_len, v_group_len] =
                [kv_quant::Side::K, kv_quant::Side::V].map(|s| format.group_len(s));
            if layout == LayoutKind::LightLlm && k_group_len != v_group_len {
                layout = limits.layouts.iter().copied().find(|l| *l != LayoutKind::LightLlm)?;
            }
            let (window, soft_cap, alibi, sinks) = mask;
            // Huge data in f16 would overflow before the kernel sees it.
            let (kv_type, q_type, out_type) = types;
            Some(CaseConfig {
                num_kv_heads: format.num_kv_heads(),
                gqa_group,
                head_dim: format.head_dim(),
                k_group_len,
                v_group_len,
                scale_type: format.scale_type(),
                layout,
                page_len,
                shuffled,
                ragged_rows,
                kv_lens,
                q_len,
                window,
                soft_cap,
                alibi,
                sinks,
                kv_type,
                q_type,
                out_type,
                data,
                split,
                seed,
            })
        },
    )
}
