//! Changes of K that attention does not see, for keys with outlier channels: a rotation of every head, a fixed offset.
//!
//! Both are the caller's to apply, before append and on q; backends know nothing of them. They are exact in real arithmetic
//! and cost a rounding in f32, far below the quantization error that they save.

use crate::moments::{mean_turn, times};
use crate::{Error, RotaryPairs};

/// Turns every head of `x` (`[_, head_dim]`) by the orthonormal Walsh-Hadamard matrix, which is its own inverse.
///
/// Rotate q and K alike, after the rotary embedding: `q . k` stays what it is, whatever mask, soft-cap, ALiBi or sinks
/// follow, and an outlier channel is spread over the whole head. V may be rotated too if the output is rotated back.
/// `head_dim * log2(head_dim)` additions a head.
///
/// ```
/// let (mut q, mut k) = ([1.0, 2.0, 3.0, 4.0f32].repeat(4), [0.5, -1.0, 100.0, 0.25f32].repeat(4));
/// let dot = |q: &[f32], k: &[f32]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
/// let before = dot(&q, &k);
/// kv_quant::rotate_heads(&mut q, 16)?;
/// kv_quant::rotate_heads(&mut k, 16)?;
/// assert!((dot(&q, &k) - before).abs() < 1e-3);
/// # Ok::<(), kv_quant::Error>(())
/// ```
///
/// # Errors
/// [`Error::HeadDim`] if `head_dim` is no power of two that a cache can have; [`Error::Len`] if `x` is no whole number of
/// heads.
pub fn rotate_heads(x: &mut [f32], head_dim: u32) -> Result<(), Error> {
    if !head_dim.is_power_of_two() || !(crate::MIN_HEAD_DIM..=crate::MAX_HEAD_DIM).contains(&head_dim) {
        return Err(Error::HeadDim { head_dim });
    }
    let dim = head_dim as usize;
    if !x.len().is_multiple_of(dim) {
        return Err(Error::Len { what: "x", got: x.len(), want: x.len().next_multiple_of(dim) });
    }
    let factor = 1.0 / (head_dim as f32).sqrt();
    for head in x.chunks_exact_mut(dim) {
        let mut half = 1;
        while half < dim {
            for pair in head.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        head.iter_mut().for_each(|x| *x *= factor);
    }
    Ok(())
}

/// A fixed offset a channel, taken off every K: what a key bias leaves in the slowly rotating channels.
///
/// `q . offset` is one number for all tokens of a query, so softmax does not see it. One offset must serve all tokens of a
/// sequence, and of every sequence that shares its pages: take one for a layer and keep it. With soft-cap the constant does
/// not cancel; with sinks, or where lse is used, add [`Self::shift`] to what is compared with it.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyOffset {
    offsets: Vec<f32>,
}

impl KeyOffset {
    /// The mean of a sample, `[_, num_kv_heads, head_dim]` as stored (rotated). `row_elements` is
    /// `num_kv_heads * head_dim`.
    ///
    /// # Errors
    /// [`Error::Len`] if the sample is empty or no whole number of tokens.
    pub fn from_sample(k: &[f32], row_elements: usize) -> Result<Self, Error> {
        if k.is_empty() || row_elements == 0 || !k.len().is_multiple_of(row_elements) {
            let want = k.len().next_multiple_of(row_elements.max(1)).max(row_elements);
            return Err(Error::Len { what: "k", got: k.len(), want });
        }
        let mut sums = vec![0f64; row_elements];
        for row in k.chunks_exact(row_elements) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        let count = (k.len() / row_elements) as f64;
        Ok(Self { offsets: sums.iter().map(|sum| (sum / count) as f32).collect() })
    }

    /// What the mean would be if the sample's keys stood at each of the `num_positions` positions from their own on: the
    /// first positions alone say little of channels that turn slowly. `frequencies` are radians a position of each pair,
    /// `head_dim / 2`; 0 for a pair that is not turned.
    ///
    /// # Errors
    /// [`Error::Len`] if the offset is no whole number of heads of `2 * frequencies.len()` channels.
    pub fn over_positions(
        &self,
        frequencies: &[f64],
        pairs: RotaryPairs,
        num_positions: u32,
    ) -> Result<Self, Error> {
        let (half, len) = (frequencies.len(), self.offsets.len());
        if half == 0 || !len.is_multiple_of(2 * half) {
            return Err(Error::Len { what: "frequencies", got: half, want: len.div_ceil(2) });
        }
        let mut offsets = self.offsets.clone();
        for head in offsets.chunks_exact_mut(2 * half) {
            for (i, frequency) in frequencies.iter().enumerate() {
                let (x, y) = pairs.channels(i, half);
                let turned = times((head[x].into(), head[y].into()), mean_turn(*frequency, num_positions));
                (head[x], head[y]) = (turned.0 as f32, turned.1 as f32);
            }
        }
        Ok(Self { offsets })
    }

    /// The offsets, `[num_kv_heads, head_dim]`.
    pub fn offsets(&self) -> &[f32] {
        &self.offsets
    }

    /// Takes the offset off every row of `k`, `[_, num_kv_heads, head_dim]`. An incomplete last row is left alone.
    pub fn subtract(&self, k: &mut [f32]) {
        for row in k.chunks_exact_mut(self.offsets.len()) {
            row.iter_mut().zip(&self.offsets).for_each(|(x, offset)| *x -= offset);
        }
    }

    /// How much smaller every logit of one query row is: `softmax_scale * q . offset` of its kv head.
    pub fn shift(&self, q: &[f32], kv_head: u32, softmax_scale: f32) -> f32 {
        let start = kv_head as usize * q.len();
        let offsets = self.offsets.get(start..start + q.len()).unwrap_or_default();
        softmax_scale * q.iter().zip(offsets).map(|(q, offset)| q * offset).sum::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_is_its_own_inverse_and_spreads_an_outlier() {
        let mut x = vec![0f32; 128];
        x[64 + 5] = 64.0;
        let before = x.clone();
        rotate_heads(&mut x, 64).unwrap();
        assert!(x[..64].iter().all(|x| *x == 0.0) && x[64..].iter().all(|x| x.abs() == 8.0));
        rotate_heads(&mut x, 64).unwrap();
        assert_eq!(x, before);
        assert_eq!(rotate_heads(&mut x, 80), Err(Error::HeadDim { head_dim: 80 }));
        assert!(matches!(rotate_heads(&mut x[1..], 64), Err(Error::Len { .. })));
    }

    #[test]
    fn an_offset_shifts_all_logits_of_a_query_alike() {
        let k: Vec<f32> =
            (0..5 * 32).map(|i| ((i * 7) % 11) as f32 + if i % 32 == 3 { 100.0 } else { 0.0 }).collect();
        let q: Vec<f32> = (0..16).map(|i| (i as f32 * 0.9).cos()).collect();
        let offset = KeyOffset::from_sample(&k, 32).unwrap();
        let mut shifted = k.clone();
        offset.subtract(&mut shifted);
        let dot = |k: &[f32]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
        for (kv_head, start) in [(0, 0), (1, 16)] {
            let shift = offset.shift(&q, kv_head, 1.0);
            for (row, shifted) in k.chunks_exact(32).zip(shifted.chunks_exact(32)) {
                let change = dot(&row[start..start + 16]) - dot(&shifted[start..start + 16]);
                assert!((change - shift).abs() < 1e-3, "{change} {shift}");
            }
        }
        assert!(offset.over_positions(&[0.0; 5], RotaryPairs::Halves, 4).is_err());
        assert!(KeyOffset::from_sample(&k[1..], 32).is_err() && KeyOffset::from_sample(&[], 32).is_err());
    }
    #[test]
    fn an_offset_over_positions_is_the_mean_of_keys_that_were_turned() {
        let k: Vec<f32> = (0..3 * 32).map(|i| (i as f32 * 0.9).sin() + 0.5).collect();
        let frequencies = [0.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 2.0];
        for pairs in [RotaryPairs::Neighbours, RotaryPairs::Halves] {
            let mut turned = Vec::new();
            for position in 0..50 {
                for head in k.chunks_exact(16) {
                    let mut out = head.to_vec();
                    for (i, frequency) in frequencies.iter().enumerate() {
                        let (x, y) = pairs.channels(i, 8);
                        let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                        let (a, b) = times((head[x].into(), head[y].into()), (cos, sin));
                        (out[x], out[y]) = (a as f32, b as f32);
                    }
                    turned.extend(out);
                }
            }
            let want = KeyOffset::from_sample(&turned, 32).unwrap();
            let got =
                KeyOffset::from_sample(&k, 32).unwrap().over_positions(&frequencies, pairs, 50).unwrap();
            for (got, want) in got.offsets().iter().zip(want.offsets()) {
                assert!((got - want).abs() < 1e-5, "{pairs:?} {got} {want}");
            }
        }
    }
}
