//! Rounding K for the queries that will read it, and V for the projection that will: what counts of an error `e` is `q . e`.
//!
//! Rounding every value to its nearest code makes an error that is alike in all directions, though queries see some far
//! better than others. Codes are therefore chosen one after another, each making up in its own rounding for what those
//! before it left in the directions that queries see: the error feedback by which weights are rounded in GPTQ and QuIP
//! (<https://arxiv.org/abs/2307.13304>, "LDLQ"), applied to rows of the cache. The format, append and the kernels know nothing of it.

use crate::{
    CacheFormat, Element, Error, MAX_HEAD_DIM, QueryMoments, ScaleType, Side, quantize_value, round_scale_up,
};

/// Added to the diagonal of the moments, relative to its mean: a sample does not know every direction.
const RIDGE: f64 = 0.1;
const MAX_DIM: usize = MAX_HEAD_DIM as usize;

/// Moves rows of K, or of V, onto codes whose error is seen least.
///
/// The moments C of a kv head are factored once; a row then costs about `head_dim^2` multiply-adds a head. Worth it where C
/// is far from a multiple of the identity in the basis that is rounded: after [`crate::rotate_heads`], with one scale for
/// many channels. The mean of `(q . e)^2` falls from the mean of C's eigenvalues toward their geometric mean.
///
/// What reads V is the projection after attention: its weights, `[width, num_q_heads, head_dim]`, stand for the queries.
///
/// ```
/// use kv_quant::{CacheFormat, QueryMoments, ScaleType, ShapedRounding, Side};
/// // All queries look along (1, 1, ..).
/// let moments = QueryMoments::from_sample(&[1.0; 16], 1, 1, 16)?;
/// let shaped = ShapedRounding::new(Side::K, &moments, &CacheFormat::new(1, 16, 16, 16, ScaleType::F16)?)?;
/// let k: Vec<f32> = (0..16).map(|i| 1.27 - 0.004 * i as f32).collect();
/// let mut codes = k.clone();
/// shaped.shape(&mut codes)?;
/// // Each value is within two steps of 0.01, but the sum that queries see is kept to a tenth of what 16 roundings make.
/// assert!(codes.iter().zip(&k).all(|(code, k)| (code - k).abs() < 0.02));
/// assert!((codes.iter().sum::<f32>() - k.iter().sum::<f32>()).abs() < 0.01);
/// # Ok::<(), kv_quant::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ShapedRounding {
    head_dim: usize,
    group_len: usize,
    scale_type: ScaleType,
    heads: Vec<Head>,
}

/// `e^T C e` as a sum over steps: `pivot * (error of the step's channel + what earlier errors ask of it)^2`.
#[derive(Clone, Debug, PartialEq)]
struct Head {
    /// The channel of each step.
    order: Vec<usize>,
    pivots: Vec<f32>,
    /// What the error of each step asks of every later one: `head_dim - 1` values, then one fewer each step.
    feedback: Vec<f32>,
}

impl Head {
    /// Factors one head's moments, last step first: of the channels left, the least seen comes last, since an error made
    /// early can still be made up for.
    fn new(moments: &[f64], dim: usize) -> Self {
        let mean = (0..dim).map(|i| moments[i * dim + i]).sum::<f64>() / dim as f64;
        let is_usable = mean.is_finite() && mean > 0.0 && moments.iter().all(|x| x.is_finite());
        let mut c: Vec<f64> = match is_usable {
            true => moments.iter().map(|x| x / mean).collect(),
            false => vec![0.0; dim * dim], // rounds to nearest
        };
        (0..dim).for_each(|i| c[i * dim + i] += RIDGE);
        let mut left: Vec<usize> = (0..dim).collect();
        let mut steps = Vec::with_capacity(dim);
        let diagonal = |c: &[f64], i: usize| c[i * dim + i];
        while let Some(at) =
            (0..left.len()).min_by(|a, b| diagonal(&c, left[*a]).total_cmp(&diagonal(&c, left[*b])))
        {
            let channel = left.swap_remove(at);
            let pivot = diagonal(&c, channel);
            let row: Vec<f64> = c[channel * dim..][..dim].to_vec();
            for &i in &left {
                for &j in &left {
                    c[i * dim + j] -= row[i] * row[j] / pivot;
                }
            }
            steps.push((channel, pivot, row));
        }
        steps.reverse();
        let order: Vec<usize> = steps.iter().map(|(channel, ..)| *channel).collect();
        let mut feedback = Vec::with_capacity(dim * (dim - 1) / 2);
        for (n, channel) in order.iter().enumerate() {
            feedback.extend(steps[n + 1..].iter().map(|(_, pivot, row)| (row[*channel] / pivot) as f32));
        }
        Self { order, pivots: steps.iter().map(|(_, pivot, _)| *pivot as f32).collect(), feedback }
    }

    /// Goes through the steps: `error` gets a channel and what earlier errors ask of it and returns the channel's error.
    /// Returns `e^T C e`.
    fn walk(&self, mut error: impl FnMut(usize, f32) -> f32) -> f64 {
        let mut asked = [0f32; MAX_DIM];
        let (mut energy, mut feedback) = (0f64, self.feedback.as_slice());
        for (n, (&channel, &pivot)) in self.order.iter().zip(&self.pivots).enumerate() {
            let error = error(channel, asked[n]);
            energy += f64::from(pivot) * f64::from(error + asked[n]).powi(2);
            let (own, others) = feedback.split_at(self.order.len() - 1 - n);
            feedback = others;
            asked[n + 1..].iter_mut().zip(own).for_each(|(asked, own)| *asked += own * error);
        }
        energy
    }
}

/// What append will make of one group.
#[derive(Clone, Copy, Default)]
struct Group {
    amax: f32,
    scale: f32,
    /// The code of the largest magnitude: no value of the group gets a larger one.
    top: f32,
}

impl ShapedRounding {
    /// For one side of `format`, read by queries of `moments`: as they meet the cache, after the rotary embedding and, if K
    /// is stored rotated, [`QueryMoments::rotated`]. A head whose moments are zero or not finite is
    /// rounded to nearest.
    ///
    /// # Errors
    /// [`Error::NoCodes`] for an unquantized format, [`Error::Len`] for moments of other heads.
    pub fn new(side: Side, moments: &QueryMoments, format: &CacheFormat) -> Result<Self, Error> {
        if format.element() != Element::Int8 {
            return Err(Error::NoCodes(format.element()));
        }
        let dim = format.head_dim() as usize;
        let want = format.row_elements() * dim;
        if moments.sums().len() != want || moments.head_dim() != format.head_dim() {
            return Err(Error::Len { what: "moments", got: moments.sums().len(), want });
        }
        Ok(Self {
            head_dim: dim,
            group_len: format.group_len(side) as usize,
            scale_type: format.scale_type(),
            heads: moments.sums().chunks_exact(dim * dim).map(|sums| Head::new(sums, dim)).collect(),
        })
    }

    /// Changes `x`, `[_, num_kv_heads, head_dim]`, so that append stores the chosen codes. Scales stay what they are: the
    /// largest magnitude of each group is left alone. A head for which nothing is gained over nearest codes, or that append
    /// will refuse, is left as it is.
    ///
    /// # Errors
    /// [`Error::Len`] if `x` is no whole number of tokens.
    pub fn shape(&self, x: &mut [f32]) -> Result<(), Error> {
        let row = self.heads.len() * self.head_dim;
        if !x.len().is_multiple_of(row) {
            return Err(Error::Len { what: "x", got: x.len(), want: x.len().next_multiple_of(row) });
        }
        for row in x.chunks_exact_mut(row) {
            for (head, x) in self.heads.iter().zip(row.chunks_exact_mut(self.head_dim)) {
                self.shape_head(head, x);
            }
        }
        Ok(())
    }

    fn shape_head(&self, head: &Head, x: &mut [f32]) {
        // head_dim is at most 256, a group at least 8 channels or the whole head.
        let mut groups = [Group::default(); MAX_DIM / 8];
        for (values, group) in x.chunks_exact(self.group_len).zip(&mut groups) {
            let amax = values.iter().fold(0f32, |amax, x| amax.max(x.abs()));
            let is_finite = values.iter().all(|x| x.is_finite());
            let Some(scale) = round_scale_up(amax, self.scale_type).filter(|_| is_finite) else { return };
            *group = Group { amax, scale: scale.value, top: f32::from(quantize_value(amax, scale.value)) };
        }
        let group = |channel: usize| groups[channel / self.group_len];
        let nearest = head.walk(|channel, _| {
            let Group { scale, .. } = group(channel);
            f32::from(quantize_value(x[channel], scale)) * scale - x[channel]
        });
        let mut values = [0f32; MAX_DIM];
        let shaped = head.walk(|channel, asked| {
            let (own, Group { amax, scale, top }) = (x[channel], group(channel));
            let wanted = if own.abs() == amax { own } else { own - asked };
            let code = f32::from(quantize_value(wanted, scale)).clamp(-top, top);
            // The product of the top code may be beyond amax, and would raise the scale.
            values[channel] = if code.abs() == top { amax.copysign(code) } else { code * scale };
            code * scale - own
        });
        if shaped < nearest {
            x.copy_from_slice(&values[..x.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_add_up_to_the_quadratic_form() {
        let dim = 16;
        let q: Vec<f32> = (0..5 * dim).map(|i| ((i * i) as f32 * 0.61).cos() * (1 + i % 7) as f32).collect();
        let moments = QueryMoments::from_sample(&q, 1, 1, dim as u32).unwrap();
        let head = Head::new(moments.sums(), dim);
        let e: Vec<f32> = (0..dim).map(|i| (i as f32 * 1.7).sin()).collect();
        let mean = (0..dim).map(|i| moments.sums()[i * dim + i]).sum::<f64>() / dim as f64;
        let mut want = 0.0;
        for i in 0..dim {
            for j in 0..dim {
                let ridge = if i == j { RIDGE } else { 0.0 };
                let c = moments.sums()[i * dim + j] / mean + ridge;
                want += f64::from(e[i]) * c * f64::from(e[j]);
            }
        }
        let got = head.walk(|channel, _| e[channel]);
        assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
        let mut order = head.order.clone();
        order.sort_unstable();
        assert!(order.into_iter().eq(0..dim));
    }
}
