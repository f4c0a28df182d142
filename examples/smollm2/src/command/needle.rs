//! `accuracy --needle`: a fact planted at several depths of a long prompt, and who finds it.

use crate::accuracy::open;
use crate::cache::{CacheKind, ModelCache};
use crate::generate::prefill;
use crate::model::Model;
use crate::sample::argmax;
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
        for &len in lens {
            let hay_len = len.saturating_sub(fact.len() + question.len());
            let hay = filler
                .get(..hay_len)
                .with_context(|| format!("{} has fewer than {len} tokens", text.name))?;
            let mut found = Vec::new();
            let shared = cache.pool().allocate();
            let mut read = 0;
            for depth in DEPTHS {
                // What lies above the fact is read once for all depths.
                let above = hay.len() * depth / 100;
                prefill(model, &mut cache, shared, hay.get(read..above).unwrap_or_default())?;
                read = above;
                let below = [&fact, hay.get(above..).unwrap_or_default(), &question].concat();
                let sequence = cache.pool().fork(shared, above as u32)?;
                let answer = answer(model, vocabulary, &mut cache, sequence, &below)?;
                cache.pool().free(sequence)?;
                found.push((depth, answer.contains(ANSWER)));
                bar.inc(1);
            }
            cache.pool().free(shared)?;
            rows.push(Row { cache: name.clone(), tokens: len, found });
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// The greedy continuation of a sequence after `tokens`, long enough for the number.
fn answer(
    model: &Model,
    vocabulary: &Vocabulary,
    cache: &mut ModelCache<'_>,
    sequence: SequenceId,
    tokens: &[u32],
) -> Result<String> {
    let mut hidden = prefill(model, cache, sequence, tokens)?;
    let mut answer = Vec::new();
    for _ in 0..8 {
        let token = argmax(&model.logits(&hidden)?) as u32;
        answer.push(token);
        hidden = prefill(model, cache, sequence, &[token])?;
    }
    vocabulary.decode(&answer)
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
