//! The demo's report as people read it.

use super::fixture::Fixture;
use super::{Report, Row};
use attn_backend::Selection;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

/// What was run, the table, and how to read it.
pub fn render(fixture: &Fixture, selection: &Selection, report: &Report) -> String {
    let Fixture { num_tokens, num_steps, num_q_heads, num_kv_heads, head_dim, .. } = fixture;
    let refused: String = report
        .refused
        .iter()
        .map(|refused| format!("    not {}: {}\n", refused.backend, refused.reason))
        .collect();
    let share = report.rows.iter().map(|row| row.share_of_bound).fold(0.0, f64::max);
    format!(
        "\
{num_tokens} tokens of text, the last {num_steps} decoded one at a time; {num_q_heads} query heads, \
{num_kv_heads} kv heads, head_dim {head_dim}
first row: {}
backend: {} on {}
{refused}{}
bytes: K and V of one token in one layer, scales and padding included.
errors: relative L2 over all steps, worst head. Quantization: oracle over the INT8 cache against oracle
    over the f16 data. Arithmetic: backend against oracle, both over the INT8 cache.
    Every output element is within its a-priori bound; the nearest is at {:.1} % of it.
step: append one token, plan, decode; median of {num_steps}.
",
        selection.descriptor(),
        selection.backend,
        selection.device,
        table(&report.rows),
        100.0 * share,
    )
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
