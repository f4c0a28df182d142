//! The algebra of partial attention: `(o, m, l)` with the empty state as identity.
//!
//! Over a set of tokens with logits `s_t` and values `v_t`: `m = max s_t`, `l = sum exp(s_t - m)`,
//! `o = sum exp(s_t - m) v_t`. The attention output is `o / l`, the log-sum-exp is `m + ln l`. The empty set is
//! `m = -inf, l = 0, o = 0`. `docs/merge-math.md` has the proofs.

/// The scalar part of a partial state: running maximum and sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftmaxState {
    /// The largest logit; -inf for the empty set.
    pub m: f32,
    /// Sum of `exp(s - m)`; 0 for the empty set, at least 1 otherwise.
    pub l: f32,
}

impl SoftmaxState {
    /// Nothing seen yet.
    pub const EMPTY: Self = Self { m: f32::NEG_INFINITY, l: 0.0 };

    /// A single logit.
    pub fn single(logit: f32) -> Self {
        if logit == f32::NEG_INFINITY { Self::EMPTY } else { Self { m: logit, l: 1.0 } }
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.m == f32::NEG_INFINITY
    }

    /// Merges `other` in and returns the factors `(of self, of other)` by which the two `o` are to be scaled.
    ///
    /// An empty side has factor 0 and leaves the other side untouched, bit for bit: `-inf - -inf` is never computed.
    #[inline]
    pub fn merge(&mut self, other: Self) -> (f32, f32) {
        if other.is_empty() {
            return (1.0, 0.0);
        }
        if self.is_empty() {
            *self = other;
            return (0.0, 1.0);
        }
        let m = self.m.max(other.m);
        let (a, b) = ((self.m - m).exp(), (other.m - m).exp());
        *self = Self { m, l: self.l * a + other.l * b };
        (a, b)
    }

    /// Merges a partial row into a running one, `o` and `other_o` of one length: stage 2's inner step.
    #[inline]
    pub fn merge_row(&mut self, o: &mut [f32], other: Self, other_o: &[f32]) {
        if other.is_empty() {
            return;
        }
        let (a, b) = self.merge(other);
        // A factor of 0 belongs to an empty or vanished side: its o may not leak (0 * NaN).
        let scaled = |x: f32, factor: f32| if factor == 0.0 { 0.0 } else { x * factor };
        for (x, y) in o.iter_mut().zip(other_o) {
            *x = scaled(*x, a) + scaled(*y, b);
        }
    }

    /// Natural log of the softmax denominator; -inf for the empty set.
    pub fn lse(&self) -> f32 {
        if self.is_empty() { f32::NEG_INFINITY } else { self.m + self.l.ln() }
    }

    /// What `o` is to be multiplied with to give the output; 0 for the empty set.
    pub fn normalizer(&self) -> f32 {
        if self.l > 0.0 { 1.0 / self.l } else { 0.0 }
    }
}

/// A partial state of one query row: what stage 1 hands to stage 2.
/// ```
/// use attn_plan::Partial;
/// let mut state = Partial::empty(2);
/// state.merge(&Partial::token(1.0, &[4.0, 0.0]));
/// state.merge(&Partial::token(1.0, &[0.0, 2.0]));
/// assert_eq!(state.output(), [2.0, 1.0]);
/// assert_eq!(state.state.lse(), 1.0 + 2f32.ln());
/// assert_eq!(Partial::empty(2).output(), [0.0, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    /// Maximum and sum.
    pub state: SoftmaxState,
    /// Unnormalized output, `[head_dim]`.
    pub o: Vec<f32>,
}

impl Partial {
    /// The identity of [`Self::merge`].
    pub fn empty(head_dim: usize) -> Self {
        Self { state: SoftmaxState::EMPTY, o: vec![0.0; head_dim] }
    }

    /// The state of a single token.
    pub fn token(logit: f32, value: &[f32]) -> Self {
        Self { state: SoftmaxState::single(logit), o: value.to_vec() }
    }

    /// An attention sink: a logit with no value.
    pub fn sink(logit: f32, head_dim: usize) -> Self {
        Self { state: SoftmaxState::single(logit), o: vec![0.0; head_dim] }
    }

    /// Merges another state of the same row in. Associative and commutative up to rounding; empty is the identity.
    pub fn merge(&mut self, other: &Self) {
        self.state.merge_row(&mut self.o, other.state, &other.o);
    }

    /// The attention output; zeros for the empty state.
    pub fn output(&self) -> Vec<f32> {
        let factor = self.state.normalizer();
        self.o.iter().map(|x| x * factor).collect()
    }
}
