//! The model file, read by candle: metadata by name and type, tensors as they are stored.

use anyhow::{Context, Result, bail};
use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value};
use std::io::Cursor;

/// A GGUF file in memory, its table of contents read.
pub struct Weights {
    content: Content,
    bytes: Vec<u8>,
}

impl Weights {
    /// Reads the table of contents.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        let content = Content::read(&mut Cursor::new(&bytes))
            .context("this is no GGUF file, or it ends too early: is the download complete?")?;
        Ok(Self { content, bytes })
    }

    fn value(&self, key: &str) -> Result<&Value> {
        self.content.metadata.get(key).with_context(|| format!("the file has no metadata {key}"))
    }

    /// An unsigned integer of the metadata, of any width.
    pub fn int(&self, key: &str) -> Result<usize> {
        let value = self.value(key)?.to_u64().with_context(|| format!("metadata {key}"))?;
        Ok(usize::try_from(value)?)
    }

    /// A number of the metadata.
    pub fn float(&self, key: &str) -> Result<f64> {
        match self.value(key)? {
            Value::F32(value) => Ok(f64::from(*value)),
            Value::F64(value) => Ok(*value),
            other => bail!("metadata {key}: wanted a number, found {other:?}"),
        }
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Result<&str> {
        Ok(self.value(key)?.to_string().with_context(|| format!("metadata {key}"))?)
    }

    /// A list of the metadata.
    pub fn list(&self, key: &str) -> Result<&[Value]> {
        Ok(self.value(key)?.to_vec().with_context(|| format!("metadata {key}"))?)
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Vec<String>> {
        let text = |value: &Value| Ok(value.to_string().with_context(|| format!("metadata {key}"))?.clone());
        self.list(key)?.iter().map(text).collect()
    }

    /// A tensor as the file has it: `[rows, cols]` or `[len]`, columns contiguous.
    pub fn tensor(&self, name: &str) -> Result<QTensor> {
        self.content
            .tensor(&mut Cursor::new(&self.bytes), name, &Device::Cpu)
            .with_context(|| format!("tensor {name}"))
    }

    /// A vector, widened to f32.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.tensor(name)?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_model_is_refused_with_a_hint() {
        for bytes in [&b""[..], b"PK\x03\x04 a wheel", b"GGUF\x03\0\0\0\x01"] {
            let error = format!("{:#}", Weights::parse(bytes.to_vec()).err().unwrap());
            assert!(error.contains("is the download complete?"), "{error}");
        }
    }
}
