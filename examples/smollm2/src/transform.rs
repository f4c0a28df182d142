//! What can be done to K and V before they are stored: rounding rules to compare with, and changes of basis under which
//! attention is the same in exact arithmetic.

use crate::cache::Transform;
use anyhow::Result;
use kv_quant::{KeyOffset, ScaleType, ShapedRounding, quantize_value, rotate_heads, round_scale_up};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rayon::prelude::*;
use std::sync::mpsc::Sender;

/// How a value becomes a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// The format's rule: to nearest, ties to even; scale rounded up.
    HalfEven,
    /// LightLLM's: scale `amax / 127` rounded to nearest, the quotient cut off toward zero. (A quotient beyond 127 is not
    /// defined there; here it saturates, which flatters the rule.)
    TowardZero,
}

/// Rounds K, V or both as an INT8 cache would and hands back the dequantized values, to be stored unquantized.
#[derive(Clone, Copy, Debug)]
pub struct FakeQuant {
    /// Channels a scale for K; `None` leaves K alone.
    pub k_group_len: Option<usize>,
    /// The same for V.
    pub v_group_len: Option<usize>,
    /// Scale type.
    pub scale_type: ScaleType,
    /// Rule.
    pub rounding: Rounding,
}

impl FakeQuant {
    fn round(&self, group: &mut [f32]) {
        let amax = group.iter().fold(0f32, |amax, x| amax.max(x.abs()));
        match self.rounding {
            Rounding::HalfEven => {
                let Some(scale) = round_scale_up(amax, self.scale_type) else { return };
                for x in group {
                    *x = f32::from(quantize_value(*x, scale.value)) * scale.value;
                }
            }
            Rounding::TowardZero => {
                let scale = match self.scale_type {
                    ScaleType::F16 => half::f16::from_f32(amax / 127.0).to_f32(),
                    ScaleType::Bf16 => half::bf16::from_f32(amax / 127.0).to_f32(),
                    ScaleType::F32 => amax / 127.0,
                };
                for x in group {
                    let code = if scale == 0.0 { 0.0 } else { (*x / scale).trunc().clamp(-127.0, 127.0) };
                    *x = code * scale;
                }
            }
        }
    }
}

impl Transform for FakeQuant {
    fn before(&mut self, _: usize, _: &mut [f32], k: &mut [f32], v: &mut [f32]) -> Result<()> {
        for (group_len, x) in [(self.k_group_len, k), (self.v_group_len, v)] {
            if let Some(group_len) = group_len {
                x.chunks_exact_mut(group_len).for_each(|group| self.round(group));
            }
        }
        Ok(())
    }
}

/// Takes a fixed offset a channel off every K, then (if `rotate`) turns every head of q and K.
#[derive(Clone, Debug)]
pub struct SmoothKeys {
    /// One a layer; none for no offset.
    pub offsets: Vec<KeyOffset>,
    /// Whether q and K are rotated.
    pub rotate: bool,
    /// Channels of a head, a power of two if rotated.
    pub head_dim: usize,
}

impl Transform for SmoothKeys {
    fn before(&mut self, layer: usize, q: &mut [f32], k: &mut [f32], _: &mut [f32]) -> Result<()> {
        if let Some(offset) = self.offsets.get(layer) {
            offset.subtract(k);
        }
        if self.rotate {
            rotate_heads(q, self.head_dim as u32)?;
            rotate_heads(k, self.head_dim as u32)?;
        }
        Ok(())
    }
}

/// Moves K and V onto codes whose error is seen least by what reads them.
#[derive(Clone, Debug)]
pub struct Shape {
    /// One a layer; none for a layer that is not quantized.
    pub k: Vec<Option<ShapedRounding>>,
    /// The same for V.
    pub v: Vec<Option<ShapedRounding>>,
    /// Elements of a token's K.
    pub row_elements: usize,
}

/// Tokens that one thread shapes at a time.
const SHAPED_TOGETHER: usize = 8;

impl Transform for Shape {
    fn before(&mut self, layer: usize, _: &mut [f32], k: &mut [f32], v: &mut [f32]) -> Result<()> {
        for (side, x) in [(&self.k, k), (&self.v, v)] {
            if let Some(Some(rounding)) = side.get(layer) {
                let rows = x.par_chunks_mut(SHAPED_TOGETHER * self.row_elements);
                rows.try_for_each(|rows| rounding.shape(rows))?;
            }
        }
        Ok(())
    }
}

/// Changes q, K and V by up to one part in a million, as another order of addition would, so that values near the middle of
/// two codes fall the other way: what an INT8 cache makes of a prompt is one draw of many, and this draws again.
pub struct Jitter {
    rng: StdRng,
}

impl Jitter {
    /// The largest relative change.
    pub const SIZE: f32 = 1e-6;

    /// The same seed draws the same.
    pub fn new(seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed) }
    }
}

impl Transform for Jitter {
    fn before(&mut self, _: usize, q: &mut [f32], k: &mut [f32], v: &mut [f32]) -> Result<()> {
        for x in q.iter_mut().chain(k).chain(v) {
            *x *= 1.0 + self.rng.random_range(-Self::SIZE..=Self::SIZE);
        }
        Ok(())
    }
}

/// What passed by in one layer: q `[n, num_q_heads, head_dim]`, K and V `[n, num_kv_heads, head_dim]`, q and K rotated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recorded {
    /// Queries.
    pub q: Vec<f32>,
    /// Keys.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
}

impl Recorded {
    /// Adds the tokens of another chunk.
    pub fn extend(&mut self, other: Self) {
        self.q.extend(other.q);
        self.k.extend(other.k);
        self.v.extend(other.v);
    }
}

/// Hands on what passes by, with its layer, for calibration and advice.
pub struct Record {
    /// Where it goes.
    pub sender: Sender<(usize, Recorded)>,
}

impl Transform for Record {
    fn before(&mut self, layer: usize, q: &mut [f32], k: &mut [f32], v: &mut [f32]) -> Result<()> {
        let recorded = Recorded { q: q.to_vec(), k: k.to_vec(), v: v.to_vec() };
        Ok(self.sender.send((layer, recorded))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncation_is_a_whole_step_off_and_shrinks() {
        let mut half_even = vec![1.0, 0.999 / 127.0, -0.999 / 127.0, 0.0];
        let mut toward_zero = half_even.clone();
        let fake = FakeQuant {
            k_group_len: Some(4),
            v_group_len: None,
            scale_type: ScaleType::F32,
            rounding: Rounding::HalfEven,
        };
        fake.round(&mut half_even);
        FakeQuant { rounding: Rounding::TowardZero, ..fake }.round(&mut toward_zero);
        assert!((half_even[1] - 1.0 / 127.0).abs() < 1e-6);
        assert_eq!(toward_zero[1], 0.0);
    }

    #[test]
    fn a_jitter_is_small_and_repeats_by_its_seed() {
        let draw = |seed: u64| {
            let (mut q, mut k, mut v) = (vec![1.0; 64], vec![-3.0; 64], vec![0.0; 64]);
            Jitter::new(seed).before(0, &mut q, &mut k, &mut v).unwrap();
            assert!(v.iter().all(|v| *v == 0.0));
            // Half a unit in the last place more, for the product's own rounding.
            assert!(q.iter().all(|q| (q - 1.0).abs() <= Jitter::SIZE + f32::EPSILON));
            assert!(k.iter().all(|k| (k / -3.0 - 1.0).abs() <= Jitter::SIZE + 2.0 * f32::EPSILON));
            assert!(q.iter().any(|q| *q != 1.0) && k.iter().any(|k| *k != -3.0));
            (q, k)
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
