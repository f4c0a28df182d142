//! `accuracy --needle`: a fact planted at several depths of a long prompt, who finds it, and by how much.

use crate::accuracy::{Variant, around, open};
use crate::cache::ModelCache;
use crate::calibration::Calibration;
use crate::generate::prefill;
use crate::model::Model;
use crate::text::Text;
use crate::transform::Jitter;
use crate::vocabulary::Vocabulary;
use anyhow::{Context, Result, ensure};
use attn_backend::BackendId;
use indicatif::ProgressBar;
use kv_quant::SequenceId;
use serde::Serialize;

/// The fact, and the question whose continuation it is.
const FACT: &str = "\n\nThe secret number of the old lighthouse is 48213.\n\n";
const QUESTION: &str = "\n\nThe secret number of the old lighthouse is";
const ANSWER: &str = " 48213";

/// Which prompts.
#[derive(Clone, Debug)]
pub(super) struct Prompts<'a> {
    /// Lengths in tokens.
    pub(super) lens: &'a [usize],
    /// Where the fact stands, in percent of the prompt, ascending.
    pub(super) depths: &'a [usize],
    /// How often each is read; all but the first time with a [`Jitter`].
    pub(super) draws: usize,
}

/// One cache, one prompt length.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    cache: String,
    tokens: usize,
    /// By depth.
    depths: Vec<Depth>,
}

/// What becomes of the fact at one depth.
#[derive(Clone, Debug, Serialize)]
struct Depth {
    /// In percent of the prompt.
    percent: usize,
    /// Whether the number is the greedy continuation.
    found: bool,
    /// How far the number's tokens are ahead of the likeliest others, the closest of them: a difference of logits.
    margin: f32,
    /// The margin again, with other roundings.
    redrawn: Vec<f32>,
}

impl Depth {
    /// All margins: mean, standard deviation, how many of how many are found.
    fn spread(&self) -> (f32, f32, usize, usize) {
        let all = || std::iter::once(self.margin).chain(self.redrawn.iter().copied());
        let count = all().count();
        let mean = all().sum::<f32>() / count as f32;
        let squares = all().map(|margin| (margin - mean).powi(2)).sum::<f32>();
        let deviation = (squares / (count - 1).max(1) as f32).sqrt();
        (mean, deviation, all().filter(|margin| *margin > 0.0).count(), count)
    }
}

/// Tries the f32 cache and every variant on every length and depth.
pub(super) fn run(
    model: &Model,
    vocabulary: &Vocabulary,
    text: &Text,
    prompts: &Prompts<'_>,
    variants: &[Variant],
    backend: Option<BackendId>,
) -> Result<Vec<Row>> {
    let Prompts { lens, depths, draws } = *prompts;
    ensure!(depths.is_sorted() && depths.iter().all(|d| *d <= 100), "depths are percents, ascending");
    let longest = lens.iter().copied().max().unwrap_or(0);
    ensure!(
        longest + 16 <= model.config().context_len,
        "the model reads {} tokens",
        model.config().context_len
    );
    let calibration = Calibration::measure(model, vocabulary)?;
    let end = text.content.char_indices().nth(longest * 12).map_or(text.content.len(), |(at, _)| at);
    let filler = vocabulary.encode(text.content.get(..end).unwrap_or_default())?;
    let (fact, question) = (vocabulary.encode(FACT)?, vocabulary.encode(QUESTION)?);
    let number = vocabulary.encode(ANSWER)?;
    let caches = || std::iter::once(&Variant::F32).chain(variants);
    let bar = ProgressBar::new((caches().count() * draws * lens.len() * depths.len()) as u64);
    bar.tick();
    let mut rows = Vec::new();
    for variant in caches() {
        let (kind, _) = around(variant, &calibration, model.config(), longest)?;
        // The hay, and beside it the prompt in hand.
        let mut cache = open(model.config(), kind, 2 * longest + 64, backend.clone())?;
        for &len in lens {
            let hay_len = len.saturating_sub(fact.len() + question.len());
            let hay = filler
                .get(..hay_len)
                .with_context(|| format!("{} has fewer than {len} tokens", text.name))?;
            let mut found: Vec<Depth> = Vec::new();
            for draw in 0..draws {
                cache.transforms = around(variant, &calibration, model.config(), len)?.1;
                if draw > 0 {
                    cache.transforms.insert(0, Box::new(Jitter::new(draw as u64)));
                }
                let shared = cache.pool().allocate();
                let mut read = 0;
                for (i, &percent) in depths.iter().enumerate() {
                    // What lies above the fact is read once for all depths.
                    let above = hay.len() * percent / 100;
                    prefill(model, &mut cache, shared, hay.get(read..above).unwrap_or_default())?;
                    read = above;
                    let below = [&fact, hay.get(above..).unwrap_or_default(), &question].concat();
                    let sequence = cache.pool().fork(shared, above as u32)?;
                    let margin = margin(model, &mut cache, sequence, &below, &number)?;
                    cache.pool().free(sequence)?;
                    match found.get_mut(i) {
                        Some(depth) => depth.redrawn.push(margin),
                        None => {
                            found.push(Depth { percent, found: margin > 0.0, margin, redrawn: Vec::new() })
                        }
                    }
                    bar.inc(1);
                }
                cache.pool().free(shared)?;
            }
            rows.push(Row { cache: variant.key(), tokens: len, depths: found });
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
    header
        .extend(rows.first().iter().flat_map(|row| &row.depths).map(|depth| format!("{} %", depth.percent)));
    table.set_header(header);
    for row in rows {
        let mut cells = vec![row.cache.clone(), row.tokens.to_string()];
        cells.extend(row.depths.iter().map(|depth| match depth.redrawn.as_slice() {
            [] => format!("{} {:+.1}", if depth.found { "found" } else { "not" }, depth.margin),
            _ => {
                let (mean, deviation, found, count) = depth.spread();
                format!("{found} of {count}, {mean:+.2} ± {deviation:.2}")
            }
        }));
        table.add_row(cells);
    }
    table.to_string()
}

/// Places where the f32 cache finds the fact and another, read as often as asked for, once does not.
pub(super) fn losses(rows: &[Row]) -> Vec<String> {
    let reference = |tokens| rows.iter().find(|r| r.tokens == tokens && r.cache.starts_with("f32"));
    let lost = |row: &Row| -> Vec<String> {
        let Some(reference) = reference(row.tokens) else { return Vec::new() };
        let pairs = row.depths.iter().zip(&reference.depths);
        let is_lost = |this: &Depth| this.spread().2 < this.spread().3;
        let lost = pairs.filter(|(this, reference)| reference.found && is_lost(this));
        lost.map(|(this, reference)| {
            let (mean, _, found, count) = this.spread();
            format!(
                "{} at {} tokens, depth {} %: found {found} of {count}, margin {mean:+.2}, f32 {:+.2}",
                row.cache, row.tokens, this.percent, reference.margin
            )
        })
        .collect()
    };
    rows.iter().flat_map(lost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cache: &str, margins: &[&[f32]]) -> Row {
        let depth = |(percent, margins): (usize, &&[f32])| {
            let (&margin, redrawn) = margins.split_first().unwrap();
            Depth { percent, found: margin > 0.0, margin, redrawn: redrawn.to_vec() }
        };
        Row { cache: cache.to_owned(), tokens: 64, depths: margins.iter().enumerate().map(depth).collect() }
    }

    #[test]
    fn a_loss_is_what_f32_finds_and_the_other_does_not() {
        let f32 = row("f32/-/-/-", &[&[1.0], &[-1.0], &[0.5]]);
        let int8 = row("int8/8/f16/half-even", &[&[0.9], &[-1.1], &[-0.01]]);
        let lost = losses(&[f32, int8]);
        assert_eq!(lost.len(), 1);
        assert!(lost[0].contains("depth 2 %") && lost[0].contains("-0.01"), "{lost:?}");
        // One reading of several is enough to lose.
        let redrawn = row("int8/8/f16/half-even", &[&[0.9, 0.8], &[-1.1, 0.2], &[0.1, -0.2]]);
        let f32 = row("f32/-/-/-", &[&[1.0, 1.0], &[-1.0, -1.0], &[0.5, 0.5]]);
        let lost = losses(&[f32, redrawn]);
        assert_eq!(lost.len(), 1);
        assert!(lost[0].contains("found 1 of 2, margin -0.05"), "{lost:?}");
    }

    #[test]
    fn draws_are_counted_with_the_first() {
        let row = row("int8/8/f16/half-even", &[&[-0.1, 0.1, 0.3, 0.1]]);
        let (mean, deviation, found, count) = row.depths[0].spread();
        assert_eq!((found, count), (3, 4));
        // Squares about the mean of 0.1: 0.04, 0, 0.04, 0 over three.
        assert!((mean - 0.1).abs() < 1e-6 && (deviation - (0.08f32 / 3.0).sqrt()).abs() < 1e-6);
        assert!(table(&[row]).contains("3 of 4, +0.10 ± 0.16"));
    }
}
