//! One profile of a made-up GPU.
#![allow(dead_code, reason = "each test binary uses a part")]

use attn_plan::{SplitConfig, SplitPolicy};
use attn_tune::{Level, Machine, Shape, Source, StaticKey, Tuner};

pub const PROFILE: &str = include_str!("../data/a-gpu.toml");

pub fn machine() -> Machine {
    Machine {
        device: "A GPU".to_owned(),
        arch: "sm_90".to_owned(),
        build: "0123456789ab".to_owned(),
        num_sms: 132,
        l2_bytes: 50 << 20,
        read_gb_per_s: 3000.0,
    }
}

pub fn shape() -> Shape {
    Shape {
        blocks_per_sm: 3,
        max_heads_per_block: 4,
        row_blocks: 1,
        row_bytes: 320,
        most_shares: 16,
        share_blocks_per_sm: 0,
        share_warps: 0,
    }
}

pub fn source(text: &str) -> Source {
    Source { file: "a-gpu.toml".into(), text: text.to_owned() }
}

pub fn tuner(text: &str) -> Tuner {
    Tuner::from_sources(machine(), Level::Profiles, [&source(text)])
}

pub fn key(name: &str) -> StaticKey {
    name.parse().unwrap_or_else(|error| panic!("{error}"))
}

/// A split without the numbers that only deal items out to workers: what is left, fields to come included, changes bits.
pub fn what_changes_bits(split: &SplitConfig) -> SplitConfig {
    let item_tiles = match split.policy {
        SplitPolicy::Throughput => split.item_tiles,
        // Whether each item has a worker of its own; which items there are, the policy says.
        SplitPolicy::BatchInvariant { .. } => 0,
    };
    SplitConfig { num_workers: 1, item_overhead: 0, min_split_tiles: 1, item_tiles, ..*split }
}
