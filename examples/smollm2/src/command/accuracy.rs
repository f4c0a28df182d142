//! `accuracy`: what the INT8 cache costs in perplexity, KL divergence and top-1 agreement.

use super::ModelArgs;
use crate::accuracy::{State, Variant, Window, all_variants, measure, needle_variants, quick_variants};
use crate::calibration::Calibration;
use crate::matrix::Products;
use crate::model::Model;
use crate::score::Score;
use crate::text;
use crate::vocabulary::Vocabulary;
use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Measures perplexity, KL divergence and top-1 agreement of cache variants against the f32 cache.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// 1024 tokens of one text, four rows
    #[arg(long)]
    quick: bool,
    /// Texts: gpl-3, kjv, jargon, or NAME=PATH of any plain text
    #[arg(long, value_delimiter = ',', default_value = "gpl-3,kjv,jargon")]
    texts: Vec<String>,
    /// A folder that packages are unpacked in, tried before the system's own
    #[arg(long, value_name = "DIR")]
    text_root: Option<PathBuf>,
    /// Tokens of each text
    #[arg(long, default_value_t = 2816)]
    tokens: usize,
    /// Tokens that are read from an empty cache
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Only variants whose name contains this, e.g. int8/32/f16
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Measure K as it is alone, without the rows whose q and K are rotated
    #[arg(long)]
    no_rotate_keys: bool,
    /// Instead: plant a fact at several depths of long prompts of the first text, and see which caches find it
    #[arg(long)]
    needle: bool,
    /// Prompt lengths of --needle
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096")]
    needle_lens: Vec<usize>,
    /// Where the fact of --needle stands, in percent of the prompt
    #[arg(long, value_delimiter = ',', default_value = "0,25,50,75,95")]
    needle_depths: Vec<usize>,
    /// Read every prompt of --needle this often, all but the first time with q, K and V changed by one part in a million, so
    /// that roundings fall anew: says what of a margin is chance
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    needle_draws: u64,
    /// Print the rows as JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Where accuracy.json, accuracy.svg and the state to resume from are written
    #[arg(long, value_name = "DIR", default_value = "target/accuracy")]
    out: PathBuf,
    /// Measure nothing; report on what was measured before
    #[arg(long)]
    report_only: bool,
    /// Forget earlier measurements
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// A row of the JSON, and what the table says beside.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    text: String,
    tokens: u64,
    pub(super) format: String,
    pub(super) group_len: Option<u32>,
    pub(super) scale_type: Option<String>,
    pub(super) rounding: Option<String>,
    perplexity: f64,
    perplexity_f32: f64,
    pub(super) kl: f64,
    top1: f64,
    /// Relative change of perplexity and its standard error, in percent.
    #[serde(skip)]
    change: (f64, f64),
}

#[derive(Serialize)]
struct Report<'a> {
    rows: &'a [Row],
}

impl Row {
    fn new(text: &str, variant: &Variant, score: &Score) -> Self {
        let [format, group_len, scale_type, rounding] = variant.labels();
        let named = |label: String| Some(label).filter(|label| label != "-");
        Self {
            text: text.to_owned(),
            tokens: score.tokens,
            format,
            group_len: group_len.parse().ok(),
            scale_type: named(scale_type),
            rounding: named(rounding),
            perplexity: score.perplexity(),
            perplexity_f32: score.perplexity_reference(),
            kl: score.mean_kl(),
            top1: score.top1_agreement(),
            change: (score.change_percent(), score.change_error_percent()),
        }
    }

    /// Whether the row is over all texts.
    pub(super) fn is_total(&self) -> bool {
        self.text == ALL
    }
}

/// What was measured so far, in the folder of results.
const STATE_FILE: &str = "state.json";
/// The name of the row over all texts.
const ALL: &str = "all";

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.window >= 2, "--window {}; valid: 2 or more", args.window);
    let (tokens, mut names) = match args.quick {
        true => (1024.min(args.window), args.texts.iter().take(1).cloned().collect()),
        false => (args.tokens, args.texts.clone()),
    };
    let (model, vocabulary) = args.model.load(Products::Exact)?;
    let roots: Vec<_> = args.text_root.iter().cloned().chain([PathBuf::from("/")]).collect();
    let (mut texts, mut missing) = text::find(&names, &roots);
    if args.quick && texts.is_empty() {
        // Any of the others will do for a look.
        names = args.texts.clone();
        (texts, missing) = text::find(&names, &roots);
        texts.truncate(1);
    }
    for line in &missing {
        eprintln!("left out: {line}");
    }
    ensure!(!texts.is_empty(), "no text at all; name one with --texts NAME=PATH");
    if let (true, Some(text)) = (args.needle, texts.first()) {
        return search(args, &model, &vocabulary, text);
    }
    let windows = cut(&vocabulary, &texts, tokens, args.window)?;
    let variants = chosen(
        args,
        match args.quick {
            true => quick_variants(!args.no_rotate_keys),
            false => all_variants(!args.no_rotate_keys),
        },
    )?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let state_path = args.out.join(STATE_FILE);
    let setting = format!(
        "SmolLM2-135M-Instruct Q4_1, weights widened to f32, windows of {} tokens, backend {}",
        args.window,
        args.model.backend.as_deref().unwrap_or("best")
    );
    let mut state = if args.fresh { State::default() } else { load(&state_path) };
    if state.setting != setting {
        state = State { setting: setting.clone(), ..State::default() };
    }
    if !args.report_only {
        fill(args, &model, &vocabulary, &windows, &variants, &mut state)?;
    }
    let rows = collect(&state, &windows, &variants);
    let report = serde_json::to_string_pretty(&Report { rows: &rows })?;
    std::fs::write(args.out.join("accuracy.json"), &report)?;
    super::plot::write(&args.out.join("accuracy.svg"), &rows)?;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{report}")?;
    } else {
        writeln!(out, "{setting}\n{}", table(&rows))?;
        writeln!(out, "\nwritten: {0}/accuracy.json, {0}/accuracy.svg", args.out.display())?;
    }
    Ok(())
}

/// The variants that `--only` leaves.
fn chosen(args: &Args, mut variants: Vec<Variant>) -> Result<Vec<Variant>> {
    if let Some(only) = &args.only {
        variants.retain(|variant| variant.key().contains(only.as_str()));
        ensure!(!variants.is_empty(), "no variant has {only} in its name");
    }
    Ok(variants)
}

/// Measures what the state lacks, with a progress bar, saving as it goes.
fn fill(
    args: &Args,
    model: &Model,
    vocabulary: &Vocabulary,
    windows: &[Window],
    variants: &[Variant],
    state: &mut State,
) -> Result<()> {
    let state_path = args.out.join(STATE_FILE);
    let backend = args.model.backend();
    let calibration = Calibration::measure(model, vocabulary)?;
    let bar = ProgressBar::new((windows.len() * variants.len()) as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {elapsed} elapsed, {eta} left")?);
    let key = |window: &Window, variant: &Variant| format!("{}/{}", window.key, variant.key());
    let known = windows.iter().flat_map(|w| variants.iter().map(move |v| key(w, v)));
    bar.inc(known.filter(|key| state.scores.contains_key(key)).count() as u64);
    bar.tick();
    measure(
        model,
        &calibration,
        windows,
        variants,
        backend,
        state,
        || bar.inc(1),
        |state| save(&state_path, state),
    )?;
    bar.finish_and_clear();
    Ok(())
}

fn search(args: &Args, model: &Model, vocabulary: &Vocabulary, text: &text::Text) -> Result<()> {
    let variants = match &args.only {
        Some(_) => chosen(args, all_variants(!args.no_rotate_keys))?,
        None => needle_variants(!args.no_rotate_keys),
    };
    let (lens, depths, draws) = (&args.needle_lens, &args.needle_depths, args.needle_draws as usize);
    let prompts = super::needle::Prompts { lens, depths, draws };
    let rows = super::needle::run(model, vocabulary, text, &prompts, &variants, args.model.backend())?;
    let report = serde_json::to_string_pretty(&serde_json::json!({ "text": text.name, "rows": rows }))?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    std::fs::write(args.out.join("needle.json"), &report)?;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{report}")?;
    } else {
        writeln!(out, "a fact at a depth of a prompt from {}\n{}", text.name, super::needle::table(&rows))?;
        match super::needle::losses(&rows).as_slice() {
            [] => writeln!(out, "every cache finds it wherever the f32 cache does")?,
            lost => writeln!(out, "lost against the f32 cache: {}", lost.join("; "))?,
        }
    }
    Ok(())
}

fn cut(vocabulary: &Vocabulary, texts: &[text::Text], tokens: usize, window: usize) -> Result<Vec<Window>> {
    let mut windows = Vec::new();
    for text in texts {
        // A token is four letters or so; tokenizing all of a book takes longer than measuring a page.
        let end = text.content.char_indices().nth(tokens * 12).map_or(text.content.len(), |(at, _)| at);
        let mut all = vocabulary.encode(text.content.get(..end).unwrap_or_default())?;
        all.truncate(tokens);
        if all.len() < tokens {
            eprintln!("{}: {} tokens; {tokens} were asked for", text.name, all.len());
        }
        for (number, tokens) in all.chunks(window).enumerate().filter(|(_, chunk)| chunk.len() > window / 2) {
            let key = format!("{}/{number}/{}", text.name, tokens.len());
            windows.push(Window { key, tokens: tokens.to_vec() });
        }
    }
    Ok(windows)
}

fn load(path: &Path) -> State {
    // An absent or foreign file is no state; the setting inside decides about the rest.
    std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn save(path: &Path, state: &State) -> Result<()> {
    // Whole or not at all: a kill in the middle of a write must not cost what was measured.
    let partial = path.with_extension("partial");
    std::fs::write(&partial, serde_json::to_vec(state)?)?;
    Ok(std::fs::rename(&partial, path)?)
}

fn collect(state: &State, windows: &[Window], variants: &[Variant]) -> Vec<Row> {
    let name = |window: &Window| window.key.split('/').next().unwrap_or_default().to_owned();
    let mut texts: Vec<String> = windows.iter().map(name).collect();
    texts.dedup();
    if texts.len() > 1 {
        texts.push(ALL.to_owned());
    }
    let mut rows = Vec::new();
    for text in &texts {
        for variant in variants {
            let mut sum = Score::default();
            for window in windows.iter().filter(|w| text == ALL || name(w) == *text) {
                if let Some(score) = state.scores.get(&format!("{}/{}", window.key, variant.key())) {
                    sum.add(score);
                }
            }
            if sum.tokens > 0 {
                rows.push(Row::new(text, variant, &sum));
            }
        }
    }
    rows
}

fn table(rows: &[Row]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header([
        "text", "tokens", "format", "group", "scale", "rounding", "ppl", "vs f32", "KL", "top-1",
    ]);
    for row in rows {
        let or_dash = |label: &Option<String>| label.clone().unwrap_or_else(|| "-".to_owned());
        table.add_row([
            row.text.clone(),
            row.tokens.to_string(),
            row.format.clone(),
            row.group_len.map_or("-".to_owned(), |len| len.to_string()),
            or_dash(&row.scale_type),
            or_dash(&row.rounding),
            format!("{:.4}", row.perplexity),
            format!("{:+.3} % ± {:.3}", row.change.0, row.change.1),
            format!("{:.2e}", row.kl),
            format!("{:.2} %", 100.0 * row.top1),
        ]);
    }
    table.to_string()
}
