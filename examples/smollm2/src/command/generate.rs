//! `generate`: text from prompts, streamed, with the figures of the run.

use super::{CacheArgs, ModelArgs};
use crate::cache::{CacheOptions, ModelCache, PAGE_LEN};
use crate::calibration::Calibration;
use crate::generate::{Event, Order, Report, generate};
use crate::matrix::Products;
use crate::sample::Sampling;
use crate::transform::SmoothKeys;
use anyhow::{Result, ensure};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Generates text from one or more prompts.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Prompts; several run as one batch and share the cache of their common beginning
    #[arg(required = true)]
    prompts: Vec<String>,
    /// New tokens at most, a prompt
    #[arg(long, short = 'n', default_value_t = 64)]
    max_tokens: usize,
    /// Requests that run at once
    #[arg(long, default_value_t = 16)]
    max_batch: usize,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Draw from the likeliest tokens that make up this share
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Wrap each prompt as a question to the assistant
    #[arg(long)]
    chat: bool,
    /// Multiply in f32 where quantized products are the faster ones, as measurements do
    #[arg(long)]
    exact: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    model: ModelArgs,
}

fn as_chat(prompt: &str) -> String {
    format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.max_tokens > 0, "--max-tokens 0 asks for nothing");
    let kind = args.cache.kind()?;
    let (model, vocabulary) =
        args.model.load(if args.exact { Products::Exact } else { Products::Quantized })?;
    let prompts: Vec<_> = match args.chat {
        true => args.prompts.iter().map(|p| as_chat(p)).collect(),
        false => args.prompts.clone(),
    };
    let (mut num_tokens, mut num_positions) = (0, 0);
    for prompt in &prompts {
        let len = vocabulary.encode(prompt)?.len() + args.max_tokens;
        // A page more each, for the part of a page that is not shared.
        num_tokens += len + PAGE_LEN as usize;
        num_positions = num_positions.max(len as u32);
    }
    let options = CacheOptions {
        kind,
        f16_layers: args.cache.f16_layers.clone(),
        num_tokens,
        layout: args.cache.layout()?,
        backend: args.model.backend(),
    };
    let mut cache = ModelCache::open(model.config(), &options)?;
    eprintln!(
        "{}: {}, cache {}{}",
        cache.selection().backend,
        cache.selection().device,
        kind.format(model.config())?,
        match (args.cache.rotates_keys(), args.cache.calibrates()) {
            (true, true) => ", K rotated, rounded by a sample",
            (true, false) => ", K rotated",
            (false, _) => "",
        }
    );
    let (config, head_dim) = (model.config(), model.config().head_dim);
    if args.cache.calibrates() {
        let calibration = Calibration::measure(&model, &vocabulary)?;
        let offsets = calibration.offsets_over(config, num_positions)?;
        let shape = calibration.shape(config, kind, &args.cache.f16_layers, num_positions)?;
        cache.transforms.push(Box::new(SmoothKeys { offsets, rotate: true, head_dim }));
        cache.transforms.push(Box::new(shape));
    } else if args.cache.rotates_keys() {
        cache.transforms.push(Box::new(SmoothKeys { offsets: Vec::new(), rotate: true, head_dim }));
    }
    let stop = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        // A second Ctrl-C does not wait for the step in hand.
        if handler.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let order = Order { prompts, max_tokens: args.max_tokens, max_batch: args.max_batch, sampling };
    let is_single = args.prompts.len() == 1;
    let mut out = std::io::stdout();
    if let (true, Some(prompt)) = (is_single && !args.chat, args.prompts.first()) {
        write!(out, "{prompt}")?;
        out.flush()?;
    }
    // A single text comes word by word, several each when it ends. Nothing sensible can be done about a closed pipe here; the
    // line below will fail on it.
    let mut show = |request: usize, event: Event<'_>| {
        let _ = match (event, args.prompts.get(request)) {
            (Event::Piece(piece), _) if is_single => write!(out, "{piece}").and_then(|()| out.flush()),
            (Event::End(text), Some(prompt)) if !is_single => writeln!(out, "--- {prompt}\n{text}"),
            _ => Ok(()),
        };
    };
    let report = generate(&model, &vocabulary, &mut cache, &order, &stop, &mut show)?;
    if is_single {
        writeln!(out)?;
    } else if report.is_stopped {
        for (request, text) in report.texts.iter().enumerate().filter(|(i, _)| !report.is_ended(*i)) {
            let prompt = args.prompts.get(request).map_or("", String::as_str);
            writeln!(out, "--- {prompt}\n{text} [stopped]")?;
        }
    }
    print_report(&report);
    if report.is_stopped {
        eprintln!("stopped");
        std::process::exit(130);
    }
    Ok(())
}

fn print_report(report: &Report) {
    let seconds = |d: std::time::Duration| d.as_secs_f64();
    let rate = |n: usize, d| n as f64 / seconds(d).max(1e-9);
    let total = report.prefill_time + report.decode_time;
    eprintln!(
        "prefill {} tokens at {:.0}/s ({} more from the shared beginning), decode {} tokens at {:.1}/s",
        report.prefill_tokens,
        rate(report.prefill_tokens, report.prefill_time),
        report.shared_tokens,
        report.decode_tokens,
        rate(report.decode_tokens, report.decode_time),
    );
    eprintln!(
        "cache {:.1} KiB at most, {:.1} % of f16; attention {:.2} s of {:.2} s",
        report.peak_bytes as f64 / 1024.0,
        100.0 * report.peak_bytes as f64 / report.peak_bytes_in_f16.max(1) as f64,
        seconds(report.attention_time),
        seconds(total),
    );
}
