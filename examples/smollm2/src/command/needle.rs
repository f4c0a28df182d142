//! `accuracy --needle`: a fact planted at several depths of a long prompt, and who finds it.

use crate::accuracy::open;
use crate::cache::{CacheKind, ModelCache};
use crate::generate::prefill;
use crate::model::Model;
use crate::sample::argmax;
use crate::text::Text;
use crate::vocabulary::Vocabulary;
use anyhow::{Context, Result, ensure};
use attn_backend::BackendId;
use indicatif::ProgressBar;
use kv_quant::{FloatType, ScaleType};
use serde::Serialize;

/// The fact, and the question whose continuation it is.
const FACT: &str = "\n\nThe secret number of the old lighthouse is 48213.\n\n";
const QUESTION: &str = "\n\nThe secret number of the old lighthouse is";
const ANSWER: &str = "48213";
/// Where the fact stands, in percent of the prompt.
const DEPTHS: [usize; 5] = [0, 25, 50, 75, 95];

/// One cache, one prompt length.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    cache: String,
    tokens: usize,
    /// By depth, in percent.
    found: Vec<(usize, bool)>,
}

/// Tries every cache on every length and depth.
pub(super) fn run(
    model: &Model,
    vocabulary: &Vocabulary,
    text: &Text,
    lens: &[usize],
    backend: Option<BackendId>,
) -> Result<Vec<Row>> {
    let kinds = [
        CacheKind::Float(FloatType::F32),
        CacheKind::int8(8, ScaleType::F16),
        CacheKind::int8(32, ScaleType::F16),
        CacheKind::int8(64, ScaleType::F16),
    ];
    let longest = lens.iter().copied().max().unwrap_or(0);
    ensure!(
        longest + 16 <= model.config().context_len,
        "the model reads {} tokens",
        model.config().context_len
    );
    let end = text.content.char_indices().nth(longest * 12).map_or(text.content.len(), |(at, _)| at);
    let filler = vocabulary.encode(text.content.get(..end).unwrap_or_default())?;
    let (fact, question) = (vocabulary.encode(FACT)?, vocabulary.encode(QUESTION)?);
    let bar = ProgressBar::new((kinds.len() * lens.len() * DEPTHS.len()) as u64);
    let mut rows = Vec::new();
    for kind in kinds {
        let mut cache = open(model.config(), kind, longest + 64, backend.clone())?;
        for &len in lens {
            let hay_len = len.saturating_sub(fact.len() + question.len());
            let hay = filler
                .get(..hay_len)
                .with_context(|| format!("{} has fewer than {len} tokens", text.name))?;
            let mut found = Vec::new();
            for depth in DEPTHS {
                let (before, after) = hay.split_at(hay.len() * depth / 100);
                let prompt = [before, &fact, after, &question].concat();
                found.push((depth, answer(model, vocabulary, &mut cache, &prompt)?.contains(ANSWER)));
                bar.inc(1);
            }
            rows.push(Row { cache: kind.format(model.config())?.to_string(), tokens: len, found });
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// The greedy continuation, long enough for the number.
fn answer(
    model: &Model,
    vocabulary: &Vocabulary,
    cache: &mut ModelCache<'_>,
    prompt: &[u32],
) -> Result<String> {
    let sequence = cache.pool().allocate();
    let mut hidden = prefill(model, cache, sequence, prompt)?;
    let mut tokens = Vec::new();
    for _ in 0..8 {
        let token = argmax(&model.logits(&hidden)?) as u32;
        tokens.push(token);
        hidden = prefill(model, cache, sequence, &[token])?;
    }
    cache.pool().free(sequence)?;
    vocabulary.decode(&tokens)
}

/// As a table for people.
pub(super) fn table(rows: &[Row]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let mut header = vec!["cache".to_owned(), "tokens".to_owned()];
    header.extend(DEPTHS.iter().map(|depth| format!("{depth} %")));
    table.set_header(header);
    for row in rows {
        let mut cells = vec![row.cache.clone(), row.tokens.to_string()];
        cells.extend(row.found.iter().map(|(_, found)| if *found { "found" } else { "-" }.to_owned()));
        table.add_row(cells);
    }
    table.to_string()
}

/// Places where the f32 cache finds the fact and another does not.
pub(super) fn losses(rows: &[Row]) -> Vec<String> {
    let reference = |tokens| rows.iter().find(|r| r.tokens == tokens && r.cache.starts_with("f32"));
    let lost = |row: &Row| -> Vec<String> {
        let Some(reference) = reference(row.tokens) else { return Vec::new() };
        let pairs = row.found.iter().zip(&reference.found);
        let lost = pairs.filter(|(this, reference)| reference.1 && !this.1);
        lost.map(|(this, _)| format!("{} at {} tokens, depth {} %", row.cache, row.tokens, this.0)).collect()
    };
    rows.iter().flat_map(lost).collect()
}
