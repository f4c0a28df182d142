//! Text from prompts: one continuous batch, the common beginning of all prompts computed and stored once.

use crate::cache::{CHUNK_LEN, ModelCache};
use crate::model::Model;
use crate::sample::{Sampler, Sampling};
use crate::vocabulary::Vocabulary;
use anyhow::{Result, ensure};
use kv_quant::SequenceId;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What to generate.
#[derive(Clone, Debug)]
pub struct Order {
    /// One request each.
    pub prompts: Vec<String>,
    /// New tokens at most, a request.
    pub max_tokens: usize,
    /// Requests that run at once; the others follow as places fall free.
    pub max_batch: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Generated text of each prompt.
    pub texts: Vec<String>,
    /// Requests that came to their end.
    pub ended: Vec<usize>,
    /// Prompt tokens computed; shared ones once.
    pub prefill_tokens: usize,
    /// Prompt tokens that were there already, from the shared beginning.
    pub shared_tokens: usize,
    /// Requests that were begun.
    pub num_admitted: usize,
    /// Tokens generated.
    pub decode_tokens: usize,
    /// Time of prefill.
    pub prefill_time: Duration,
    /// Time of decode.
    pub decode_time: Duration,
    /// Time in append, plan and decode of the sessions, within the two above.
    pub attention_time: Duration,
    /// Most cache bytes in use at once.
    pub peak_bytes: u64,
    /// What the same pages would take in f16.
    pub peak_bytes_in_f16: u64,
    /// Whether it was stopped from outside.
    pub is_stopped: bool,
}

impl Report {
    /// Whether a request came to its end.
    pub fn is_ended(&self, request: usize) -> bool {
        self.ended.contains(&request)
    }
}

struct Running {
    request: usize,
    sequence: SequenceId,
    sampler: Sampler,
    tokens: Vec<u32>,
    /// Bytes of the text already handed out.
    shown: usize,
}

/// Runs `tokens` of one sequence through the model in chunks and returns the last hidden row.
pub fn prefill(
    model: &Model,
    cache: &mut ModelCache<'_>,
    sequence: SequenceId,
    tokens: &[u32],
) -> Result<Vec<f32>> {
    let mut last = Vec::new();
    for chunk in tokens.chunks(CHUNK_LEN as usize) {
        let positions = cache.begin(&[sequence], chunk.len() as u32)?;
        let hidden = model.forward(chunk, &positions, cache)?;
        last = hidden[hidden.len() - model.config().width..].to_vec();
    }
    Ok(last)
}

fn common_prefix(prompts: &[Vec<u32>]) -> usize {
    let Some((first, others)) = prompts.split_first() else { return 0 };
    let shared = |other: &Vec<u32>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    let len = others.iter().map(shared).min().unwrap_or(0);
    // Every request computes at least one token of its own: the one whose logits it needs.
    prompts.iter().map(|p| p.len().saturating_sub(1)).min().unwrap_or(0).min(len)
}

/// What is shown of a request as it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// More text.
    Piece(&'a str),
    /// It has ended; this is all of its text.
    End(&'a str),
}

/// Generates. `show` gets a request's number and what is new of it; `stop` ends it between two steps.
pub fn generate(
    model: &Model,
    vocabulary: &Vocabulary,
    cache: &mut ModelCache<'_>,
    order: &Order,
    stop: &AtomicBool,
    show: &mut dyn FnMut(usize, Event<'_>),
) -> Result<Report> {
    let prompts = order.prompts.iter().map(|p| vocabulary.encode(p)).collect::<Result<Vec<_>>>()?;
    for prompt in &prompts {
        let len = prompt.len() + order.max_tokens;
        ensure!(!prompt.is_empty(), "an empty prompt");
        ensure!(
            len <= model.config().context_len,
            "{len} tokens; the model reads {}",
            model.config().context_len
        );
    }
    let mut report = Report { texts: vec![String::new(); prompts.len()], ..Report::default() };
    let shared = common_prefix(&prompts);
    let parent = cache.pool().allocate();
    let start = Instant::now();
    if shared > 0 {
        prefill(model, cache, parent, &prompts[0][..shared])?;
    }
    report.prefill_tokens += shared;
    report.prefill_time += start.elapsed();
    let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
    let mut running: Vec<Running> = Vec::new();
    while !(waiting.is_empty() && running.is_empty()) {
        if stop.load(Ordering::Relaxed) {
            report.is_stopped = true;
            break;
        }
        while running.len() < order.max_batch.max(1)
            && let Some(request) = waiting.pop_front()
        {
            let start = Instant::now();
            let sequence = cache.pool().fork(parent, shared as u32)?;
            let own = &prompts[request][shared..];
            let hidden = prefill(model, cache, sequence, own)?;
            let mut sampler = Sampler::new(order.sampling, request);
            let token = sampler.draw(&model.logits(&hidden)?);
            running.push(Running { request, sequence, sampler, tokens: vec![token], shown: 0 });
            report.prefill_tokens += own.len();
            // The first to come computed it.
            report.shared_tokens += if report.num_admitted == 0 { 0 } else { shared };
            report.num_admitted += 1;
            report.prefill_time += start.elapsed();
        }
        report.peak_bytes = report.peak_bytes.max(cache.bytes_used());
        report.peak_bytes_in_f16 = report.peak_bytes_in_f16.max(cache.bytes_in_f16());
        settle(vocabulary, cache, order.max_tokens, &mut running, &mut report, show)?;
        if running.is_empty() {
            continue;
        }
        let start = Instant::now();
        let sequences: Vec<_> = running.iter().map(|r| r.sequence).collect();
        let tokens: Vec<u32> = running.iter().filter_map(|r| r.tokens.last().copied()).collect();
        let positions = cache.begin(&sequences, 1)?;
        let hidden = model.forward(&tokens, &positions, cache)?;
        let logits = model.logits(&hidden)?;
        for (r, logits) in running.iter_mut().zip(logits.chunks_exact(model.config().vocab_len)) {
            r.tokens.push(r.sampler.draw(logits));
        }
        report.decode_tokens += running.len();
        report.decode_time += start.elapsed();
    }
    for r in running {
        cache.pool().free(r.sequence)?;
    }
    cache.pool().free(parent)?;
    report.attention_time = cache.attention_time;
    Ok(report)
}

/// Hands out new text, and takes leave of requests that have ended.
fn settle(
    vocabulary: &Vocabulary,
    cache: &mut ModelCache<'_>,
    max_tokens: usize,
    running: &mut Vec<Running>,
    report: &mut Report,
    show: &mut dyn FnMut(usize, Event<'_>),
) -> Result<()> {
    let mut kept = Vec::with_capacity(running.len());
    for mut r in running.drain(..) {
        let ended = r.tokens.last().is_some_and(|&token| vocabulary.is_end(token));
        if ended {
            r.tokens.pop();
        }
        let is_done = ended || r.tokens.len() >= max_tokens;
        let text = vocabulary.decode(&r.tokens)?;
        // A character may span tokens: wait until it is whole.
        let whole = if is_done { text.len() } else { text.trim_end_matches('\u{fffd}').len() };
        if let Some(piece) = text.get(r.shown..whole) {
            show(r.request, Event::Piece(piece));
            r.shown = whole;
        }
        if is_done {
            show(r.request, Event::End(&text));
            report.ended.push(r.request);
        }
        if let Some(out) = report.texts.get_mut(r.request) {
            *out = text;
        }
        if is_done {
            cache.pool().free(r.sequence)?;
        } else {
            kept.push(r);
        }
    }
    *running = kept;
    Ok(())
}
