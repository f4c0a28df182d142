//! `cargo xtask demo`: real keys, values and queries of a language model, decoded step by step over an INT8 cache.
//!
//! Two errors are told apart. The quantization error is what INT8 costs: the oracle over the cache's content against the
//! oracle over the original f16 data. The arithmetic error is what the backend costs: its output against the oracle over
//! the same cache.

mod decode;
mod fixture;
mod plot;
mod table;

use crate::workspace;
use anyhow::Context;
use attn_backend::{BackendId, Descriptor, Registry, SelectOptions, Selection, select};
use fixture::{Fixture, Layer};
use indicatif::{ProgressBar, ProgressStyle};
use kv_quant::LayoutKind;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Group lengths that are shown unless one is named.
const GROUP_LENS: [u32; 4] = [8, 16, 32, 64];
const FIXTURE: &str = "tests/fixtures/smollm2_gpl3_layers.safetensors";

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Args {
    /// Backend by name, e.g. cpu; otherwise the best that passes its trial.
    #[arg(long)]
    backend: Option<String>,
    /// How the cache lies in memory.
    #[arg(long, value_enum, default_value_t = Layout::Hnd)]
    layout: Layout,
    /// Channels that share a scale; otherwise 8, 16, 32 and 64.
    #[arg(long, value_name = "CHANNELS")]
    group_len: Option<u32>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
    /// Draw the quantization error by layer and group length.
    #[arg(long, value_name = "FILE.svg", value_parser = svg_path)]
    plot: Option<PathBuf>,
}

fn svg_path(name: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(name);
    let is_svg = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    is_svg.then_some(path).ok_or("valid: a file name that ends in .svg")
}

/// Names of the layouts on the command line.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Layout {
    /// One record of codes and scales a token-head, padded to 16 bytes
    Native,
    /// Pages of `[kv_head, slot, channel]`
    Hnd,
    /// Pages of `[slot, kv_head, channel]`
    Nhd,
    /// Token-major buffers `[slot, 2 * kv_heads, channel]`
    Lightllm,
}

impl Layout {
    fn kind(self) -> LayoutKind {
        match self {
            Layout::Native => LayoutKind::Native,
            Layout::Hnd => LayoutKind::Hnd,
            Layout::Nhd => LayoutKind::Nhd,
            Layout::Lightllm => LayoutKind::LightLlm,
        }
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    backend: String,
    refused: Vec<Refused>,
    rows: Vec<Row>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Refused {
    backend: String,
    reason: String,
}

/// One layer at one group length.
#[derive(Debug, Serialize)]
struct Row {
    layer: u32,
    group_len: u32,
    /// Codes, scales and padding of K and V of all heads of this layer.
    bytes_per_token: f64,
    /// The same token in f16.
    bytes_per_token_f16: f64,
    /// Relative L2, worst head.
    quantization_error: f64,
    /// Relative L2, worst head.
    arithmetic_error: f64,
    /// Append, plan and decode; median over the steps.
    microseconds_per_step: f64,
    #[serde(skip)]
    worst_quantized_head: u32,
    /// Largest error of an output element as a share of its a-priori bound.
    #[serde(skip)]
    share_of_bound: f64,
}

/// Runs the demo and prints its report.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let fixture = Fixture::load(&workspace::root().join(FIXTURE))?;
    let group_lens = args.group_len.map_or(GROUP_LENS.to_vec(), |group_len| vec![group_len]);
    let options =
        SelectOptions { backend: args.backend.clone().map(BackendId::named), ..SelectOptions::default() };
    let total = group_lens.len() * fixture.layers.len() * fixture.num_steps;
    // Drawn on stderr, and only if that is a terminal.
    let bar = ProgressBar::new(total as u64)
        .with_style(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} steps")?);
    let mut selections = Vec::new();
    let mut rows = Vec::new();
    for group_len in group_lens {
        let layout = decode::layout(&fixture, args.layout.kind(), group_len)?;
        let descriptor = Descriptor::new(layout, decode::spec(&fixture));
        let selection = select(&Registry::builtin(), &descriptor, &options)?;
        for layer in &fixture.layers {
            bar.set_message(format!("layer {} group {group_len}", layer.layer));
            rows.push(measure(&fixture, layer, group_len, &selection, &bar)?);
        }
        selections.push(selection);
    }
    bar.finish_and_clear();
    rows.sort_by_key(|row| (row.layer, row.group_len));
    let first = selections.first().context("no group length")?;
    let refused = first
        .refused
        .iter()
        .map(|(backend, reason)| Refused { backend: backend.to_string(), reason: reason.to_string() });
    let report = Report { backend: first.backend.to_string(), refused: refused.collect(), rows };
    if let Some(path) = &args.plot {
        plot::draw(path, &report.rows)?;
        eprintln!("drew {}", path.display());
    }
    let text = if args.json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        table::render(&fixture, first, &report)
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads (`| head`) has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

fn measure(
    fixture: &Fixture,
    layer: &Layer,
    group_len: u32,
    selection: &Selection,
    bar: &ProgressBar,
) -> anyhow::Result<Row> {
    let layout = &selection.descriptor().layout;
    let mut decoded = decode::decode(fixture, layer, selection, || bar.inc(1))?;
    let original = decode::oracle_on_original(fixture, layer)?;
    let cached = decode::oracle_on_cache(fixture, layer, layout, &decoded)?;
    let out: Vec<f64> = decoded.out.iter().map(|&x| f64::from(x)).collect();
    let (worst_quantized_head, quantization_error) = decode::worst_head(fixture, &cached.out, &original.out);
    let share_of_bound = decode::share_of_bound(fixture, selection, &decoded, &cached);
    anyhow::ensure!(
        share_of_bound <= 1.0,
        "layer {}, group_len {group_len}: backend {} is beyond the bound of its arithmetic",
        layer.layer,
        selection.backend
    );
    let (_, arithmetic_error) = decode::worst_head(fixture, &out, &cached.out);
    Ok(Row {
        layer: layer.layer,
        group_len,
        bytes_per_token: layout.bytes_per_page() as f64 / f64::from(layout.page_len()),
        bytes_per_token_f16: (2 * fixture.kv_row() * size_of::<half::f16>()) as f64,
        quantization_error,
        arithmetic_error,
        microseconds_per_step: median(&mut decoded.steps).as_secs_f64() * 1e6,
        worst_quantized_head,
        share_of_bound,
    })
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(value: &serde_json::Value) -> Vec<&str> {
        value.as_object().unwrap().keys().map(String::as_str).collect()
    }

    /// The whole way for one layer, and what `--json` promises.
    #[test]
    fn one_row_from_the_fixture_to_json() {
        let fixture = Fixture::load(&workspace::root().join(FIXTURE)).unwrap();
        assert_eq!(fixture.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [0, 14, 29]);
        let layout = decode::layout(&fixture, LayoutKind::LightLlm, 64).unwrap();
        let descriptor = Descriptor::new(layout, decode::spec(&fixture));
        let options = SelectOptions::named(BackendId::CPU);
        let selection = select(&Registry::builtin(), &descriptor, &options).unwrap();
        let row = measure(&fixture, &fixture.layers[0], 64, &selection, &ProgressBar::hidden()).unwrap();
        assert_eq!((row.bytes_per_token, row.bytes_per_token_f16), (396.0, 768.0));
        assert!(row.arithmetic_error < row.quantization_error);

        let refused = vec![Refused { backend: "cuda".to_owned(), reason: "unavailable".to_owned() }];
        let report = Report { backend: "cpu".to_owned(), refused, rows: vec![row] };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(keys(&json), ["backend", "refused", "rows"]);
        assert_eq!(keys(&json["refused"][0]), ["backend", "reason"]);
        let mut row = keys(&json["rows"][0]);
        row.sort_unstable();
        assert_eq!(
            row,
            [
                "arithmetic_error",
                "bytes_per_token",
                "bytes_per_token_f16",
                "group_len",
                "layer",
                "microseconds_per_step",
                "quantization_error"
            ]
        );
        assert!(table::render(&fixture, &selection, &report).contains("not cuda: unavailable"));
    }

    #[test]
    fn a_plot_is_an_svg_file() {
        assert!(svg_path("error.svg").is_ok());
        assert_eq!(svg_path("error.png"), Err("valid: a file name that ends in .svg"));
    }
}
