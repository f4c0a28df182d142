//! Weight matrices as stored in the file, and their products with activations, by candle.
//!
//! candle's product of a quantized matrix rounds the activations to 8 bits as well: on this model's matrices a relative
//! error of 5e-3 a product, which is more than the INT8 cache causes. It is the faster one for a single row, where reading
//! the weights is what takes time, and a generated text does not mind. A measurement does: there weights are widened
//! (exactly) to f32 and activations stay f32, so that two runs differ by their caches alone. From two rows on the f32
//! product is the faster one as well.

use crate::weights::Weights;
use anyhow::Result;
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use std::sync::Arc;

/// Up to this many rows of x the product runs faster with the weights on the left: measured 0.4 against 1.1 ms for 4 rows
/// and a matrix of 576 rows and 1536 columns.
const FEW_ROWS: usize = 16;

/// How a single row is multiplied; several rows always are in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Over the quantized weights, activations rounded to 8 bits.
    Quantized,
    /// In f32.
    Exact,
}

/// A matrix `[rows, cols]`.
pub struct Matrix {
    stored: Arc<QTensor>,
    quantized: QMatMul,
    /// Widened to f32: six times the bytes.
    wide: Tensor,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// Loads a tensor.
    pub fn load(weights: &Weights, name: &str) -> Result<Self> {
        let stored = Arc::new(weights.tensor(name)?);
        let (rows, cols) = stored.shape().dims2()?;
        let quantized = QMatMul::from_arc(Arc::clone(&stored))?;
        let wide = stored.dequantize(&Device::Cpu)?;
        Ok(Self { stored, quantized, wide, rows, cols })
    }

    /// Output channels.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows `indices` as f32, `[indices.len(), cols]`.
    pub fn gather(&self, indices: &[u32]) -> Result<Vec<f32>> {
        let indices = Tensor::new(indices, &Device::Cpu)?;
        Ok(self.stored.embedding(&indices)?.flatten_all()?.to_vec1()?)
    }

    /// `x * self^T`: `x` is `[n, cols]`, the result `[n, rows]`.
    pub fn apply(&self, x: &Tensor, products: Products) -> Result<Vec<f32>> {
        let product = match (x.dim(0)?, products) {
            (1, Products::Quantized) => self.quantized.forward(x)?,
            (..=FEW_ROWS, _) => self.wide.matmul(&x.t()?)?.t()?,
            _ => x.matmul(&self.wide.t()?)?,
        };
        Ok(product.flatten_all()?.to_vec1()?)
    }

    /// `[n, cols]` values as an operand of [`Self::apply`].
    pub fn operand(&self, x: Vec<f32>) -> Result<Tensor> {
        let n = x.len() / self.cols.max(1);
        Ok(Tensor::from_vec(x, (n, self.cols), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::GgmlDType;

    fn matrix(kind: GgmlDType, rows: usize, cols: usize) -> Matrix {
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let values = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
        let stored = Arc::new(QTensor::quantize(&values, kind).unwrap());
        let quantized = QMatMul::from_arc(Arc::clone(&stored)).unwrap();
        let wide = stored.dequantize(&Device::Cpu).unwrap();
        Matrix { stored, quantized, wide, rows, cols }
    }

    #[test]
    fn every_way_to_multiply_gives_the_same_product() {
        for kind in [GgmlDType::Q4_1, GgmlDType::Q8_0] {
            let matrix = matrix(kind, 96, 64);
            let all: Vec<u32> = (0..96).collect();
            let weights = matrix.gather(&all).unwrap();
            for n in [1, 2, FEW_ROWS, FEW_ROWS + 1] {
                let x: Vec<f32> = (0..n * 64).map(|i| ((i * 13 % 29) as f32 - 14.0) / 14.0).collect();
                let operand = matrix.operand(x.clone()).unwrap();
                for products in [Products::Exact, Products::Quantized] {
                    let y = matrix.apply(&operand, products).unwrap();
                    assert_eq!(y.len(), n * 96);
                    // 64 products of at most 1; 8-bit activations are off by 1/254 each.
                    let is_rounded = n == 1 && products == Products::Quantized;
                    let bound = if is_rounded { 64.0 / 254.0 } else { 64.0 * 64.0 * f64::from(f32::EPSILON) };
                    for (i, y) in y.iter().enumerate() {
                        let (x, w) = (&x[i / 96 * 64..][..64], &weights[i % 96 * 64..][..64]);
                        let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        assert!(
                            (f64::from(*y) - exact).abs() <= bound,
                            "{kind:?} {n} {products:?}: {y} {exact}"
                        );
                    }
                }
            }
        }
    }
}
