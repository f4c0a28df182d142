//! Second moments of queries: which directions of an error of K are seen.

use crate::{Error, MAX_HEAD_DIM, MIN_HEAD_DIM};

/// Which channels the rotary embedding turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RotaryPairs {
    /// Channels `2 i` and `2 i + 1`, as in GGUF files of llama models.
    Neighbours,
    /// Channels `i` and `i + head_dim / 2`, as in checkpoints of most models.
    Halves,
}

impl RotaryPairs {
    pub(crate) fn channels(self, i: usize, half: usize) -> (usize, usize) {
        match self {
            RotaryPairs::Neighbours => (2 * i, 2 * i + 1),
            RotaryPairs::Halves => (i, i + half),
        }
    }
}

/// The sums of `q q^T` over the queries that read a kv head, `[num_kv_heads, head_dim, head_dim]`: the mean of `(q . e)^2` of an
/// error `e` is `e^T C e` of their mean C.
///
/// A sample of a few hundred tokens does. Its queries stand at the first positions alone; [`Self::over_positions`] makes of
/// them what queries all over the context are.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryMoments {
    num_kv_heads: usize,
    head_dim: usize,
    sums: Vec<f64>,
}

impl QueryMoments {
    /// From queries `[_, num_q_heads, head_dim]`, after the rotary embedding.
    ///
    /// # Errors
    /// [`Error::HeadDim`] outside what a cache can have; [`Error::Len`] if there is no query, no whole number of tokens, or
    /// `num_q_heads` is no multiple of `num_kv_heads`.
    pub fn from_sample(q: &[f32], num_q_heads: u32, num_kv_heads: u32, head_dim: u32) -> Result<Self, Error> {
        if !(MIN_HEAD_DIM..=MAX_HEAD_DIM).contains(&head_dim) {
            return Err(Error::HeadDim { head_dim });
        }
        if num_kv_heads == 0 || num_q_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
            let want = num_q_heads.max(1).next_multiple_of(num_kv_heads.max(1)) as usize;
            return Err(Error::Len { what: "num_q_heads", got: num_q_heads as usize, want });
        }
        let (dim, row) = (head_dim as usize, num_q_heads as usize * head_dim as usize);
        if q.is_empty() || !q.len().is_multiple_of(row) {
            return Err(Error::Len { what: "q", got: q.len(), want: q.len().max(1).next_multiple_of(row) });
        }
        let gqa_group = (num_q_heads / num_kv_heads) as usize;
        let mut sums = vec![0f64; num_kv_heads as usize * dim * dim];
        for row in q.chunks_exact(row) {
            for (heads, sums) in row.chunks_exact(gqa_group * dim).zip(sums.chunks_exact_mut(dim * dim)) {
                for q in heads.chunks_exact(dim) {
                    for (x, sums) in q.iter().zip(sums.chunks_exact_mut(dim)) {
                        sums.iter_mut().zip(q).for_each(|(sum, y)| *sum += f64::from(*x) * f64::from(*y));
                    }
                }
            }
        }
        Ok(Self { num_kv_heads: num_kv_heads as usize, head_dim: dim, sums })
    }

    /// What the moments would be if the queries stood at each of the `num_positions` positions from their own on: exact,
    /// by the mean of every product of two turns. `frequencies` are radians a position of each pair, `head_dim / 2`; 0 for
    /// a pair that is not turned. Before [`Self::rotated`].
    ///
    /// # Errors
    /// [`Error::Len`] if `frequencies` is of another length.
    pub fn over_positions(
        &self,
        frequencies: &[f64],
        pairs: RotaryPairs,
        num_positions: u32,
    ) -> Result<Self, Error> {
        let (dim, half) = (self.head_dim, self.head_dim / 2);
        if frequencies.len() != half || 2 * half != dim {
            return Err(Error::Len { what: "frequencies", got: frequencies.len(), want: half });
        }
        let mut out = self.clone();
        for (i, of_i) in frequencies.iter().enumerate() {
            for (j, of_j) in frequencies.iter().enumerate() {
                let against = mean_turn(of_i - of_j, num_positions);
                let along = mean_turn(of_i + of_j, num_positions);
                let ((x, y), (u, v)) = (pairs.channels(i, half), pairs.channels(j, half));
                for sums in out.sums.chunks_exact_mut(dim * dim) {
                    let (xu, xv) = (sums[x * dim + u], sums[x * dim + v]);
                    let (yu, yv) = (sums[y * dim + u], sums[y * dim + v]);
                    // As complex numbers: z z'* turns by the difference of the angles, z z' by their sum.
                    let (a, b) = times((xu + yv, yu - xv), against);
                    let (c, d) = times((xu - yv, xv + yu), along);
                    sums[x * dim + u] = (a + c) / 2.0;
                    sums[y * dim + v] = (a - c) / 2.0;
                    sums[x * dim + v] = (d - b) / 2.0;
                    sums[y * dim + u] = (d + b) / 2.0;
                }
            }
        }
        Ok(out)
    }

    /// The moments of the same queries once [`crate::rotate_heads`] has turned them.
    ///
    /// # Errors
    /// [`Error::HeadDim`] if `head_dim` is no power of two.
    pub fn rotated(&self) -> Result<Self, Error> {
        let dim = self.head_dim;
        // Sums of squares leave the range of f32 long before their ratios do.
        let largest = self.sums.iter().fold(f64::MIN_POSITIVE, |a, x| a.max(x.abs()));
        let mut out = self.clone();
        for sums in out.sums.chunks_exact_mut(dim * dim) {
            let mut rows: Vec<f32> = sums.iter().map(|x| (x / largest) as f32).collect();
            crate::rotate_heads(&mut rows, dim as u32)?;
            let mut columns: Vec<f32> =
                (0..dim * dim).map(|i| rows.get(i % dim * dim + i / dim).copied().unwrap_or(0.0)).collect();
            crate::rotate_heads(&mut columns, dim as u32)?;
            sums.iter_mut().zip(columns).for_each(|(sum, x)| *sum = f64::from(x) * largest);
        }
        Ok(out)
    }

    /// kv heads.
    pub fn num_kv_heads(&self) -> u32 {
        self.num_kv_heads as u32
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> u32 {
        self.head_dim as u32
    }

    /// The sums, `[num_kv_heads, head_dim, head_dim]`.
    pub fn sums(&self) -> &[f64] {
        &self.sums
    }
}

pub(crate) fn times((a, b): (f64, f64), (c, d): (f64, f64)) -> (f64, f64) {
    (a * c - b * d, a * d + b * c)
}

/// The mean of `e^(i angle n)` over `n` in `0..count`.
pub(crate) fn mean_turn(angle: f64, count: u32) -> (f64, f64) {
    let count = f64::from(count.max(1));
    let half = (angle / 2.0).sin();
    if half.abs() < 1e-12 {
        return (1.0, 0.0);
    }
    let size = (angle * count / 2.0).sin() / (count * half);
    let (sin, cos) = (angle * (count - 1.0) / 2.0).sin_cos();
    (size * cos, size * sin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queries(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * i + 3 * i) as f32 * 0.37).sin() + 0.3).collect()
    }

    #[test]
    fn moments_over_positions_are_those_of_queries_that_were_turned() {
        let (dim, half, num_positions) = (16usize, 8usize, 29u32);
        let q = queries(5 * 4 * dim);
        // One pair stands still, two turn alike.
        let frequencies = [0.0, 1.0, 0.31, 0.31, 0.1, 0.03, 0.01, 2.9];
        for pairs in [RotaryPairs::Neighbours, RotaryPairs::Halves] {
            let mut turned = Vec::new();
            for position in 0..num_positions {
                for q in q.chunks_exact(dim) {
                    let mut out = q.to_vec();
                    for (i, frequency) in frequencies.iter().enumerate() {
                        let (x, y) = pairs.channels(i, half);
                        let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                        let (a, b) = times((f64::from(q[x]), f64::from(q[y])), (cos, sin));
                        (out[x], out[y]) = (a as f32, b as f32);
                    }
                    turned.extend(out);
                }
            }
            let want = QueryMoments::from_sample(&turned, 4, 2, 16).unwrap();
            let got = QueryMoments::from_sample(&q, 4, 2, 16).unwrap();
            let got = got.over_positions(&frequencies, pairs, num_positions).unwrap();
            assert_eq!(got.sums().len(), 2 * dim * dim);
            for (got, want) in got.sums().iter().zip(want.sums()) {
                let want = want / f64::from(num_positions);
                assert!((got - want).abs() < 1e-4, "{pairs:?} {got} {want}");
            }
        }
    }

    #[test]
    fn moments_turn_as_their_queries_do() {
        let mut q = queries(6 * 64);
        let got = QueryMoments::from_sample(&q, 2, 1, 64).unwrap().rotated().unwrap();
        crate::rotate_heads(&mut q, 64).unwrap();
        let want = QueryMoments::from_sample(&q, 2, 1, 64).unwrap();
        let largest = want.sums().iter().fold(0f64, |a, x| a.max(x.abs()));
        for (got, want) in got.sums().iter().zip(want.sums()) {
            assert!((got - want).abs() < 1e-5 * largest, "{got} {want}");
        }
    }

    #[test]
    fn samples_of_no_shape_are_refused() {
        let q = queries(2 * 3 * 16);
        assert!(QueryMoments::from_sample(&q, 3, 1, 16).is_ok());
        assert!(matches!(
            QueryMoments::from_sample(&q, 3, 2, 16),
            Err(Error::Len { what: "num_q_heads", .. })
        ));
        assert!(matches!(QueryMoments::from_sample(&q[1..], 3, 1, 16), Err(Error::Len { what: "q", .. })));
        assert!(matches!(QueryMoments::from_sample(&[], 3, 1, 16), Err(Error::Len { what: "q", .. })));
        assert!(matches!(QueryMoments::from_sample(&q, 3, 1, 8), Err(Error::HeadDim { .. })));
        let moments = QueryMoments::from_sample(&q, 6, 1, 16).unwrap();
        assert!(moments.over_positions(&[0.0; 7], RotaryPairs::Halves, 4).is_err());
    }
}
