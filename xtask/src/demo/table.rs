//! The demo's report for people.

use super::fixture::Fixture;
use super::{Report, Row};
use attn_backend::Selection;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

/// Prints what was run, the table, and how to read it.
pub fn print(fixture: &Fixture, selection: &Selection, report: &Report) {
    println!(
        "{} tokens of text, the last {} decoded one at a time; {} query heads, {} kv heads, head_dim {}",
        fixture.num_tokens, fixture.num_steps, fixture.num_q_heads, fixture.num_kv_heads, fixture.head_dim
    );
    println!("{}", selection.descriptor());
    println!("backend: {} on {}", selection.backend, selection.device);
    for refused in &report.refused {
        println!("    not {}: {}", refused.backend, refused.reason);
    }
    println!("{}", table(&report.rows));
    println!("bytes: K and V of one token in one layer, scales and padding included.");
    println!(
        "errors: relative L2 over all steps, worst head. Quantization: oracle over the INT8 cache against oracle"
    );
    println!("    over the f16 data. Arithmetic: backend against oracle, both over the INT8 cache.");
    println!("step: append one token, plan, decode; median of {}.", fixture.num_steps);
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "layer",
        "group",
        "bytes/token",
        "f16",
        "share",
        "quantization error",
        "head",
        "arithmetic error",
        "us/step",
    ]);
    for row in rows {
        table.add_row([
            row.layer.to_string(),
            row.group_len.to_string(),
            row.bytes_per_token.to_string(),
            row.bytes_per_token_f16.to_string(),
            format!("{:.1} %", 100.0 * row.bytes_per_token / row.bytes_per_token_f16),
            format!("{:.3} %", 100.0 * row.quantization_error),
            row.worst_quantized_head.to_string(),
            format!("{:.1e}", row.arithmetic_error),
            format!("{:.0}", row.microseconds_per_step),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
