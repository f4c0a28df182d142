//! `accuracy --needle`: a fact planted at several depths of a long prompt, and who finds it.

use crate::accuracy::open;
use crate::cache::{CacheKind, ModelCache};
use crate::generate::prefill;
use crate::model::Model;
use crate::text::Text;
use crate::transform::SmoothKeys;
use crate::vocabulary::Vocabulary;
use anyhow::{Context, Result, ensure};
use attn_backend::BackendId;
use indicatif::ProgressBar;
use kv_quant::{FloatType, ScaleType, SequenceId};
use serde::Serialize;

/// The fact, and the question whose continuation it is.
const FACT: &str = "\n\nThe secret number of the old lighthouse is 48213.\n\n";
const QUESTION: &str = "\n\nThe secret number of the old lighthouse is";
const ANSWER: &str = " 48213";
/// Where the fact stands, in percent of the prompt.
const DEPTHS: [usize; 5] = [0, 25, 50, 75, 95];

/// One cache, one prompt length.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    cache: String,
    tokens: usize,
    /// By depth.
    depths: Vec<Depth>,
}

/// What becomes of the fact at one depth.
#[derive(Clone, Copy, Debug, Serialize)]
struct Depth {
    /// In percent of the prompt.
    percent: usize,
    /// Whether the number is the greedy continuation.
    found: bool,
    /// How far the number's tokens are ahead of the likeliest others, the closest of them: a difference of logits.
    margin: f32,
}

/// Tries every cache on every length and depth.
pub(super) fn run(
    model: &Model,
    vocabulary: &Vocabulary,
    text: &Text,
    lens: &[usize],
    rotates_keys: bool,
    backend: Option<BackendId>,
) -> Result<Vec<Row>> {
    let mut caches = vec![(CacheKind::Float(FloatType::F32), false)];
    caches.extend([8, 32, 64].map(|len| (CacheKind::int8(len, ScaleType::F16), rotates_keys)));
    let longest = lens.iter().copied().max().unwrap_or(0);
    ensure!(
        longest + 16 <= model.config().context_len,
        "the model reads {} tokens",
        model.config().context_len
    );
    let end = text.content.char_indices().nth(longest * 12).map_or(text.content.len(), |(at, _)| at);
    let filler = vocabulary.encode(text.content.get(..end).unwrap_or_default())?;
    let (fact, question) = (vocabulary.encode(FACT)?, vocabulary.encode(QUESTION)?);
    let bar = ProgressBar::new((caches.len() * lens.len() * DEPTHS.len()) as u64);
    bar.tick();
    let mut rows = Vec::new();
    for (kind, rotates_keys) in caches {
        let name = match rotates_keys {
            true => format!("{}, K rotated", kind.format(model.config())?),
            false => kind.format(model.config())?.to_string(),
        };
        // The hay, and beside it the prompt in hand.
        let mut cache = open(model.config(), kind, 2 * longest + 64, backend.clone())?;
        if rotates_keys {
            let head_dim = model.config().head_dim;
            cache.transforms.push(Box::new(SmoothKeys { offsets: Vec::new(), rotate: true, head_dim }));
        }
        let number = vocabulary.encode(ANSWER)?;
        for &len in lens {
            let hay_len = len.saturating_sub(fact.len() + question.len());
            let hay = filler
                .get(..hay_len)
                .with_context(|| format!("{} has fewer than {len} tokens", text.name))?;
            let mut depths = Vec::new();
            let shared = cache.pool().allocate();
            let mut read = 0;
            for percent in DEPTHS {
                // What lies above the fact is read once for all depths.
                let above = hay.len() * percent / 100;
                prefill(model, &mut cache, shared, hay.get(read..above).unwrap_or_default())?;
                read = above;
                let below = [&fact, hay.get(above..).unwrap_or_default(), &question].concat();
                let sequence = cache.pool().fork(shared, above as u32)?;
                let margin = margin(model, &mut cache, sequence, &below, &number)?;
                cache.pool().free(sequence)?;
                depths.push(Depth { percent, found: margin > 0.0, margin });
                bar.inc(1);
            }
            cache.pool().free(shared)?;
            rows.push(Row { cache: name.clone(), tokens: len, depths });
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// How far the tokens of `expected` are ahead of all others after `tokens`, the closest of them: above 0 it is the greedy
/// continuation.
fn margin(
    model: &Model,
    cache: &mut ModelCache<'_>,
    sequence: SequenceId,
    tokens: &[u32],
    expected: &[u32],
) -> Result<f32> {
    let mut hidden = prefill(model, cache, sequence, tokens)?;
    let mut margin = f32::INFINITY;
    for &token in expected {
        let mut logits = model.logits(&hidden)?;
        let at = logits.get_mut(token as usize).context("the number has a token beyond the vocabulary")?;
        let own = std::mem::replace(at, f32::NEG_INFINITY);
        let other = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        margin = margin.min(own - other);
        hidden = prefill(model, cache, sequence, &[token])?;
    }
    Ok(margin)
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
        cells.extend(
            row.depths
                .iter()
                .map(|depth| format!("{} {:+.1}", if depth.found { "found" } else { "not" }, depth.margin)),
        );
        table.add_row(cells);
    }
    table.to_string()
}

/// Places where the f32 cache finds the fact and another does not.
pub(super) fn losses(rows: &[Row]) -> Vec<String> {
    let reference = |tokens| rows.iter().find(|r| r.tokens == tokens && r.cache.starts_with("f32"));
    let lost = |row: &Row| -> Vec<String> {
        let Some(reference) = reference(row.tokens) else { return Vec::new() };
        let pairs = row.depths.iter().zip(&reference.depths);
        let lost = pairs.filter(|(this, reference)| reference.found && !this.found);
        lost.map(|(this, reference)| {
            format!(
                "{} at {} tokens, depth {} %: margin {:+.2}, f32 {:+.2}",
                row.cache, row.tokens, this.percent, this.margin, reference.margin
            )
        })
        .collect()
    };
    rows.iter().flat_map(lost).collect()
}
