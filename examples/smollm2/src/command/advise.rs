//! `advise`: what INT8 would cost each layer and head of the model, and which format fits a budget.

use super::{ModelArgs, scale_type};
use crate::accuracy::record;
use crate::matrix::Products;
use anyhow::{Context, Result, ensure};
use kv_quant::{Advice, AdviceOptions, HeadReport, LayerSample, Side, advise};
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
    /// Print JSON
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
    writeln!(
        out,
        "{} tokens; the worst head of each layer; errors relative, budget {}",
        tokens.len(),
        args.budget
    )?;
    writeln!(out, "{}", table(&advice))?;
    print_outliers(&mut out, &advice)?;
    match &advice.format {
        Some(format) => writeln!(out, "recommended: {format}, {} bytes a token", advice.bytes_per_token)?,
        None => writeln!(out, "recommended: no INT8 format fits the budget")?,
    }
    if !advice.unquantized_layers.is_empty() && advice.format.is_some() {
        writeln!(out, "leave in f16: layers {:?}", advice.unquantized_layers)?;
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
    let rotated = advice.layers.iter().enumerate().filter(|(_, l)| l.k_group_len_rotated > l.k_group_len);
    let rotated: Vec<_> = rotated.map(|(i, _)| i).collect();
    if !rotated.is_empty() {
        writeln!(out, "rotating q and K would allow longer groups in layers {rotated:?}")?;
    }
    Ok(())
}

fn worst(heads: &[HeadReport], side: Side, group: usize) -> f64 {
    let errors = heads.iter().filter(|h| h.side == side).filter_map(|h| h.errors.get(group));
    errors.map(|e| e.error).fold(0.0, f64::max)
}

fn table(advice: &Advice) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let lens: Vec<u32> = advice
        .layers
        .first()
        .and_then(|layer| layer.heads.first())
        .map(|head| head.errors.iter().map(|e| e.group_len).collect())
        .unwrap_or_default();
    let mut header = vec!["layer".to_owned(), "K amax".to_owned()];
    header.extend(lens.iter().map(|len| format!("K g{len}")));
    header.extend(lens.iter().map(|len| format!("V g{len}")));
    header.extend(["K drowned".to_owned(), "fits K".to_owned(), "fits V".to_owned()]);
    table.set_header(header);
    for (i, layer) in advice.layers.iter().enumerate() {
        let of_k = || layer.heads.iter().filter(|h| h.side == Side::K);
        let mut row = vec![i.to_string(), format!("{:.1}", of_k().map(|h| h.amax).fold(0.0, f32::max))];
        for side in [Side::K, Side::V] {
            row.extend((0..lens.len()).map(|g| format!("{:.2} %", 100.0 * worst(&layer.heads, side, g))));
        }
        let drowned = of_k().filter_map(|h| h.errors.last()).map(|e| e.drowned).fold(0.0, f64::max);
        let fits = |len: Option<u32>| len.map_or("none".to_owned(), |len| format!("g{len}"));
        row.extend([format!("{:.1} %", 100.0 * drowned), fits(layer.k_group_len), fits(layer.v_group_len)]);
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
            writeln!(
                out,
                "layer {i} {} head {}: outlier channels {}",
                head.side,
                head.head,
                channels.join(", ")
            )?;
        }
    }
    Ok(())
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
        "format": advice.format.map(|f| f.to_string()),
        "unquantized_layers": advice.unquantized_layers,
        "bytes_per_token": advice.bytes_per_token,
        "layers": layers,
    })
}
