//! The shape of a benchmark's record: what is printed as JSON and kept in `benches/record/`.
#![cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "benchmarks of devices record; others print"))]

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One run on one device.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    pub gpu: String,
    pub driver: String,
    pub commit: String,
    pub read_gb_per_s: f64,
    pub copy_gb_per_s: f64,
    pub rows: Vec<Row>,
}

/// One case. Times are medians over graph replays, per launch; `gb_per_s` counts codes and scales once.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub suite: String,
    pub case: String,
    pub layout: String,
    pub page_len: u32,
    pub group_len: u32,
    pub num_q_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub batch: usize,
    /// The longest request; all are alike unless the case says ragged.
    pub kv_len: u32,
    pub megabytes: f64,
    pub microseconds: f64,
    pub p10_microseconds: f64,
    pub p90_microseconds: f64,
    pub gb_per_s: f64,
    pub share_of_read: f64,
    /// The reader of the same rows; nothing where there is none for the scale type.
    pub copy_only_microseconds: Option<f64>,
    pub share_of_copy_only: Option<f64>,
    /// Relative L2 error of the first request's output against the f64 oracle on the same dequantized cache.
    pub relative_error: Option<f64>,
    pub plan: String,
    pub ratio_to: BTreeMap<String, f64>,
}

/// Median, 10th and 90th percentile.
pub fn quantiles(samples: &mut [f64]) -> (f64, f64, f64) {
    samples.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let idx = (share * (samples.len().saturating_sub(1)) as f64).round() as usize;
        samples.get(idx).copied().unwrap_or(f64::NAN)
    };
    (at(0.5), at(0.1), at(0.9))
}

/// The peers' measured times: `(system, microseconds)` of one GPU, head shape, batch and length.
pub fn peers(
    gpu: &str,
    num_q_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    batch: usize,
    kv_len: u32,
) -> BTreeMap<String, f64> {
    let shape = format!("{num_q_heads},{num_kv_heads},{head_dim},{batch},{kv_len}");
    include_str!("../../../benches/peers.csv")
        .lines()
        .filter_map(|line| {
            let (of_gpu, rest) = line.split_once(',')?;
            let (rest, microseconds) = rest.rsplit_once(',')?;
            let system = rest.strip_suffix(&shape)?.strip_suffix(',')?;
            let fits = gpu.contains(of_gpu);
            fits.then(|| microseconds.parse().ok().map(|us| (system.to_owned(), us))).flatten()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_found_by_gpu_and_shape() {
        let found = peers("NVIDIA H200", 32, 8, 128, 128, 8192);
        assert_eq!(found.get("LightLLM Triton int8 g8 (bf16 scales)"), Some(&1269.3));
        assert!(found.len() >= 6, "{found:?}");
        assert!(peers("NVIDIA A100", 32, 8, 128, 128, 8192).is_empty());
    }

    #[test]
    fn quantiles_are_of_the_sorted_samples() {
        let mut samples: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantiles(&mut samples), (50.0, 10.0, 90.0));
    }
}
