//! Advice on the format: what INT8 would cost a model, from a short sample of its K and V.
//!
//! A bias in the key projection gives some channels of K a large constant part. Softmax does not see it, but the scale of
//! its group does: the step grows with the bias and drowns the channels beside it. Models with such biases collapse at
//! large groups. Errors are therefore measured against what softmax can see of K: its deviation from the mean over tokens.

use crate::{CacheFormat, Element, Error, GROUP_LENS, ScaleType, Side, quantize_group};

/// K and V of one layer, a few hundred tokens of ordinary text: `[num_tokens, num_kv_heads, head_dim]`, K as it is stored
/// (rotated).
#[derive(Clone, Copy, Debug)]
pub struct LayerSample<'a> {
    /// Keys.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// Queries of some of the tokens, `[_, num_q_heads, head_dim]`, rotated. Without them every direction of K counts alike.
    pub q: Option<&'a [f32]>,
}

/// What is asked of the advice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdviceOptions {
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Query heads of [`LayerSample::q`]; a multiple of `num_kv_heads`.
    pub num_q_heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Scale type that will be used.
    pub scale_type: ScaleType,
    /// The largest relative error of a head: of logits for K, of values for V. 0.02 is within what models bear unnoticed.
    pub budget: f64,
    /// A channel is an outlier if its largest magnitude is this many times the median channel's.
    pub outlier_ratio: f32,
}

impl AdviceOptions {
    /// As many query heads as kv heads, f16 scales, a budget of 2 %, outliers from 8 times the median.
    pub fn new(num_kv_heads: u32, head_dim: u32) -> Self {
        Self {
            num_kv_heads,
            num_q_heads: num_kv_heads,
            head_dim,
            scale_type: ScaleType::F16,
            budget: 0.02,
            outlier_ratio: 8.0,
        }
    }
}

/// A channel far larger than the others of its head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutlierChannel {
    /// Which.
    pub channel: u32,
    /// Its largest magnitude over that of the median channel.
    pub ratio: f32,
    /// Share of its energy that is the same for all tokens: near 1 for a bias.
    pub constant_share: f32,
}

/// What one group length does to one head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupError {
    /// Channels a scale.
    pub group_len: u32,
    /// Relative error: of logits for K, of values for V.
    pub error: f64,
    /// The same for K if its mean over tokens were subtracted before; equal to `error` for V.
    pub error_with_offset: f64,
    /// The same for K if q and K were rotated ([`crate::rotate_heads`]); equal to `error` for V, and where the head
    /// dimension is no power of two.
    pub error_rotated: f64,
    /// Share of codes at the ends of the range, +-127. Each group has one; many mean clipped inputs.
    pub saturated: f64,
    /// Share of non-zero values that become 0: drowned by a neighbour.
    pub drowned: f64,
}

/// One head of one side.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadReport {
    /// K or V.
    pub side: Side,
    /// Which kv head.
    pub head: u32,
    /// Largest magnitude.
    pub amax: f32,
    /// Channels far larger than the others.
    pub outliers: Vec<OutlierChannel>,
    /// Ascending group lengths.
    pub errors: Vec<GroupError>,
}

impl HeadReport {
    /// Whether K has large channels that are mostly the same for all tokens: what a bias of the key projection leaves, as
    /// in Qwen2.5. Long groups collapse there.
    pub fn has_key_bias(&self) -> bool {
        self.side == Side::K && self.outliers.iter().any(|outlier| outlier.constant_share > 0.5)
    }
}

/// One layer: its heads, K before V, and the largest group lengths within the budget.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerAdvice {
    /// `2 * num_kv_heads` reports.
    pub heads: Vec<HeadReport>,
    /// For K; `None` if even the smallest group is over the budget.
    pub k_group_len: Option<u32>,
    /// For V.
    pub v_group_len: Option<u32>,
    /// For K with its mean subtracted.
    pub k_group_len_with_offset: Option<u32>,
    /// For q and K rotated.
    pub k_group_len_rotated: Option<u32>,
}

/// One format for a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Recommendation {
    /// The format of all layers but the unquantized; `None` if no layer fits the budget.
    pub format: Option<CacheFormat>,
    /// Layers that the format would take over the budget.
    pub unquantized_layers: Vec<usize>,
    /// Bytes of a token over all layers, the unquantized in f16.
    pub bytes_per_token: u64,
}

/// The advice for a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// Layer by layer.
    pub layers: Vec<LayerAdvice>,
    /// With q and K as they are.
    pub plain: Recommendation,
    /// With q and K rotated ([`crate::rotate_heads`]).
    pub rotated: Recommendation,
}

/// Group lengths that a head dimension has, ascending.
fn group_lens(head_dim: u32) -> Vec<u32> {
    let mut lens: Vec<u32> = GROUP_LENS.into_iter().filter(|len| head_dim.is_multiple_of(*len)).collect();
    if !lens.contains(&head_dim) {
        lens.push(head_dim);
    }
    lens.sort_unstable();
    lens
}

/// Reports on each layer and head, and recommends the cheapest format within the budget.
///
/// # Errors
/// Shapes that no cache has; `num_q_heads` that is no multiple of `num_kv_heads`; arrays that are no whole number of tokens
/// or empty; non-finite values; scales beyond the scale type.
pub fn advise(layers: &[LayerSample<'_>], options: &AdviceOptions) -> Result<Advice, Error> {
    let AdviceOptions { num_kv_heads, head_dim, scale_type, .. } = *options;
    CacheFormat::new(num_kv_heads, head_dim, head_dim, head_dim, scale_type)?;
    let layers = layers.iter().map(|sample| layer(sample, options)).collect::<Result<Vec<_>, _>>()?;
    let plain = recommend(&layers, options, |layer| layer.k_group_len)?;
    let rotated = recommend(&layers, options, |layer| layer.k_group_len_rotated)?;
    Ok(Advice { layers, plain, rotated })
}

/// The fewest bytes within the budget, `k_group_len` being the longest that K of a layer bears.
fn recommend(
    layers: &[LayerAdvice],
    options: &AdviceOptions,
    k_group_len: fn(&LayerAdvice) -> Option<u32>,
) -> Result<Recommendation, Error> {
    let AdviceOptions { num_kv_heads, head_dim, scale_type, .. } = *options;
    let f16 = CacheFormat::unquantized(num_kv_heads, head_dim, crate::FloatType::F16)?.bytes_per_token();
    let mut best = Recommendation {
        format: None,
        unquantized_layers: (0..layers.len()).collect(),
        bytes_per_token: f16 * layers.len() as u64,
    };
    for &k in group_lens(head_dim).iter().rev() {
        for &v in group_lens(head_dim).iter().rev() {
            let fits = |l: &LayerAdvice| {
                k_group_len(l).is_some_and(|len| len >= k) && l.v_group_len.is_some_and(|len| len >= v)
            };
            let out: Vec<usize> = (0..layers.len()).filter(|i| !layers.get(*i).is_some_and(fits)).collect();
            let format = CacheFormat::new(num_kv_heads, head_dim, k, v, scale_type)?;
            let bytes = f16 * out.len() as u64 + format.bytes_per_token() * (layers.len() - out.len()) as u64;
            if bytes < best.bytes_per_token {
                best =
                    Recommendation { format: Some(format), unquantized_layers: out, bytes_per_token: bytes };
            }
        }
    }
    Ok(best)
}

fn layer(sample: &LayerSample<'_>, options: &AdviceOptions) -> Result<LayerAdvice, Error> {
    let row = options.num_kv_heads as usize * options.head_dim as usize;
    let num_tokens = (sample.k.len() / row).max(1);
    for (what, x) in [("k", sample.k), ("v", sample.v)] {
        if x.len() != num_tokens * row {
            return Err(Error::Len { what, got: x.len(), want: num_tokens * row });
        }
    }
    let (num_q_heads, num_kv_heads) = (options.num_q_heads as usize, options.num_kv_heads as usize);
    if num_q_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
        return Err(Error::Len { what: "num_q_heads", got: num_q_heads, want: num_kv_heads });
    }
    let q_row = num_q_heads * options.head_dim as usize;
    if let Some(q) = sample.q
        && !q.len().is_multiple_of(q_row)
    {
        return Err(Error::Len { what: "q", got: q.len(), want: q.len().next_multiple_of(q_row) });
    }
    let mut heads = Vec::new();
    for (side, x) in [(Side::K, sample.k), (Side::V, sample.v)] {
        for head in 0..options.num_kv_heads {
            heads.push(one_head(side, head, x, sample, options)?);
        }
    }
    let largest = |side: Side, error: fn(&GroupError) -> f64| {
        group_lens(options.head_dim).into_iter().rev().find(|len| {
            heads
                .iter()
                .filter(|h| h.side == side)
                .all(|h| h.errors.iter().any(|e| e.group_len == *len && error(e) <= options.budget))
        })
    };
    let (k_group_len, v_group_len) = (largest(Side::K, |e| e.error), largest(Side::V, |e| e.error));
    let k_group_len_with_offset = largest(Side::K, |e| e.error_with_offset);
    let k_group_len_rotated = largest(Side::K, |e| e.error_rotated);
    Ok(LayerAdvice { k_group_len, v_group_len, k_group_len_with_offset, k_group_len_rotated, heads })
}

fn one_head(
    side: Side,
    head: u32,
    x: &[f32],
    sample: &LayerSample<'_>,
    options: &AdviceOptions,
) -> Result<HeadReport, Error> {
    let dim = options.head_dim as usize;
    let row = options.num_kv_heads as usize * dim;
    let mut rows: Vec<f32> = Vec::with_capacity(x.len() / options.num_kv_heads as usize);
    for (token, x) in x.chunks_exact(row).enumerate() {
        let x = x.get(head as usize * dim..(head as usize + 1) * dim).unwrap_or_default();
        if let Some(channel) = x.iter().position(|x| !x.is_finite()) {
            return Err(Error::NonFinite { side, token, head, channel: channel as u32 });
        }
        rows.extend_from_slice(x);
    }
    let mean = column_means(&rows, dim);
    let centred: Vec<f32> = rows
        .chunks_exact(dim)
        .flat_map(|x| x.iter().zip(&mean).map(|(x, m)| (f64::from(*x) - m) as f32))
        .collect();
    // The queries that read this head: consecutive ones.
    let queries: Option<Vec<f32>> = sample.q.filter(|_| side == Side::K).map(|q| {
        let num_q_heads = options.num_q_heads as usize;
        let gqa_group = num_q_heads / options.num_kv_heads as usize;
        let own = |i: &usize| i % num_q_heads / gqa_group == head as usize;
        q.chunks_exact(dim).enumerate().filter(|(i, _)| own(i)).flat_map(|(_, q)| q.iter().copied()).collect()
    });
    let signal = if side == Side::K { &centred } else { &rows };
    let mut errors = Vec::new();
    for group_len in group_lens(options.head_dim) {
        let plain = quantized(&rows, group_len as usize, options.scale_type)?;
        let error = relative(signal, &plain.noise, queries.as_deref(), dim, side);
        let error_with_offset = match side {
            Side::K => {
                let shifted = quantized(&centred, group_len as usize, options.scale_type)?;
                relative(signal, &shifted.noise, queries.as_deref(), dim, side)
            }
            Side::V => error,
        };
        let mut error_rotated = error;
        if side == Side::K && options.head_dim.is_power_of_two() {
            let mut rotated = rows.clone();
            crate::rotate_heads(&mut rotated, options.head_dim)?;
            let mut noise = quantized(&rotated, group_len as usize, options.scale_type)?.noise;
            crate::rotate_heads(&mut noise, options.head_dim)?;
            error_rotated = relative(signal, &noise, queries.as_deref(), dim, side);
        }
        let GroupCounts { saturated, drowned, .. } = plain;
        errors.push(GroupError { group_len, error, error_with_offset, error_rotated, saturated, drowned });
    }
    let amax = rows.iter().fold(0f32, |a, x| a.max(x.abs()));
    Ok(HeadReport { side, head, amax, outliers: outliers(&rows, &mean, dim, options.outlier_ratio), errors })
}

fn column_means(rows: &[f32], dim: usize) -> Vec<f64> {
    let mut mean = vec![0f64; dim];
    for row in rows.chunks_exact(dim) {
        mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += f64::from(*x));
    }
    let count = (rows.len() / dim).max(1) as f64;
    mean.iter_mut().for_each(|mean| *mean /= count);
    mean
}

struct GroupCounts {
    noise: Vec<f32>,
    saturated: f64,
    drowned: f64,
}

fn quantized(rows: &[f32], group_len: usize, scale_type: ScaleType) -> Result<GroupCounts, Error> {
    let mut noise = Vec::with_capacity(rows.len());
    let (mut saturated, mut drowned, mut non_zero) = (0u64, 0u64, 0u64);
    let mut codes = vec![0i8; group_len];
    for group in rows.chunks_exact(group_len) {
        let Some(scale) = quantize_group(group, scale_type, &mut codes) else {
            let amax = group.iter().fold(0f32, |a, x| a.max(x.abs()));
            let (side, token, head, channel) = (Side::K, 0, 0, 0);
            return Err(Error::ScaleOverflow { side, token, head, channel, scale: amax / 127.0, scale_type });
        };
        for (&x, &code) in group.iter().zip(&codes) {
            noise.push((f64::from(code) * f64::from(scale.value) - f64::from(x)) as f32);
            saturated += u64::from(code.unsigned_abs() == 127);
            non_zero += u64::from(x != 0.0);
            drowned += u64::from(x != 0.0 && code == 0);
        }
    }
    let share = |count: u64, of: u64| count as f64 / of.max(1) as f64;
    Ok(GroupCounts {
        noise,
        saturated: share(saturated, rows.len() as u64),
        drowned: share(drowned, non_zero),
    })
}

/// Size of `noise` over that of `signal`: as logits of the queries if there are any (their mean over tokens taken off:
/// softmax does not see it), else over all elements.
fn relative(signal: &[f32], noise: &[f32], queries: Option<&[f32]>, dim: usize, side: Side) -> f64 {
    let energy = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let (noise_energy, signal_energy) = match queries.filter(|q| !q.is_empty()) {
        None if side == Side::K => {
            let mean = column_means(noise, dim);
            let rows = (noise.len() / dim) as f64;
            ((energy(noise) - rows * mean.iter().map(|m| m * m).sum::<f64>()).max(0.0), energy(signal))
        }
        None => (energy(noise), energy(signal)),
        Some(queries) => {
            let spread = |x: &[f32]| {
                let mut sum = 0.0;
                for q in queries.chunks_exact(dim) {
                    let dot = |row: &[f32]| {
                        q.iter().zip(row).map(|(q, x)| f64::from(*q) * f64::from(*x)).sum::<f64>()
                    };
                    let logits: Vec<f64> = x.chunks_exact(dim).map(dot).collect();
                    let mean = logits.iter().sum::<f64>() / logits.len().max(1) as f64;
                    sum += logits.iter().map(|s| (s - mean).powi(2)).sum::<f64>();
                }
                sum
            };
            (spread(noise), spread(signal))
        }
    };
    if noise_energy == 0.0 { 0.0 } else { (noise_energy / signal_energy).sqrt() }
}

fn outliers(rows: &[f32], mean: &[f64], dim: usize, ratio: f32) -> Vec<OutlierChannel> {
    let (mut amax, mut energy) = (vec![0f32; dim], vec![0f64; dim]);
    for row in rows.chunks_exact(dim) {
        for ((amax, energy), x) in amax.iter_mut().zip(&mut energy).zip(row) {
            *amax = amax.max(x.abs());
            *energy += f64::from(*x).powi(2);
        }
    }
    let mut sorted = amax.clone();
    sorted.sort_unstable_by(f32::total_cmp);
    let median = sorted.get(dim / 2).copied().unwrap_or(0.0);
    let num_rows = (rows.len() / dim) as f64;
    let channels = amax.iter().zip(&energy).zip(mean).enumerate();
    channels
        .filter(|(_, ((amax, _), _))| median > 0.0 && **amax > ratio * median)
        .map(|(channel, ((amax, energy), mean))| OutlierChannel {
            channel: channel as u32,
            ratio: amax / median,
            constant_share: (mean * mean * num_rows / energy.max(f64::MIN_POSITIVE)) as f32,
        })
        .collect()
}

impl Recommendation {
    /// Whether a layer's heads all fit the budget at some group length.
    pub fn is_quantized(&self, layer: usize) -> bool {
        self.format.is_some_and(|format| format.element() == Element::Int8)
            && !self.unquantized_layers.contains(&layer)
    }
}
