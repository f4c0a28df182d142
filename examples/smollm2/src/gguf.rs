//! Reading a GGUF file: metadata and where the tensors lie. Little-endian, versions 2 and 3.

use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;

/// A metadata value; integers of every width are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer or bool.
    Int(i64),
    /// f32 or f64.
    Float(f64),
    /// UTF-8 text.
    Text(String),
    /// Values of one type.
    List(Vec<Value>),
}

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// IEEE binary32.
    F32,
    /// Blocks of 32: f16 scale, f16 minimum, 16 bytes of 4-bit codes. 20 bytes.
    Q4_1,
    /// Blocks of 32: f16 scale, 32 signed bytes. 34 bytes.
    Q8_0,
}

impl TensorType {
    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            TensorType::F32 => (1, 4),
            TensorType::Q4_1 => (32, 20),
            TensorType::Q8_0 => (32, 34),
        }
    }
}

struct TensorInfo {
    /// Fastest axis first.
    dims: Vec<usize>,
    kind: u32,
    offset: usize,
}

/// A whole file in memory.
pub struct Gguf {
    bytes: Vec<u8>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
    data_start: usize,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).context("length overflows")?;
        let taken =
            self.bytes.get(self.at..end).context("the file ends too early: is the download complete?")?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into()?)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn len(&mut self) -> Result<usize> {
        Ok(usize::try_from(u64::from_le_bytes(self.array()?))?)
    }

    fn text(&mut self) -> Result<String> {
        let len = self.len()?;
        Ok(String::from_utf8(self.take(len)?.to_vec())?)
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 | 7 => Value::Int(i64::from(u8::from_le_bytes(self.array()?))),
            1 => Value::Int(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Int(i64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Int(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Int(i64::from(u32::from_le_bytes(self.array()?))),
            5 => Value::Int(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            8 => Value::Text(self.text()?),
            9 => {
                let (kind, len) = (self.u32()?, self.len()?);
                ensure!(kind != 9, "nested arrays are not part of any llama GGUF");
                Value::List((0..len).map(|_| self.value(kind)).collect::<Result<_>>()?)
            }
            10 => Value::Int(u64::from_le_bytes(self.array()?) as i64),
            11 => Value::Int(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => bail!("metadata of unknown type {other}"),
        })
    }
}

impl Gguf {
    /// Parses a file's bytes.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        let mut reader = Reader { bytes: &bytes, at: 0 };
        ensure!(reader.take(4)? == b"GGUF", "this is no GGUF file");
        let version = reader.u32()?;
        ensure!((2..=3).contains(&version), "GGUF version {version}; known: 2, 3");
        let (num_tensors, num_values) = (reader.len()?, reader.len()?);
        let mut metadata = HashMap::new();
        for _ in 0..num_values {
            let (key, kind) = (reader.text()?, reader.u32()?);
            metadata.insert(key, reader.value(kind)?);
        }
        let mut tensors = HashMap::new();
        for _ in 0..num_tensors {
            let name = reader.text()?;
            let num_dims = reader.u32()? as usize;
            ensure!(num_dims <= 4, "tensor {name} has {num_dims} axes");
            let dims = (0..num_dims).map(|_| reader.len()).collect::<Result<_>>()?;
            let kind = reader.u32()?;
            tensors.insert(name, TensorInfo { dims, kind, offset: reader.len()? });
        }
        let align = match metadata.get("general.alignment") {
            Some(Value::Int(align)) if *align > 0 => *align as usize,
            _ => 32,
        };
        let data_start = reader.at.next_multiple_of(align);
        Ok(Self { bytes, metadata, tensors, data_start })
    }

    /// An integer of the metadata.
    pub fn int(&self, key: &str) -> Result<usize> {
        match self.metadata.get(key) {
            Some(Value::Int(value)) => Ok(usize::try_from(*value)?),
            other => bail!("metadata {key}: wanted an integer, found {other:?}"),
        }
    }

    /// A number of the metadata.
    pub fn float(&self, key: &str) -> Result<f64> {
        match self.metadata.get(key) {
            Some(Value::Float(value)) => Ok(*value),
            other => bail!("metadata {key}: wanted a number, found {other:?}"),
        }
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(value)) => Ok(value),
            _ => bail!("metadata {key}: wanted a text"),
        }
    }

    /// A list of the metadata.
    pub fn list(&self, key: &str) -> Result<&[Value]> {
        match self.metadata.get(key) {
            Some(Value::List(values)) => Ok(values),
            _ => bail!("metadata {key}: wanted a list"),
        }
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Vec<String>> {
        let text = |value: &Value| match value {
            Value::Text(text) => Ok(text.clone()),
            other => bail!("metadata {key}: wanted texts, found {other:?}"),
        };
        self.list(key)?.iter().map(text).collect()
    }

    /// Type, rows, columns and bytes of a matrix (a vector is a matrix of one row). Columns are contiguous.
    pub fn tensor(&self, name: &str) -> Result<(TensorType, usize, usize, &[u8])> {
        let info = self.tensors.get(name).with_context(|| format!("the file has no tensor {name}"))?;
        let kind = match info.kind {
            0 => TensorType::F32,
            3 => TensorType::Q4_1,
            8 => TensorType::Q8_0,
            other => bail!("tensor {name} has element type {other}; known: F32, Q4_1, Q8_0"),
        };
        let cols = info.dims.first().copied().unwrap_or(1);
        let rows = info.dims.iter().skip(1).product::<usize>();
        let (block_len, block_bytes) = kind.block();
        ensure!(
            cols.is_multiple_of(block_len),
            "tensor {name} has rows of {cols}, no multiple of {block_len}"
        );
        let len = (cols / block_len)
            .checked_mul(block_bytes)
            .and_then(|bytes| bytes.checked_mul(rows))
            .context("size overflows")?;
        let start = self.data_start.checked_add(info.offset).context("offset overflows")?;
        let bytes = self
            .bytes
            .get(start..start.saturating_add(len))
            .with_context(|| format!("tensor {name} is cut off"))?;
        Ok((kind, rows, cols, bytes))
    }
}
