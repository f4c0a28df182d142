//! `advise`: what INT8 would cost each layer and head of the model, and which format fits a budget.

use super::{ModelArgs, scale_type};
use crate::accuracy::record;
use crate::matrix::Products;
use anyhow::{Context, Result, ensure};
use kv_quant::{Advice, AdviceOptions, GroupError, HeadReport, LayerSample, Recommendation, Side, advise};
use std::io::Write;
use std::path::PathBuf;

/// Samples K and V of the model and recommends group lengths, and layers to leave unquantized.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Plain text to sample with [default: GPL-3 of /usr/share/common-licenses]
    #[arg(long, value_name = "PATH", default_value = "/usr/share/common-licenses/GPL-3")]
    text: PathBuf,
    /// Tokens of the sample
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// The largest relative error of a head: of logits for K, of values for V
    #[arg(long, default_value_t = 0.02)]
    budget: f64,
    /// Scale type: f16, bf16 or f32
    #[arg(long, default_value = "f16")]
    scale_type: String,
    /// A channel is an outlier from this many times the median channel's magnitude
    #[arg(long, default_value_t = 8.0)]
    outlier_ratio: f32,
    /// A row for each head instead of the worst head of each layer
    #[arg(long)]
    heads: bool,
    /// Print JSON: every head, its errors, saturation and outlier channels
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Queries of this many tokens are enough to weigh directions by.
const QUERY_TOKENS: usize = 32;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let (model, vocabulary) = args.model.load(Products::Exact)?;
    let text = std::fs::read_to_string(&args.text)
        .with_context(|| format!("cannot read {}; name a text with --text PATH", args.text.display()))?;
    let mut tokens = vocabulary.encode(&text)?;
    tokens.truncate(args.tokens);
    ensure!(tokens.len() >= 16, "a sample of {} tokens; 16 are the least", tokens.len());
    let recorded = record(&model, &tokens)?;
    let config = model.config();
    let options = AdviceOptions {
        scale_type: scale_type(&args.scale_type)?,
        budget: args.budget,
        outlier_ratio: args.outlier_ratio,
        ..AdviceOptions::new(config.num_kv_heads as u32, config.head_dim as u32)
    };
    let q_row = config.num_q_heads * config.head_dim;
    let samples: Vec<_> = recorded
        .iter()
        .map(|r| {
            // The latest tokens see the most.
            let first = (r.q.len() / q_row).saturating_sub(QUERY_TOKENS) * q_row;
            LayerSample { k: &r.k, v: &r.v, q: r.q.get(first..) }
        })
        .collect();
    let options = AdviceOptions { num_q_heads: config.num_q_heads as u32, ..options };
    let advice = advise(&samples, &options)?;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&json(&advice))?)?;
        return Ok(());
    }
    let (len, budget) = (tokens.len(), args.budget);
    let table = match args.heads {
        true => {
            writeln!(out, "{len} tokens; every head; errors relative, budget {budget}")?;
            head_table(&advice)
        }
        false => {
            writeln!(out, "{len} tokens; the worst head of each layer; errors relative, budget {budget}")?;
            layer_table(&advice)
        }
    };
    writeln!(out, "{table}")?;
    print_outliers(&mut out, &advice)?;
    for (how, recommended) in [("q and K rotated", &advice.rotated), ("q and K as they are", &advice.plain)] {
        let Some(format) = &recommended.format else {
            writeln!(out, "recommended with {how}: no INT8 format fits the budget")?;
            continue;
        };
        let bytes = recommended.bytes_per_token;
        write!(out, "recommended with {how}: {format}, {bytes} bytes a token")?;
        match recommended.unquantized_layers.as_slice() {
            [] => writeln!(out)?,
            layers => writeln!(out, ", layers {layers:?} in f16")?,
        }
    }
    let mended: Vec<_> = advice
        .layers
        .iter()
        .enumerate()
        .filter(|(_, l)| l.k_group_len_with_offset > l.k_group_len)
        .map(|(i, _)| i)
        .collect();
    if !mended.is_empty() {
        writeln!(out, "a K offset would allow longer groups in layers {mended:?}")?;
    }
    Ok(())
}

fn worst(heads: &[HeadReport], side: Side, group: usize) -> f64 {
    let errors = heads.iter().filter(|h| h.side == side).filter_map(|h| h.errors.get(group));
    errors.map(|e| e.error).fold(0.0, f64::max)
}

fn group_lens(advice: &Advice) -> Vec<u32> {
    let head = advice.layers.first().and_then(|layer| layer.heads.first());
    head.map(|head| head.errors.iter().map(|e| e.group_len).collect()).unwrap_or_default()
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// Saturation and drowned values at one scale a head, where they are worst.
fn head_table(advice: &Advice) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let mut header = vec!["layer".to_owned(), "head".to_owned(), "amax".to_owned()];
    let lens = group_lens(advice);
    header.extend(lens.iter().map(|len| format!("g{len}")));
    header.extend(lens.last().map(|len| format!("g{len} rotated")));
    header.extend(["saturated", "drowned", "outliers"].map(str::to_owned));
    table.set_header(header);
    for (i, layer) in advice.layers.iter().enumerate() {
        for head in &layer.heads {
            let mut row =
                vec![i.to_string(), format!("{} {}", head.side, head.head), format!("{:.1}", head.amax)];
            row.extend(head.errors.iter().map(|e| percent(e.error)));
            if let Some(whole) = head.errors.last() {
                row.extend([whole.error_rotated, whole.saturated, whole.drowned].map(percent));
            }
            row.push(head.outliers.len().to_string());
            table.add_row(row);
        }
    }
    table.to_string()
}

fn layer_table(advice: &Advice) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let lens = group_lens(advice);
    let mut header = vec!["layer".to_owned(), "K amax".to_owned()];
    header.extend(lens.iter().map(|len| format!("K g{len}")));
    header.extend(lens.iter().map(|len| format!("V g{len}")));
    let fits = ["K saturated", "K drowned", "fits K", "K rotated", "fits V"];
    header.extend(fits.map(str::to_owned));
    table.set_header(header);
    for (i, layer) in advice.layers.iter().enumerate() {
        let of_k = || layer.heads.iter().filter(|h| h.side == Side::K);
        let mut row = vec![i.to_string(), format!("{:.1}", of_k().map(|h| h.amax).fold(0.0, f32::max))];
        for side in [Side::K, Side::V] {
            row.extend((0..lens.len()).map(|g| percent(worst(&layer.heads, side, g))));
        }
        let most =
            |of: fn(&GroupError) -> f64| of_k().filter_map(|h| h.errors.last()).map(of).fold(0.0, f64::max);
        row.extend([percent(most(|e| e.saturated)), percent(most(|e| e.drowned))]);
        let fits = |len: Option<u32>| len.map_or("none".to_owned(), |len| format!("g{len}"));
        row.extend([layer.k_group_len, layer.k_group_len_rotated, layer.v_group_len].map(fits));
        table.add_row(row);
    }
    table.to_string()
}

fn print_outliers(out: &mut impl Write, advice: &Advice) -> Result<()> {
    for (i, layer) in advice.layers.iter().enumerate() {
        for head in layer.heads.iter().filter(|h| !h.outliers.is_empty()) {
            let channels: Vec<_> = head
                .outliers
                .iter()
                .map(|o| {
                    format!("{} (x{:.0}, {:.0} % constant)", o.channel, o.ratio, 100.0 * o.constant_share)
                })
                .collect();
            let (side, number, channels) = (head.side, head.head, channels.join(", "));
            writeln!(out, "layer {i} {side} head {number}: outlier channels {channels}")?;
            if head.has_key_bias() {
                writeln!(
                    out,
                    "  a key bias: long groups collapse here, subtract an offset (kv_quant::KeyOffset)"
                )?;
            }
        }
    }
    Ok(())
}

fn recommendation(recommended: &Recommendation) -> serde_json::Value {
    serde_json::json!({
        "format": recommended.format.map(|f| f.to_string()),
        "unquantized_layers": recommended.unquantized_layers,
        "bytes_per_token": recommended.bytes_per_token,
    })
}

fn json(advice: &Advice) -> serde_json::Value {
    let head = |h: &HeadReport| {
        let errors: Vec<_> = h
            .errors
            .iter()
            .map(|e| {
                serde_json::json!({ "group_len": e.group_len, "error": e.error, "error_with_offset": e.error_with_offset, "error_rotated": e.error_rotated,
                    "saturated": e.saturated, "drowned": e.drowned })
            })
            .collect();
        let outliers: Vec<_> = h
            .outliers
            .iter()
            .map(|o| serde_json::json!({ "channel": o.channel, "ratio": o.ratio, "constant_share": o.constant_share }))
            .collect();
        serde_json::json!({ "side": h.side.to_string(), "head": h.head, "amax": h.amax, "errors": errors, "outliers": outliers })
    };
    let layers: Vec<_> = advice
        .layers
        .iter()
        .map(|l| {
            serde_json::json!({ "k_group_len": l.k_group_len, "v_group_len": l.v_group_len,
                "k_group_len_with_offset": l.k_group_len_with_offset, "k_group_len_rotated": l.k_group_len_rotated, "heads": l.heads.iter().map(head).collect::<Vec<_>>() })
        })
        .collect();
    serde_json::json!({
        "plain": recommendation(&advice.plain),
        "rotated": recommendation(&advice.rotated),
        "layers": layers,
    })
}
