//! What the measured steps mean for a model of a known shape: tokens a second and users on one GPU.
//!
//! A decode step of a model is `num_layers` of the measured steps and one pass over the weights, both at the measured
//! speeds; everything else (norms, activations, sampling, launch gaps between layers) is left out, so the figures are
//! upper bounds, alike for every cache they are compared with.

use crate::bench::record::{Record, Row};
use std::fmt::Write as _;

/// A model's shape.
struct Model {
    name: &'static str,
    num_layers: f64,
    num_q_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    /// Bytes of bf16 weights that a step reads.
    weight_gb: f64,
}

const MODELS: [Model; 2] = [
    Model {
        name: "Llama-3-8B",
        num_layers: 32.0,
        num_q_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        weight_gb: 15.0,
    },
    Model {
        name: "Qwen2.5-7B",
        num_layers: 28.0,
        num_q_heads: 28,
        num_kv_heads: 4,
        head_dim: 128,
        weight_gb: 14.1,
    },
];

/// Share of a GPU's memory that weights and cache may fill.
const USABLE: f64 = 0.9;

/// Memory of a GPU by a part of its name, in GB (10^9 bytes).
const MEMORY_GB: [(&str, f64); 2] = [("H100", 85.0), ("H200", 150.7)];

/// The table; empty for a GPU whose memory is not known here.
pub fn markdown(record: &Record) -> String {
    let Some((_, memory_gb)) = MEMORY_GB.iter().find(|(name, _)| record.gpu.contains(name)) else {
        return String::new();
    };
    let mut text = String::from(
        "\n#### In a model\n\nbf16 weights; a step is the measured attention of every layer and one pass over the weights, nothing else.\n
| model | users x context | cache | GB of cache | attention ms | step ms | tokens/s | users in memory | bf16 cache: GB, users |
|---|---|---|---|---|---|---|---|---|
",
    );
    let mut lines = 0;
    for model in &MODELS {
        // The variants are at one size; they serve a shape that is measured nowhere else.
        let is_table = |row: &&Row| row.suite != "variants";
        let has_table = record.rows.iter().filter(is_table).any(|row| model.is_shape_of(row));
        let rows = record.rows.iter().filter(|row| model.is_shape_of(row));
        for row in rows.filter(|row| !has_table || is_table(row)) {
            let _ = writeln!(text, "{}", model.line(row, record.read_gb_per_s, *memory_gb));
            lines += 1;
        }
    }
    if lines == 0 { String::new() } else { text }
}

impl Model {
    fn is_shape_of(&self, row: &Row) -> bool {
        let shape = (self.num_q_heads, self.num_kv_heads, self.head_dim);
        (row.num_q_heads, row.num_kv_heads, row.head_dim) == shape
            && ["table", "group128", "variants"].contains(&row.suite.as_str())
            && row.page_len == 16
            && (row.layout == "native" || row.suite == "group128")
            && row.kv_len >= 2048
            // A word more says what is special about the case.
            && row.case.split(' ').count() <= 9
    }

    fn line(&self, row: &Row, read_gb_per_s: f64, memory_gb: f64) -> String {
        let tokens = row.batch as f64 * f64::from(row.kv_len);
        let cache_gb = row.megabytes * self.num_layers / 1e3;
        let bf16_gb = tokens * self.num_layers * f64::from(2 * self.num_kv_heads * self.head_dim) * 2.0 / 1e9;
        let attention_ms = row.microseconds * self.num_layers / 1e3;
        let step_ms = attention_ms + 1e3 * self.weight_gb / read_gb_per_s;
        let room_gb = USABLE * memory_gb - self.weight_gb;
        let users = |gb: f64| (room_gb / (gb / row.batch as f64)).floor();
        let fits = if cache_gb <= room_gb { "" } else { " (more than fits)" };
        format!(
            "| {} | {} x {} | int8 g{} | {cache_gb:.1}{fits} | {attention_ms:.1} | {step_ms:.1} | {:.0} | {:.0} | {bf16_gb:.1}, {:.0} |",
            self.name,
            row.batch,
            row.kv_len,
            row.group_len,
            1e3 * row.batch as f64 / step_ms,
            users(cache_gb),
            users(bf16_gb),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::record;

    #[test]
    fn users_follow_from_bytes() {
        let text = markdown(&record());
        // 128 x 8192 tokens x 32 layers x 2560 B = 85.9 GB, which one H100 does not hold; one user's 0.671 GB fit 91 times.
        let line = text.lines().find(|line| line.contains("128 x 8192")).unwrap();
        assert!(line.contains("| 85.9 (more than fits) |"), "{line}");
        assert!(line.contains("| 91 | 137.4, 57 |"), "{line}");
    }

    #[test]
    fn an_unknown_gpu_has_no_table() {
        assert_eq!(markdown(&Record { gpu: "Some GPU".to_owned(), ..record() }), "");
    }
}
