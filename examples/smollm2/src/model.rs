//! The llama forward pass: embeddings, 30 blocks, tied output. Attention is asked of an [`Attention`].

use crate::{gguf::Gguf, matrix::Matrix};
use anyhow::{Result, ensure};
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
}

/// Who stores K and V and attends: a KV cache over sessions, or anything else.
pub trait Attention {
    /// Stores `k` and `v` `[n, num_kv_heads, head_dim]` (rotated) of the step's `n` rows in `layer` and writes the
    /// attention of `q` `[n, num_q_heads, head_dim]` to `out` (same shape).
    fn attend(&mut self, layer: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> Result<()>;
}

fn vector(gguf: &Gguf, name: &str) -> Result<Vec<f32>> {
    let matrix = Matrix::load(gguf, name)?;
    let mut values = vec![0.0; matrix.cols()];
    matrix.row(0, &mut values)?;
    Ok(values)
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * w;
        }
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

impl Model {
    /// Loads the weights of a `llama` GGUF.
    pub fn load(gguf: &Gguf) -> Result<Self> {
        let arch = gguf.text("general.architecture")?;
        ensure!(arch == "llama", "architecture {arch}; known: llama");
        let embedding = Matrix::load(gguf, "token_embd.weight")?;
        let (width, num_q_heads) =
            (gguf.int("llama.embedding_length")?, gguf.int("llama.attention.head_count")?);
        let config = Config {
            num_layers: gguf.int("llama.block_count")?,
            width,
            num_q_heads,
            num_kv_heads: gguf.int("llama.attention.head_count_kv")?,
            head_dim: width / num_q_heads.max(1),
            context_len: gguf.int("llama.context_length")?,
            rope_base: gguf.float("llama.rope.freq_base")?,
            norm_eps: gguf.float("llama.attention.layer_norm_rms_epsilon")? as f32,
            vocab_len: embedding.rows(),
        };
        let layers = (0..config.num_layers)
            .map(|i| {
                let matrix = |name: &str| Matrix::load(gguf, &format!("blk.{i}.{name}.weight"));
                let vector = |name: &str| vector(gguf, &format!("blk.{i}.{name}.weight"));
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
        Ok(Self { config, embedding, layers, output_norm: vector(gguf, "output_norm.weight")? })
    }

    /// Shapes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of all matrices as stored.
    pub fn num_bytes(&self) -> usize {
        let of = |l: &Layer| {
            [&l.q, &l.k, &l.v, &l.attn_out, &l.gate, &l.up, &l.down]
                .iter()
                .map(|m| m.num_bytes())
                .sum::<usize>()
        };
        self.embedding.num_bytes() + self.layers.iter().map(of).sum::<usize>()
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
        let (q_width, kv_width) = (c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let mut x = vec![0f32; n * c.width];
        for (token, x) in tokens.iter().zip(x.chunks_exact_mut(c.width)) {
            self.embedding.row(*token as usize, x)?;
        }
        let turns = Turns::new(c, positions);
        let mut normed = vec![0f32; n * c.width];
        let (mut q, mut heads) = (vec![0f32; n * q_width], vec![0f32; n * q_width]);
        let (mut k, mut v) = (vec![0f32; n * kv_width], vec![0f32; n * kv_width]);
        let ffn = self.layers.first().map_or(0, |l| l.gate.rows());
        let (mut gate, mut up) = (vec![0f32; n * ffn], vec![0f32; n * ffn]);
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            rms_norm(&x, &layer.attn_norm, c.norm_eps, &mut normed);
            layer.q.apply(&normed, &mut q)?;
            layer.k.apply(&normed, &mut k)?;
            layer.v.apply(&normed, &mut v)?;
            turns.rotate(&mut q, c.num_q_heads);
            turns.rotate(&mut k, c.num_kv_heads);
            attention.attend(layer_idx, &q, &k, &v, &mut heads)?;
            layer.attn_out.apply(&heads, &mut normed)?;
            add(&mut x, &normed);
            rms_norm(&x, &layer.ffn_norm, c.norm_eps, &mut normed);
            layer.gate.apply(&normed, &mut gate)?;
            layer.up.apply(&normed, &mut up)?;
            gate.par_iter_mut()
                .zip(&up)
                .with_min_len(4096)
                .for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
            layer.down.apply(&gate, &mut normed)?;
            add(&mut x, &normed);
        }
        rms_norm(&x, &self.output_norm, c.norm_eps, &mut normed);
        Ok(normed)
    }

    /// Logits `[n, vocab_len]` of hidden rows `[n, width]`.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let mut logits = vec![0f32; hidden.len() / self.config.width * self.config.vocab_len];
        self.embedding.apply(hidden, &mut logits)?;
        Ok(logits)
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
        let angle = |position: u32, i: usize| {
            f64::from(position) * config.rope_base.powf(-2.0 * i as f64 / config.head_dim as f64)
        };
        let pairs = positions
            .iter()
            .flat_map(|&p| (0..half).map(move |i| angle(p, i)))
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
