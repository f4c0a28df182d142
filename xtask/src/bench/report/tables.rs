//! A record's tables.

use crate::bench::record::{Record, Row};
use std::fmt::Write as _;

/// Suites in the order of the report, with their headings.
const SUITES: [(&str, &str); 7] = [
    ("table", "32 query and 8 kv heads, head_dim 128, groups of 8"),
    ("group128", "Groups of 128"),
    ("grid", "LightLLM's tuning grid: 4 query heads, 1 kv head"),
    ("variants", "Other shapes, groups, types and masks, at equal bytes unless the name says otherwise"),
    ("ragged", "Ragged batches: log-normal lengths; the longest is named"),
    ("invariant", "What bits that do not depend on neighbours cost"),
    ("append", "Append; copy-only is the copy bandwidth"),
];

/// All tables.
pub fn markdown(record: &Record) -> String {
    let Record { gpu, driver, commit, read_gb_per_s, copy_gb_per_s, rows } = record;
    let mut text = format!(
        "### {gpu}\n\nCUDA {driver}, commit {commit}; streaming read {read_gb_per_s:.0} GB/s, copy {copy_gb_per_s:.0} GB/s in the same run.\n"
    );
    for (suite, heading) in SUITES {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.suite == suite).collect();
        if rows.is_empty() {
            continue;
        }
        // Writing to a string cannot fail.
        let _ = write!(text, "\n#### {heading}\n\n{HEAD}");
        for row in &rows {
            let _ = writeln!(text, "{}", line(row));
        }
        let triton: Vec<f64> = rows
            .iter()
            .flat_map(|row| &row.ratio_to)
            .filter(|(system, _)| system.starts_with("LightLLM"))
            .map(|(_, ratio)| *ratio)
            .collect();
        if !triton.is_empty() {
            let least = triton.iter().copied().fold(f64::MAX, f64::min);
            let mean = (triton.iter().map(|ratio| ratio.ln()).sum::<f64>() / triton.len() as f64).exp();
            let _ = writeln!(
                text,
                "\nAgainst LightLLM's Triton kernel over {} points: {least:.2}x at least, {mean:.2}x in the geometric mean.",
                triton.len()
            );
        }
    }
    text
}

const HEAD: &str = "| case | layout | page | MB | us | GB/s | of read | of copy-only | error | fastest peer |
|---|---|---|---|---|---|---|---|---|---|
";

fn line(row: &Row) -> String {
    let peer = row.ratio_to.iter().min_by(|a, b| a.1.total_cmp(b.1));
    let peer = peer.map_or("-".to_owned(), |(system, ratio)| format!("{ratio:.2}x {system}"));
    let error = row.relative_error.map_or("-".to_owned(), |error| format!("{error:.1e}"));
    let share = row.share_of_copy_only.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
    // What the other columns do not say of a case stands in its name behind the layout.
    let size = row.case.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let name = if row.suite == "table" || row.suite == "grid" { size } else { row.case.clone() };
    format!(
        "| {name} | {} | {} | {:.1} | {:.1} | {:.0} | {:.1} % | {share} | {error} | {peer} |",
        row.layout,
        row.page_len,
        row.megabytes,
        row.microseconds,
        row.gb_per_s,
        100.0 * row.share_of_read,
    )
}
