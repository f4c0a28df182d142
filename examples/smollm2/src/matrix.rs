//! Weight matrices as stored in the file, and their products with activations in f32.
//!
//! The usual product of a 4-bit matrix rounds the activations to 8 bits as well: measured on this model, a relative
//! error of 5e-3 a product, more than the INT8 cache causes. Here weights are widened exactly and activations stay
//! f32, so that two runs differ by their caches alone.

use crate::gguf::{Gguf, TensorType};
use anyhow::{Result, ensure};
use half::f16;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul};
use rayon::prelude::*;

/// Weight rows widened at a time.
const PANEL: usize = 192;
/// From this many activation rows on, a packed matrix product pays.
const MANY_ROWS: usize = 12;

/// A matrix `[rows, cols]` in the file's coding.
#[derive(Clone)]
pub struct Matrix {
    kind: TensorType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

/// Widens `bytes` (whole blocks) to `out`; exact.
#[inline(always)]
fn widen(kind: TensorType, bytes: &[u8], out: &mut [f32]) {
    let scale = |block: &[u8], at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32_const();
    match kind {
        TensorType::F32 => {
            for (x, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *x = f32::from_le_bytes(*bytes);
            }
        }
        TensorType::Q4_1 => {
            for (out, block) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<20>().0) {
                let (d, m) = (scale(block, 0), scale(block, 2));
                let (low, high) = out.split_at_mut(16);
                for j in 0..16 {
                    low[j] = f32::from(block[4 + j] & 15) * d + m;
                    high[j] = f32::from(block[4 + j] >> 4) * d + m;
                }
            }
        }
        TensorType::Q8_0 => {
            for (out, block) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<34>().0) {
                let d = scale(block, 0);
                for j in 0..32 {
                    out[j] = f32::from(block[2 + j] as i8) * d;
                }
            }
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 32];
    let (a, a_rest) = a.as_chunks::<32>();
    let (b, b_rest) = b.as_chunks::<32>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..32 {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Widens rows; compiled for the machine's vectors, which a closure would not surely be.
struct Widen<'a> {
    kind: TensorType,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl pulp::WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        widen(self.kind, self.bytes, self.out);
    }
}

/// Products of a panel of weight rows with a few rows of x, one weight row widened at a time.
struct FewRows<'a, 'y> {
    matrix: &'a Matrix,
    bytes: &'a [u8],
    x: &'a [f32],
    scratch: &'a mut [f32],
    y: ArrayViewMut2<'y, f32>,
}

impl pulp::WithSimd for FewRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(mut self, _: S) {
        for (row, bytes) in self.bytes.chunks_exact(self.matrix.row_bytes()).enumerate() {
            widen(self.matrix.kind, bytes, self.scratch);
            for (i, x) in self.x.chunks_exact(self.matrix.cols).enumerate() {
                self.y[[i, row]] = dot(self.scratch, x);
            }
        }
    }
}

impl Matrix {
    /// Loads a tensor.
    pub fn load(gguf: &Gguf, name: &str) -> Result<Self> {
        let (kind, rows, cols, bytes) = gguf.tensor(name)?;
        Ok(Self { kind, rows, cols, bytes: bytes.to_vec() })
    }

    /// Output channels.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input channels.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes as stored.
    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    fn row_bytes(&self) -> usize {
        let (block_len, block_bytes) = self.kind.block();
        self.cols / block_len * block_bytes
    }

    /// Row `row` as f32, `out` of `cols` values.
    pub fn row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        ensure!(row < self.rows && out.len() == self.cols, "row {row} of a matrix of {}", self.rows);
        let row_bytes = self.row_bytes();
        widen(self.kind, &self.bytes[row * row_bytes..(row + 1) * row_bytes], out);
        Ok(())
    }

    /// `y = x * self^T`: `x` is `[n, cols]`, `y` is `[n, rows]`.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        ensure!(x.len() / self.cols == y.len() / self.rows, "x has {} values, y {}", x.len(), y.len());
        let n = y.len() / self.rows;
        let x_view = ArrayView2::from_shape((n, self.cols), x)?;
        let mut y_view = ArrayViewMut2::from_shape((n, self.rows), y)?;
        // Panels of output channels: disjoint columns of y.
        let panels: Vec<_> = y_view.axis_chunks_iter_mut(Axis(1), PANEL).enumerate().collect();
        let row_bytes = self.row_bytes();
        let arch = pulp::Arch::new();
        panels.into_par_iter().for_each_init(Vec::new, |scratch: &mut Vec<f32>, (panel_idx, mut y)| {
            let num_rows = y.ncols();
            let start = panel_idx * PANEL * row_bytes;
            let bytes = &self.bytes[start..start + num_rows * row_bytes];
            if n < MANY_ROWS {
                scratch.resize(self.cols, 0.0);
                arch.dispatch(FewRows { matrix: self, bytes, x, scratch, y });
            } else {
                scratch.resize(num_rows * self.cols, 0.0);
                arch.dispatch(Widen { kind: self.kind, bytes, out: scratch });
                if let Ok(weights) = ArrayView2::from_shape((num_rows, self.cols), &scratch[..]) {
                    general_mat_mul(1.0, &x_view, &weights.t(), 0.0, &mut y);
                }
            }
        });
        Ok(())
    }
}
