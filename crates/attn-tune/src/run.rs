//! What changes from step to step, and how far two steps are from each other.

use attn_plan::DecodeSpec;
use serde::{Deserialize, Serialize};

/// A step, reduced to what its speed depends on.
/// ```
/// use attn_tune::RunKey;
/// let run = RunKey::of([1000, 3000], 8);
/// assert_eq!((run.batch, run.kv_tokens, run.longest), (2, 4000, 3000));
/// assert_eq!(run.distance(&run), 0.0);
/// assert_eq!(run.distance(&RunKey { kv_tokens: 8000, longest: 6000, ..run }), 1.0); // twice as long: one octave
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RunKey {
    /// Requests.
    pub batch: u32,
    /// kv heads of the cache on this device.
    pub num_kv_heads: u32,
    /// Sum of the lengths that are read.
    pub kv_tokens: u64,
    /// The longest of them.
    pub longest: u32,
}

impl RunKey {
    /// The key of a batch of these visible lengths.
    pub fn of(visible_lens: impl IntoIterator<Item = u32>, num_kv_heads: u32) -> Self {
        let mut run = Self { batch: 0, num_kv_heads, kv_tokens: 0, longest: 0 };
        for visible_len in visible_lens {
            run.batch = run.batch.saturating_add(1);
            run.kv_tokens += u64::from(visible_len);
            run.longest = run.longest.max(visible_len);
        }
        run
    }

    /// The key of a step: of each request, the tokens that its mask shows.
    pub fn of_step(spec: &DecodeSpec, kv_lens: &[u32]) -> Self {
        Self::of(kv_lens.iter().map(|&kv_len| spec.visible_any(kv_len).len() as u32), spec.num_kv_heads)
    }

    /// `[rows of the cache, (request, head) pairs, raggedness]`, each as a logarithm to base 2. Raggedness is the longest
    /// length over the mean: 0 for a uniform batch.
    pub(crate) fn coordinates(&self) -> [f32; 3] {
        let heads = self.num_kv_heads.max(1) as f32;
        let (batch, tokens) = (self.batch.max(1) as f32, self.kv_tokens.max(1) as f32);
        let ragged = (self.longest.max(1) as f32 * batch / tokens).max(1.0);
        [(tokens * heads).log2(), (batch * heads).log2(), ragged.log2()]
    }

    /// How far apart, in octaves: the largest difference of the coordinates. The size of the work says most about what is
    /// best for it, how it is divided less: a request more or less, and uneven lengths, count half.
    pub fn distance(&self, other: &Self) -> f32 {
        Self::between(&self.coordinates(), &other.coordinates())
    }

    /// [`Self::distance`] of two [`Self::coordinates`].
    pub(crate) fn between(a: &[f32; 3], b: &[f32; 3]) -> f32 {
        let [size, requests, ragged] = [0, 1, 2].map(|axis: usize| (a[axis] - b[axis]).abs());
        size.max(requests * 0.5).max(ragged * 0.5)
    }
}

impl std::fmt::Display for RunKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { batch, num_kv_heads, kv_tokens, longest } = self;
        write!(f, "{batch} requests, {kv_tokens} tokens (longest {longest}), {num_kv_heads} kv heads")
    }
}
