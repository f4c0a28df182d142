//! `agree`: whether backends agree on the steps of a real decode, to the a-priori bound.

use super::{CacheArgs, ModelArgs};
use crate::agreement::{Agreement, Recording, Subject, compare};
use crate::matrix::Products;
use anyhow::{Context, Result, bail, ensure};
use attn_backend::{BackendId, Registry};
use cpu_reference::Isa;
use indicatif::ProgressBar;
use std::io::Write;
use std::path::PathBuf;

/// Runs q, K and V of a real decode through the CPU backend, its other instruction sets, and the CUDA backend if it is built
/// in, and holds every step of every layer to the a-priori bound.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Plain text that the decode goes on from
    #[arg(long, value_name = "PATH", default_value = "/usr/share/common-licenses/GPL-3")]
    text: PathBuf,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 384)]
    tokens: usize,
    /// Tokens that are decoded after it
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Record the decode into a file, for a machine without the model, and stop
    #[arg(long, value_name = "PATH")]
    record: Option<PathBuf>,
    /// Take the decode from such a file
    #[arg(long, value_name = "PATH", conflicts_with = "record")]
    replay: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let kind = args.cache.kind()?;
    let recording = match &args.replay {
        Some(path) => Recording::load(path)?,
        None => {
            let (model, vocabulary) = args.model.load(Products::Exact)?;
            let text = std::fs::read_to_string(&args.text).with_context(|| {
                format!("cannot read {}; name a text with --text PATH", args.text.display())
            })?;
            let mut prompt = vocabulary.encode(&text)?;
            prompt.truncate(args.tokens);
            Recording::of_decode(&model, kind, args.cache.rotates_keys(), &prompt, args.steps)?
        }
    };
    if let Some(path) = &args.record {
        return recording.save(path);
    }
    let mut subjects = vec![Subject::Backend(BackendId::CPU)];
    // The best one is what the backend runs on.
    subjects.extend(Isa::available().into_iter().filter(|isa| *isa != Isa::best()).map(Subject::Isa));
    let others = Registry::builtin().backend_ids().into_iter().filter(|id| *id != BackendId::CPU);
    let others: Vec<_> = others.filter(|id| args.model.backend().is_none_or(|named| named == *id)).collect();
    if let Some(named) = args.model.backend().filter(|named| *named != BackendId::CPU) {
        ensure!(others.contains(&named), "no backend is called {named}, or it is not built in");
    }
    subjects.extend(others.into_iter().map(Subject::Backend));
    let bar = ProgressBar::new(recording.layers.len() as u64);
    let found = compare(&recording, kind, &subjects, || bar.inc(1))?;
    bar.finish_and_clear();
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?;
    } else {
        writeln!(out, "{}", table(&found))?;
    }
    let wrong: Vec<_> = found.iter().filter(|f| !f.is_right()).map(|f| f.subject.as_str()).collect();
    if !wrong.is_empty() {
        bail!("beyond the bound, or other bytes stored than by cpu: {}", wrong.join(", "));
    }
    Ok(())
}

fn table(found: &[Agreement]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header([
        "backend",
        "steps",
        "values",
        "beyond the bound",
        "worst share of the bound",
        "at layer, step",
        "largest difference from cpu",
        "other bytes",
    ]);
    for found in found {
        table.add_row([
            found.subject.clone(),
            found.steps.to_string(),
            found.elements.to_string(),
            found.beyond.to_string(),
            format!("{:.3}", found.worst_share),
            format!("{}, {}", found.worst_at.0, found.worst_at.1),
            format!("{:.1e}", found.largest_difference),
            found.other_bytes.to_string(),
        ]);
    }
    table.to_string()
}
