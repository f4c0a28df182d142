//! What the numbers of a case look like.

use super::{CaseConfig, Floats, Rng, edge_tokens};

/// The kinds of data. Each brings out another class of faults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Data {
    /// Standard normal q, K and V.
    Gaussian,
    /// Two channels of K are larger than the others by this factor, as real keys have them.
    Outliers {
        /// The factor, 10 to 50 in practice.
        gain: f32,
    },
    /// Standard normal times 1e-5: f16 scales are subnormal.
    Tiny,
    /// Standard normal times 1e3: logits in the thousands, one token takes all.
    Huge,
    /// All tokens are equal: every weight is equal, errors of one sign add up.
    Constant,
    /// One token, at an edge of the sequence, a tile or a split, has a logit far above all others and a V of its own.
    Needle,
    /// q = 0 and V integer: the output is the exact mean of the visible V rows.
    Mean,
    /// As [`Data::Needle`], so far above that all other weights vanish in f32: the output is one V row exactly.
    OneHot,
    /// V is 127 in every channel: so is the output, whatever the weights are.
    Ones,
}

impl Data {
    /// One of each kind.
    pub const ALL: [Data; 10] = [
        Data::Gaussian,
        Data::Outliers { gain: 10.0 },
        Data::Outliers { gain: 50.0 },
        Data::Tiny,
        Data::Huge,
        Data::Constant,
        Data::Needle,
        Data::Mean,
        Data::OneHot,
        Data::Ones,
    ];
}

/// q of the whole batch, `[batch, q_len, num_q_heads, head_dim]`.
pub(super) fn queries(config: &CaseConfig, rng: &mut Rng) -> Vec<f32> {
    let len = config.kv_lens.len()
        * config.q_len as usize
        * config.num_q_heads() as usize
        * config.head_dim as usize;
    let factor = match config.data {
        Data::Mean => return vec![0.0; len],
        Data::Tiny => 1e-5,
        Data::Huge => 1e3,
        _ => 1.0,
    };
    (0..len).map(|_| rng.gaussian() * factor).collect()
}

/// K and V of one request, `[kv_len, num_kv_heads, head_dim]`.
pub(super) fn tokens(
    config: &CaseConfig,
    request_idx: usize,
    q: &Floats,
    rng: &mut Rng,
) -> (Vec<f32>, Vec<f32>) {
    let kv_len = config.kv_lens.get(request_idx).copied().unwrap_or(0);
    let (heads, head_dim) = (config.num_kv_heads as usize, config.head_dim as usize);
    let row = heads * head_dim;
    let factor = match config.data {
        Data::Tiny => 1e-5,
        Data::Huge => 1e3,
        _ => 1.0,
    };
    let outliers = [rng.below(head_dim as u64), rng.below(head_dim as u64)];
    let one: Vec<(f32, f32)> = (0..row).map(|_| (rng.gaussian(), rng.gaussian())).collect();
    let (mut k, mut v) =
        (Vec::with_capacity(kv_len as usize * row), Vec::with_capacity(kv_len as usize * row));
    for _ in 0..kv_len {
        for (i, &(k_one, v_one)) in one.iter().enumerate() {
            let channel = (i % head_dim) as u64;
            let (k_x, v_x) = (rng.gaussian(), rng.gaussian());
            k.push(match config.data {
                Data::Constant => k_one,
                Data::Outliers { gain } if outliers.contains(&channel) => k_x * gain,
                _ => k_x * factor,
            });
            v.push(match config.data {
                Data::Constant => v_one,
                // 127 in every group gives scale 1, so that all integers are stored exactly.
                Data::Mean if channel.is_multiple_of(8) => 127.0,
                Data::Mean => rng.below(255) as f32 - 127.0,
                Data::Ones => 127.0,
                _ => v_x * factor,
            });
        }
    }
    let strength = match config.data {
        Data::Needle => 25.0,
        Data::OneHot => 400.0,
        _ => return (k, v),
    };
    plant(config, request_idx, q, strength, rng, &mut k, &mut v);
    (k, v)
}

/// Turns one edge token into a needle: K along the query of one head of each group, V far from all others. For
/// [`Data::OneHot`] the other tokens' K are silenced, so that nothing else is left.
fn plant(
    config: &CaseConfig,
    request_idx: usize,
    q: &Floats,
    strength: f32,
    rng: &mut Rng,
    k: &mut [f32],
    v: &mut [f32],
) {
    let kv_len = config.kv_lens.get(request_idx).copied().unwrap_or(0);
    let edges = edge_tokens(kv_len, &config.split);
    let (heads, head_dim) = (config.num_kv_heads as usize, config.head_dim as usize);
    let Some(&token) = edges.get(rng.below(edges.len() as u64) as usize) else { return };
    if config.data == Data::OneHot {
        k.fill(0.0);
    }
    let q = q.to_f32();
    for kv_head in 0..heads {
        // The last new token sees every token that any sees, unless a window hides it.
        let last = (request_idx + 1) * config.q_len as usize - 1;
        let head = kv_head * config.gqa_group as usize + rng.below(u64::from(config.gqa_group)) as usize;
        let first = (last * config.num_q_heads() as usize + head) * head_dim;
        let q_row = q.get(first..first + head_dim).unwrap_or_default();
        let norm: f32 = q_row.iter().map(|x| x * x).sum();
        let factor = if norm > 0.0 { strength * (head_dim as f32).sqrt() / norm } else { 0.0 };
        let at = (token as usize * heads + kv_head) * head_dim;
        for (k, q) in k.iter_mut().skip(at).zip(q_row) {
            *k = q * factor;
        }
        for (i, v) in v.iter_mut().skip(at).take(head_dim).enumerate() {
            *v = if i % 2 == 0 { 50.0 } else { -50.0 };
        }
    }
}
