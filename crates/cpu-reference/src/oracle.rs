//! What is right: decode attention in f64 over a dense, dequantized cache, one request at a time.
//!
//! Never made fast, and shares no code with the backends that it judges. It takes what the cache *holds* (code times
//! scale, exact in f64), so that arithmetic error is judged apart from quantization error.

use crate::Error;
use attn_plan::{DecodeRequest, DecodeSpec};
use kv_quant::{CacheLayout, CacheView, FloatSlice, Side};

/// One visible token of one query row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token {
    /// Which token.
    pub t: usize,
    /// The logit.
    pub s: f64,
    /// The logit before soft-cap and ALiBi.
    pub raw: f64,
    /// The softmax weight, sink counted in the denominator.
    pub p: f64,
    /// `|softmax_scale| * sum |q_d k_d|`.
    pub abs_dot: f64,
    /// `|softmax_scale| * sum |k_d|`.
    pub abs_k: f64,
    /// `|softmax_scale| * sum |q_d|`.
    pub abs_q: f64,
    /// What ALiBi added.
    pub alibi: f64,
    /// The largest K scale of the token's row.
    pub k_scale: f64,
}

/// One query row: what the oracle knows of it beyond its output.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub kv_head: usize,
    /// Visible tokens in order.
    pub tokens: Vec<Token>,
    /// Largest logit, the sink's counted; -inf if there is none.
    pub m: f64,
    /// `max |q_d|`.
    pub q_amax: f64,
    pub soft_cap: Option<f64>,
    /// What a logit loses at most when products below the normal range of f32 are flushed.
    pub flush: f64,
    pub sink: Option<f64>,
}

/// The exact result of one request (up to f64 rounding), and the sums from which [`Self::bound`] is made.
#[derive(Clone, Debug)]
pub struct OracleOutput {
    /// `[q_len, num_q_heads, head_dim]`.
    pub out: Vec<f64>,
    /// `[q_len, num_q_heads]`, natural log; -inf where nothing is visible and there is no sink.
    pub lse: Vec<f64>,
    pub(crate) rows: Vec<Row>,
    pub(crate) v: Vec<f64>,
    /// The largest V scale of each row, `[kv_len, num_kv_heads]`.
    pub(crate) v_scales: Vec<f64>,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
}

fn check_len(what: &'static str, got: usize, want: usize) -> Result<(), Error> {
    if got == want { Ok(()) } else { Err(Error::Len { what, got, want }) }
}

/// Decode attention of one request of `kv_len` tokens.
///
/// `q` is `[q_len, num_q_heads, head_dim]`; `k` and `v` are `[kv_len, num_kv_heads, head_dim]`, dequantized. A row's
/// largest magnitude stands for its largest scale, which only the error of backends that normalize scales depends on;
/// [`decode_request`] knows the scales.
///
/// # Errors
/// A spec that fails its own check, or an array of another length.
pub fn decode(
    spec: &DecodeSpec,
    kv_len: u32,
    q: &[f64],
    k: &[f64],
    v: &[f64],
) -> Result<OracleOutput, Error> {
    let largest = |x: &[f64]| -> Vec<f64> {
        let rows = x.chunks_exact((spec.head_dim as usize).max(1));
        rows.map(|row| row.iter().fold(0.0, |amax, x| x.abs().max(amax))).collect()
    };
    let scales = (largest(k), largest(v));
    decode_scaled(spec, kv_len, q, k, v, scales)
}

/// As [`decode`], with the largest K and V scale of each row, `[kv_len, num_kv_heads]`.
fn decode_scaled(
    spec: &DecodeSpec,
    kv_len: u32,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    (k_scales, v_scales): (Vec<f64>, Vec<f64>),
) -> Result<OracleOutput, Error> {
    spec.check()?;
    let head_dim = spec.head_dim as usize;
    let num_kv_heads = spec.num_kv_heads as usize;
    check_len("q", q.len(), spec.q_elements(1))?;
    for (what, x) in [("k", k), ("v", v)] {
        check_len(what, x.len(), kv_len as usize * num_kv_heads * head_dim)?;
    }
    let mut output = OracleOutput {
        out: Vec::with_capacity(q.len()),
        lse: Vec::with_capacity(spec.lse_elements(1)),
        rows: Vec::with_capacity(spec.lse_elements(1)),
        v: v.to_vec(),
        v_scales,
        num_kv_heads,
        head_dim,
    };
    for (row_idx, q_row) in q.chunks_exact(head_dim).enumerate() {
        let (q_idx, head) = (row_idx / spec.num_q_heads as usize, row_idx % spec.num_q_heads as usize);
        let row = attend(spec, kv_len, q_idx as u32, head, q_row, k, &k_scales);
        let mut out = vec![0.0; head_dim];
        for token in &row.tokens {
            let first = (token.t * num_kv_heads + row.kv_head) * head_dim;
            for (o, v) in out.iter_mut().zip(v.iter().skip(first)) {
                // A weight of 0 has no say, whatever the value is.
                if token.p != 0.0 {
                    *o += token.p * v;
                }
            }
        }
        output.out.extend(out);
        output.lse.push(row.lse());
        output.rows.push(row);
    }
    Ok(output)
}

/// Logits and weights of one query row.
fn attend(
    spec: &DecodeSpec,
    kv_len: u32,
    q_idx: u32,
    head: usize,
    q_row: &[f64],
    k: &[f64],
    k_scales: &[f64],
) -> Row {
    let (head_dim, num_kv_heads) = (spec.head_dim as usize, spec.num_kv_heads as usize);
    let kv_head = head / spec.gqa_group() as usize;
    let scale = f64::from(spec.softmax_scale);
    let position = i64::from(kv_len) - i64::from(spec.q_len) + i64::from(q_idx);
    let slope = spec.alibi_slopes.as_ref().and_then(|slopes| slopes.get(head));
    let sink = spec.sinks.as_ref().and_then(|sinks| sinks.get(head)).map(|&x| f64::from(x));
    let mut row = Row {
        kv_head,
        tokens: Vec::new(),
        m: f64::NEG_INFINITY,
        q_amax: q_row.iter().fold(0.0, |amax, x| amax.max(x.abs())),
        soft_cap: spec.soft_cap.map(f64::from),
        flush: f64::from(f32::MIN_POSITIVE) * (scale.abs() * head_dim as f64 + 1.0),
        sink,
    };
    let abs_q = scale.abs() * q_row.iter().map(|x| x.abs()).sum::<f64>();
    for t in 0..kv_len as usize {
        let distance = t as i64 - position;
        if distance > 0 || spec.window.is_some_and(|window| -distance >= i64::from(window)) {
            continue;
        }
        let first = (t * num_kv_heads + kv_head) * head_dim;
        let k_row = k.get(first..first + head_dim).unwrap_or_default();
        let raw = scale * q_row.iter().zip(k_row).map(|(q, k)| q * k).sum::<f64>();
        let abs_dot = scale.abs() * q_row.iter().zip(k_row).map(|(q, k)| (q * k).abs()).sum::<f64>();
        let abs_k = scale.abs() * k_row.iter().map(|k| k.abs()).sum::<f64>();
        let capped = match spec.soft_cap {
            Some(cap) => f64::from(cap) * (raw / f64::from(cap)).tanh(),
            None => raw,
        };
        let alibi = slope.map_or(0.0, |&slope| f64::from(slope) * distance as f64);
        let k_scale = k_scales.get(t * num_kv_heads + kv_head).copied().unwrap_or(0.0);
        row.tokens.push(Token { t, s: capped + alibi, raw, p: 0.0, abs_dot, abs_k, abs_q, alibi, k_scale });
    }
    row.m = row.tokens.iter().map(|token| token.s).chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let lse = row.lse();
    for token in &mut row.tokens {
        token.p = (token.s - lse).exp();
    }
    row
}

impl Row {
    fn lse(&self) -> f64 {
        if self.m == f64::NEG_INFINITY {
            return self.m;
        }
        let logits = self.tokens.iter().map(|token| token.s).chain(self.sink);
        self.m + logits.map(|s| (s - self.m).exp()).sum::<f64>().ln()
    }
}

/// Dense K and V of one request, `[kv_len, num_kv_heads, head_dim]`: exactly code times scale. Tokens that every
/// query's window has passed are zeros: an engine may have given up their pages.
///
/// # Errors
/// A page table that is too short, or slots outside the cache.
pub fn gather(
    layout: &CacheLayout,
    cache: &CacheView<'_>,
    request: &DecodeRequest<'_>,
    request_idx: usize,
) -> Result<(Vec<f64>, Vec<f64>), Error> {
    let kv_len = request.kv_lens.get(request_idx).copied().unwrap_or(0);
    let mut dense = (Vec::new(), Vec::new());
    let seen_from = request.spec.visible_any(kv_len).start;
    let row = layout.format().num_kv_heads() as usize * layout.format().head_dim() as usize;
    for t in 0..kv_len {
        if t < seen_from {
            for dense in [&mut dense.0, &mut dense.1] {
                dense.resize(dense.len() + row, 0.0);
            }
            continue;
        }
        let slot = request.page_table.slot(request_idx, t, layout.page_len()).unwrap_or(u64::MAX);
        for (side, dense) in [(Side::K, &mut dense.0), (Side::V, &mut dense.1)] {
            if layout.format().element() != kv_quant::Element::Int8 {
                let mut row = vec![0f32; layout.format().head_dim() as usize];
                for head in 0..layout.format().num_kv_heads() {
                    kv_quant::dequantize_row(layout, cache, side, slot, head, &mut row)?;
                    dense.extend(row.iter().map(|&x| f64::from(x)));
                }
                continue;
            }
            let group_len = layout.format().group_len(side) as usize;
            let mut scales = vec![0f32; layout.format().num_groups(side) as usize];
            for head in 0..layout.format().num_kv_heads() {
                let codes = kv_quant::read_codes(layout, cache, side, slot, head)?;
                kv_quant::read_scales(layout, cache, side, slot, head, &mut scales)?;
                for (codes, &scale) in codes.chunks_exact(group_len).zip(&scales) {
                    dense.extend(codes.iter().map(|&code| f64::from(code) * f64::from(scale)));
                }
            }
        }
    }
    Ok(dense)
}

/// The largest scale of each row of one side, `[kv_len, num_kv_heads]`; 0 where the format has none, and for tokens that
/// no query sees.
fn largest_scales(
    layout: &CacheLayout,
    cache: &CacheView<'_>,
    request: &DecodeRequest<'_>,
    request_idx: usize,
    side: Side,
) -> Result<Vec<f64>, Error> {
    let kv_len = request.kv_lens.get(request_idx).copied().unwrap_or(0);
    let num_kv_heads = layout.format().num_kv_heads();
    let mut largest = vec![0.0; kv_len as usize * num_kv_heads as usize];
    if layout.format().element() != kv_quant::Element::Int8 {
        return Ok(largest);
    }
    let mut scales = vec![0f32; layout.format().num_groups(side) as usize];
    let rows = (0..kv_len).flat_map(|t| (0..num_kv_heads).map(move |head| (t, head)));
    let seen_from = request.spec.visible_any(kv_len).start;
    for ((t, head), largest) in rows.zip(&mut largest).filter(|((t, _), _)| *t >= seen_from) {
        let slot = request.page_table.slot(request_idx, t, layout.page_len()).unwrap_or(u64::MAX);
        kv_quant::read_scales(layout, cache, side, slot, head, &mut scales)?;
        *largest = scales.iter().fold(0.0, |amax, &x| f64::from(x).max(amax));
    }
    Ok(largest)
}

/// The oracle over a whole request: [`gather`] and [`decode`] for each sequence. `q` is
/// `[batch, q_len, num_q_heads, head_dim]`.
///
/// # Errors
/// What [`DecodeRequest::check`] refuses, or a `q` of another length.
pub fn decode_request(
    layout: &CacheLayout,
    cache: &CacheView<'_>,
    request: &DecodeRequest<'_>,
    q: FloatSlice<'_>,
) -> Result<Vec<OracleOutput>, Error> {
    request.check(layout)?;
    check_len("q", q.len(), request.spec.q_elements(request.batch()))?;
    let per_request = request.spec.q_elements(1);
    let mut outputs = Vec::with_capacity(request.batch());
    for (request_idx, &kv_len) in request.kv_lens.iter().enumerate() {
        let (k, v) = gather(layout, cache, request, request_idx)?;
        let mut q_f32 = vec![0f32; per_request];
        q.widen(request_idx * per_request, &mut q_f32);
        let q_f64: Vec<f64> = q_f32.iter().map(|&x| f64::from(x)).collect();
        let scales = |side| largest_scales(layout, cache, request, request_idx, side);
        let scales = (scales(Side::K)?, scales(Side::V)?);
        outputs.push(decode_scaled(request.spec, kv_len, &q_f64, &k, &v, scales)?);
    }
    Ok(outputs)
}
