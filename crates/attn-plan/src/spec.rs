//! The static part of a decode step: shapes, scale, mask, types. It does not change from step to step.

use crate::Error;
use kv_quant::FloatType;

/// The most query heads.
pub const MAX_Q_HEADS: u32 = 65536;
/// The most new tokens a sequence of one step.
pub const MAX_Q_LEN: u32 = 1024;

/// Everything that a decode step can ask apart from the batch itself.
///
/// With `p = kv_len - q_len + i` the position of new token `i` and `t` that of a cached token, the logit is
/// `s = softmax_scale * q.k`, then `soft_cap * tanh(s / soft_cap)`, then `+ alibi_slopes[head] * (t - p)`.
/// Token `t` is visible if `t <= p` and, with a window, `t > p - window`.
/// ```
/// use attn_plan::{DecodeSpec, Error};
/// // Two new tokens a sequence, each seeing the latest 4 tokens.
/// let spec = DecodeSpec { q_len: 2, window: Some(4), ..DecodeSpec::new(14, 2, 64) };
/// assert_eq!(spec.gqa_group(), 7);
/// assert_eq!((spec.visible(10, 0), spec.visible(10, 1)), (5..9, 6..10));
/// assert_eq!(DecodeSpec { window: Some(0), ..spec }.check(), Err(Error::Window));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct DecodeSpec {
    /// Query heads; a multiple of `num_kv_heads`. Query head `h` reads kv head `h / gqa_group`.
    pub num_q_heads: u32,
    /// Heads of the cache.
    pub num_kv_heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// New tokens of each sequence, causal among themselves, already in the cache and counted in `kv_len`.
    pub q_len: u32,
    /// Factor of q.k, usually `1 / sqrt(head_dim)`.
    pub softmax_scale: f32,
    /// Sliding window: how many of the latest tokens a query sees, its own included.
    pub window: Option<u32>,
    /// Logit soft-cap.
    pub soft_cap: Option<f32>,
    /// ALiBi slopes, one a query head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Attention sinks, one logit a query head: a share of the softmax that has no value. It counts in lse.
    pub sinks: Option<Vec<f32>>,
    /// Element type of q.
    pub q_type: FloatType,
    /// Element type of the output.
    pub out_type: FloatType,
    /// Whether lse (natural log of the softmax denominator) is wanted.
    pub want_lse: bool,
}

impl DecodeSpec {
    /// One new token, `softmax_scale = 1 / sqrt(head_dim)`, no mask but causality, f16 in and out, no lse.
    pub fn new(num_q_heads: u32, num_kv_heads: u32, head_dim: u32) -> Self {
        Self {
            num_q_heads,
            num_kv_heads,
            head_dim,
            q_len: 1,
            softmax_scale: 1.0 / (head_dim.max(1) as f32).sqrt(),
            window: None,
            soft_cap: None,
            alibi_slopes: None,
            sinks: None,
            q_type: FloatType::F16,
            out_type: FloatType::F16,
            want_lse: false,
        }
    }

    /// Query heads a kv head. 0 for a spec that [`Self::check`] refuses.
    pub fn gqa_group(&self) -> u32 {
        self.num_q_heads.checked_div(self.num_kv_heads).unwrap_or(0)
    }

    /// Elements of q and of the output for a batch: `[batch, q_len, num_q_heads, head_dim]`.
    pub fn q_elements(&self, batch: usize) -> usize {
        batch
            .saturating_mul(self.q_len as usize)
            .saturating_mul(self.num_q_heads as usize)
            .saturating_mul(self.head_dim as usize)
    }

    /// Elements of lse for a batch: `[batch, q_len, num_q_heads]`.
    pub fn lse_elements(&self, batch: usize) -> usize {
        batch.saturating_mul(self.q_len as usize).saturating_mul(self.num_q_heads as usize)
    }

    /// Tokens that query row `q_idx` of a sequence of `kv_len` tokens sees: a half-open range, empty if none.
    pub fn visible(&self, kv_len: u32, q_idx: u32) -> std::ops::Range<u32> {
        // One past the query's own position.
        let end = (i64::from(kv_len) - i64::from(self.q_len) + i64::from(q_idx) + 1).max(0) as u32;
        let start = self.window.map_or(0, |window| end.saturating_sub(window));
        start..end
    }

    /// Tokens that any query row of the sequence sees: from the first row's oldest token to the end.
    pub fn visible_any(&self, kv_len: u32) -> std::ops::Range<u32> {
        if kv_len == 0 || self.q_len == 0 || self.window == Some(0) {
            return kv_len..kv_len;
        }
        // Rows before position 0 see nothing; from the first real one on, each row sees at least its own token.
        let first = self.q_len.saturating_sub(kv_len);
        self.visible(kv_len, first).start..kv_len
    }

    /// Refuses numbers that mean nothing.
    pub fn check(&self) -> Result<(), Error> {
        if self.num_kv_heads == 0 || self.num_kv_heads > 65535 {
            return Err(Error::NumKvHeads(self.num_kv_heads));
        }
        let num_q_heads = self.num_q_heads;
        if num_q_heads == 0 || num_q_heads > MAX_Q_HEADS || !num_q_heads.is_multiple_of(self.num_kv_heads) {
            return Err(Error::NumQHeads { num_q_heads, num_kv_heads: self.num_kv_heads, max: MAX_Q_HEADS });
        }
        if !(kv_quant::MIN_HEAD_DIM..=kv_quant::MAX_HEAD_DIM).contains(&self.head_dim) {
            return Err(Error::HeadDim(self.head_dim));
        }
        if self.q_len == 0 || self.q_len > MAX_Q_LEN {
            return Err(Error::QLen { q_len: self.q_len, max: MAX_Q_LEN });
        }
        if !self.softmax_scale.is_finite() {
            return Err(Error::SoftmaxScale(self.softmax_scale));
        }
        if self.window == Some(0) {
            return Err(Error::Window);
        }
        if let Some(cap) = self.soft_cap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(Error::SoftCap(cap));
        }
        for (what, array) in [("alibi_slopes", &self.alibi_slopes), ("sinks", &self.sinks)] {
            let Some(array) = array else { continue };
            if array.len() != num_q_heads as usize {
                return Err(Error::PerHead { what, got: array.len(), want: num_q_heads });
            }
            if let Some((head, &value)) = array.iter().enumerate().find(|(_, x)| !x.is_finite()) {
                return Err(Error::PerHeadValue { what, head, value });
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for DecodeSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { num_q_heads, num_kv_heads, head_dim, q_len, q_type, out_type, .. } = self;
        write!(f, "decode q{num_q_heads} kv{num_kv_heads} d{head_dim} q_len{q_len} {q_type}->{out_type}")?;
        if let Some(window) = self.window {
            write!(f, " window{window}")?;
        }
        if let Some(cap) = self.soft_cap {
            write!(f, " cap{cap}")?;
        }
        for (name, on) in
            [("alibi", self.alibi_slopes.is_some()), ("sinks", self.sinks.is_some()), ("lse", self.want_lse)]
        {
            if on {
                write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}
