//! Whether a candidate's output is right: the f64 oracle's a-priori bound on requests of the very step, and agreement
//! between candidates on all the rest.

use crate::bench::inputs::Inputs;
use anyhow::{Context, Result, ensure};
use attn_plan::DecodeSpec;
use cpu_reference::Arithmetic;
use cpu_reference::oracle::{self, OracleOutput};
use kv_quant::Side;
use rayon::prelude::*;

/// Elements `tokens * heads * head_dim` that the oracle looks at for one request; a head at least.
const MOST_ELEMENTS: u64 = 2 << 20;
/// Beside the shortest request, the oracle looks at the longest of at most this many tokens.
const MOST_TOKENS: u32 = 16_384;

/// A few query heads of one request.
struct Unit {
    request: usize,
    first_head: usize,
    num_heads: usize,
    /// `[q_len, num_heads, head_dim]`.
    exact: OracleOutput,
}

/// What a step's output has to be.
pub struct Check {
    units: Vec<Unit>,
    /// Elements of a request's output, and of those of one query token.
    request_len: usize,
    token_len: usize,
    head_dim: usize,
    out_len: usize,
}

/// An output that was found right.
pub struct Judged {
    out: Vec<f32>,
    /// Largest bound of an element that the oracle looked at.
    bound: f64,
}

impl Check {
    /// The oracle's answers for the shortest request, however long, and the longest that it can afford. Each element of them
    /// has every token's part and any order of summing in it; the kv head is another from step to step.
    pub fn new(inputs: &Inputs) -> Result<Self> {
        let spec = &inputs.case.spec;
        let kv_lens = &inputs.case.kv_lens;
        ensure!(
            spec.alibi_slopes.is_none() && spec.sinks.is_none(),
            "tuned steps have no slopes and no sinks"
        );
        let by_len = |request: &usize| kv_lens.get(*request).copied().unwrap_or(0);
        let shortest = (0..kv_lens.len()).filter(|request| by_len(request) > 0).min_by_key(by_len);
        let affordable = |request: &usize| by_len(request) <= MOST_TOKENS;
        let longest = (0..kv_lens.len()).filter(affordable).max_by_key(by_len);
        let mut requests: Vec<usize> = shortest.into_iter().chain(longest).collect();
        requests.dedup();
        ensure!(!requests.is_empty(), "a step has a request");
        let units = requests.into_iter().map(|request| Unit::new(inputs, request)).collect::<Result<_>>()?;
        Ok(Self {
            units,
            request_len: spec.q_elements(1),
            token_len: spec.num_q_heads as usize * spec.head_dim as usize,
            head_dim: spec.head_dim as usize,
            out_len: spec.q_elements(kv_lens.len()),
        })
    }

    /// Judges an output `[batch, num_q_heads, head_dim]` by the bound of the arithmetic that made it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn judge(&self, out: Vec<f32>, arithmetic: &Arithmetic) -> Result<Judged, String> {
        if out.len() != self.out_len {
            return Err(format!("{} elements instead of {}", out.len(), self.out_len));
        }
        if let Some(element) = out.iter().position(|x| !x.is_finite()) {
            return Err(format!("element {element} is {}", out.get(element).unwrap_or(&f32::NAN)));
        }
        let mut largest = 0f64;
        for Unit { request, first_head, num_heads, exact } in &self.units {
            let len = num_heads * self.head_dim;
            let got = (0..self.request_len / self.token_len).flat_map(|token| {
                let first = request * self.request_len + token * self.token_len + first_head * self.head_dim;
                out.get(first..first + len).unwrap_or_default()
            });
            let elements = got.zip(&exact.out).zip(exact.bound(arithmetic));
            for (element, ((&got, &want), bound)) in elements.enumerate() {
                let error = (f64::from(got) - want).abs();
                // Not `error > bound`: what is not a number is wrong.
                let is_right = error <= bound;
                if !is_right {
                    let head = first_head + element / self.head_dim % num_heads;
                    let channel = element % self.head_dim;
                    return Err(format!(
                        "request {request}, head {head}, channel {channel}: {got} instead of {want:.6}, {error:.1e} off, \
                         at most {bound:.1e}"
                    ));
                }
                largest = largest.max(bound);
            }
        }
        Ok(Judged { out, bound: largest })
    }

    /// Compares what the oracle has not looked at with an output that was found right. Both may be off by their bounds,
    /// which are taken from the elements that the oracle knows, twice for those that it does not.
    ///
    /// # Errors
    /// Where they differ by more.
    pub fn compare(&self, judged: &Judged, with: &Judged) -> Result<(), String> {
        let most = 2.0 * (judged.bound + with.bound);
        let mut pairs = judged.out.iter().zip(&with.out).enumerate();
        // Both are finite.
        let apart = pairs.find(|(_, (a, b))| (f64::from(**a) - f64::from(**b)).abs() > most);
        let Some((element, (got, want))) = apart else { return Ok(()) };
        let (request, rest) = (element / self.request_len, element % self.request_len);
        let (head, channel) = (rest % self.token_len / self.head_dim, rest % self.head_dim);
        Err(format!(
            "request {request}, head {head}, channel {channel}: {got} where another schedule gives {want}; at most {most:.1e} \
             apart"
        ))
    }
}

/// Of outputs that were judged one by one: what is wrong with each, compared with the first right one.
pub fn faults(check: &Check, judged: &[Result<Judged, String>]) -> Vec<Option<String>> {
    let reference = judged.iter().find_map(|judged| judged.as_ref().ok());
    let fault = |judged: &Result<Judged, String>| match (judged, reference) {
        (Err(fault), _) => Some(fault.clone()),
        (Ok(judged), Some(reference)) => check.compare(judged, reference).err(),
        (Ok(_), None) => None,
    };
    judged.par_iter().map(fault).collect()
}

impl Unit {
    fn new(inputs: &Inputs, request: usize) -> Result<Self> {
        let spec = &inputs.case.spec;
        let (head_dim, group) = (spec.head_dim as usize, spec.gqa_group() as usize);
        let kv_len = inputs.case.kv_lens.get(request).copied().unwrap_or(0);
        let affordable = MOST_ELEMENTS / (u64::from(kv_len.max(1)) * u64::from(spec.q_len) * head_dim as u64);
        let num_heads = (affordable as usize).clamp(1, group);
        let kv_head =
            (inputs.case.kv_lens.len() * 31 + kv_len as usize * 7 + request) % spec.num_kv_heads as usize;
        let first_head = kv_head * group;
        let token_len = spec.num_q_heads as usize * head_dim;
        let mut q = Vec::with_capacity(spec.q_len as usize * num_heads * head_dim);
        for token in 0..spec.q_len as usize {
            let first = request * spec.q_elements(1) + token * token_len + first_head * head_dim;
            let of_token = inputs.q.as_slice().slice(first..first + num_heads * head_dim);
            let of_token = of_token.context("q has the request")?;
            q.extend((0..of_token.len()).filter_map(|index| of_token.get(index)).map(f64::from));
        }
        let pages = inputs.pattern_pages(request);
        let [k, v] = [Side::K, Side::V].map(|side| head_rows(inputs, &pages, kv_len, side, kv_head as u32));
        let one_head = DecodeSpec { num_q_heads: num_heads as u32, num_kv_heads: 1, ..spec.clone() };
        let exact = oracle::decode(&one_head, kv_len, &q, &k?, &v?)?;
        Ok(Self { request, first_head, num_heads, exact })
    }
}

/// Exactly code times scale of one kv head, `[kv_len, head_dim]`.
fn head_rows(inputs: &Inputs, pages: &[i32], kv_len: u32, side: Side, kv_head: u32) -> Result<Vec<f64>> {
    let (layout, cache) = (&inputs.pattern.layout, inputs.pattern.cache.view());
    let group_len = layout.format().group_len(side) as usize;
    let mut scales = vec![0f32; layout.format().num_groups(side) as usize];
    let mut rows = Vec::with_capacity(kv_len as usize * layout.format().head_dim() as usize);
    for token in 0..kv_len {
        let page =
            pages.get((token / layout.page_len()) as usize).copied().context("a page for each token")?;
        let slot = u64::try_from(page)? * u64::from(layout.page_len()) + u64::from(token % layout.page_len());
        let codes = kv_quant::read_codes(layout, &cache, side, slot, kv_head)?;
        kv_quant::read_scales(layout, &cache, side, slot, kv_head, &mut scales)?;
        for (codes, &scale) in codes.chunks_exact(group_len).zip(&scales) {
            rows.extend(codes.iter().map(|&code| f64::from(code) * f64::from(scale)));
        }
    }
    Ok(rows)
}
