//! The llama forward pass: embeddings, 30 blocks, tied output. Attention is asked of an [`Attention`].

use crate::matrix::{Matrix, Products};
use crate::weights::Weights;
use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

/// Shapes and constants of the model.
#[derive(Clone, Debug)]
pub struct Config {
    /// Transformer blocks.
    pub num_layers: usize,
    /// Channels of the residual stream.
    pub width: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Heads of the cache.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of the longest text.
    pub context_len: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Added to the mean square before its root.
    pub norm_eps: f32,
    /// Tokens known.
    pub vocab_len: usize,
}

impl Config {
    /// Radians a position by which the rotary embedding turns each pair of channels.
    pub fn rotary_frequencies(&self) -> Vec<f64> {
        let dim = self.head_dim as f64;
        (0..self.head_dim / 2).map(|i| self.rope_base.powf(-2.0 * i as f64 / dim)).collect()
    }
}

struct Layer {
    attn_norm: Vec<f32>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    attn_out: Matrix,
    ffn_norm: Vec<f32>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// The weights.
pub struct Model {
    config: Config,
    embedding: Matrix,
    layers: Vec<Layer>,
    output_norm: Vec<f32>,
    products: Products,
}

/// Who stores K and V and attends: a KV cache over sessions, or anything else.
pub trait Attention {
    /// Stores `k` and `v` `[n, num_kv_heads, head_dim]` (rotated) of the step's `n` rows in `layer` and writes the
    /// attention of `q` `[n, num_q_heads, head_dim]` to `out` (same shape). It may change its inputs: nobody reads them after.
    fn attend(
        &mut self,
        layer: usize,
        q: &mut [f32],
        k: &mut [f32],
        v: &mut [f32],
        out: &mut [f32],
    ) -> Result<()>;
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * w;
        }
    }
    out
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

impl Model {
    /// Loads a `llama` GGUF.
    pub fn load(weights: &Weights, products: Products) -> Result<Self> {
        let arch = weights.text("general.architecture")?;
        ensure!(arch == "llama", "architecture {arch}; known: llama");
        let embedding = Matrix::load(weights, "token_embd.weight")?;
        let (width, num_q_heads) =
            (weights.int("llama.embedding_length")?, weights.int("llama.attention.head_count")?);
        let config = Config {
            num_layers: weights.int("llama.block_count")?,
            width,
            num_q_heads,
            num_kv_heads: weights.int("llama.attention.head_count_kv")?,
            head_dim: width / num_q_heads.max(1),
            context_len: weights.int("llama.context_length")?,
            rope_base: weights.float("llama.rope.freq_base")?,
            norm_eps: weights.float("llama.attention.layer_norm_rms_epsilon")? as f32,
            vocab_len: embedding.rows(),
        };
        let layers = (0..config.num_layers)
            .into_par_iter()
            .map(|i| {
                let matrix = |name: &str| Matrix::load(weights, &format!("blk.{i}.{name}.weight"));
                let vector = |name: &str| weights.vector(&format!("blk.{i}.{name}.weight"));
                Ok(Layer {
                    attn_norm: vector("attn_norm")?,
                    q: matrix("attn_q")?,
                    k: matrix("attn_k")?,
                    v: matrix("attn_v")?,
                    attn_out: matrix("attn_output")?,
                    ffn_norm: vector("ffn_norm")?,
                    gate: matrix("ffn_gate")?,
                    up: matrix("ffn_up")?,
                    down: matrix("ffn_down")?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, embedding, layers, output_norm: weights.vector("output_norm.weight")?, products })
    }

    /// Shapes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The projection after a layer's attention, `[width, num_q_heads * head_dim]`.
    pub fn attn_out(&self, layer: usize) -> Result<Vec<f32>> {
        let matrix = &self.layers.get(layer).context("no such layer")?.attn_out;
        matrix.gather(&(0..matrix.rows() as u32).collect::<Vec<_>>())
    }

    /// Runs the blocks over `tokens` at `positions` and returns the normalized hidden rows `[n, width]`.
    pub fn forward(
        &self,
        tokens: &[u32],
        positions: &[u32],
        attention: &mut dyn Attention,
    ) -> Result<Vec<f32>> {
        let c = &self.config;
        let n = tokens.len();
        ensure!(positions.len() == n, "{n} tokens at {} positions", positions.len());
        let mut x = self.embedding.gather(tokens)?;
        let turns = Turns::new(c, positions);
        let mut heads = vec![0f32; n * c.num_q_heads * c.head_dim];
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let normed = layer.q.operand(rms_norm(&x, &layer.attn_norm, c.norm_eps))?;
            let mut q = layer.q.apply(&normed, self.products)?;
            let mut k = layer.k.apply(&normed, self.products)?;
            let mut v = layer.v.apply(&normed, self.products)?;
            turns.rotate(&mut q, c.num_q_heads);
            turns.rotate(&mut k, c.num_kv_heads);
            attention.attend(layer_idx, &mut q, &mut k, &mut v, &mut heads)?;
            let operand = layer.attn_out.operand(std::mem::take(&mut heads))?;
            add(&mut x, &layer.attn_out.apply(&operand, self.products)?);
            // The shape of q is that of heads.
            heads = q;
            let normed = layer.gate.operand(rms_norm(&x, &layer.ffn_norm, c.norm_eps))?;
            let mut gate = layer.gate.apply(&normed, self.products)?;
            let up = layer.up.apply(&normed, self.products)?;
            gate.par_iter_mut()
                .zip(&up)
                .with_min_len(4096)
                .for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
            let operand = layer.down.operand(gate)?;
            add(&mut x, &layer.down.apply(&operand, self.products)?);
        }
        Ok(rms_norm(&x, &self.output_norm, c.norm_eps))
    }

    /// Logits `[n, vocab_len]` of hidden rows `[n, width]`.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        self.embedding.apply(&self.embedding.operand(hidden.to_vec())?, self.products)
    }
}

/// Cosines and sines of the rotary embedding, `[n, head_dim / 2]`.
struct Turns {
    pairs: Vec<(f32, f32)>,
    half: usize,
}

impl Turns {
    fn new(config: &Config, positions: &[u32]) -> Self {
        let half = config.head_dim / 2;
        let frequencies = config.rotary_frequencies();
        let pairs = positions
            .iter()
            .flat_map(|&p| frequencies.iter().map(move |frequency| f64::from(p) * frequency))
            .map(|a| (a.cos() as f32, a.sin() as f32))
            .collect();
        Self { pairs, half }
    }

    /// Rotates `[n, num_heads, head_dim]` in place. A pair is two neighbouring channels: GGUF files of llama models
    /// have their rows permuted for that.
    fn rotate(&self, x: &mut [f32], num_heads: usize) {
        let rows = x.chunks_exact_mut(num_heads * self.half * 2).zip(self.pairs.chunks_exact(self.half));
        for (x, turns) in rows {
            for head in x.chunks_exact_mut(self.half * 2) {
                for (pair, (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                    let [a, b] = *pair;
                    *pair = [a * cos - b * sin, a * sin + b * cos];
                }
            }
        }
    }
}
