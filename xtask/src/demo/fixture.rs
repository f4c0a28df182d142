//! The attention data of the demo: `tests/fixtures/README.md` says where it comes from.

use half::f16;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// What can be wrong with the file.
#[derive(Debug, thiserror::Error)]
pub enum FixtureError {
    /// It cannot be read.
    #[error("cannot read {}: {error}; the demo needs the workspace's fixtures", path.display())]
    Read {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is no safetensors file.
    #[error("{} is no safetensors file: {error}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        error: safetensors::SafeTensorError,
    },
    /// A number is missing from its header.
    #[error("the fixture's header has no valid `{0}`")]
    Metadata(&'static str),
    /// A tensor is missing or has another shape.
    #[error("the fixture's tensor {name} is {got}; needed: f16 {want:?}")]
    Tensor {
        /// Its name.
        name: String,
        /// What was found.
        got: String,
        /// The shape by the header.
        want: [usize; 3],
    },
}

/// One layer of the model.
pub struct Layer {
    /// Its index in the model.
    pub layer: u32,
    /// `[num_steps, num_q_heads, head_dim]`.
    pub q: Vec<f16>,
    /// `[num_tokens, num_kv_heads, head_dim]`, after RoPE.
    pub k: Vec<f16>,
    /// As `k`.
    pub v: Vec<f16>,
}

/// All layers, and the numbers that they share.
pub struct Fixture {
    /// Tokens of the text.
    pub num_tokens: usize,
    /// Positions with a query: the last ones.
    pub num_steps: usize,
    /// Query heads.
    pub num_q_heads: u32,
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Factor of q.k.
    pub softmax_scale: f32,
    /// In the order of the model.
    pub layers: Vec<Layer>,
}

impl Fixture {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, FixtureError> {
        let bytes =
            std::fs::read(path).map_err(|error| FixtureError::Read { path: path.to_owned(), error })?;
        let format = |error| FixtureError::Format { path: path.to_owned(), error };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(format)?;
        let text = |key: &'static str| {
            header.metadata().as_ref().and_then(|m| m.get(key)).ok_or(FixtureError::Metadata(key))
        };
        let number = |key: &'static str| text(key)?.parse::<u32>().map_err(|_| FixtureError::Metadata(key));
        let mut names: Vec<u32> = tensors
            .names()
            .iter()
            .filter_map(|name| name.strip_prefix("layer")?.strip_suffix(".k")?.parse().ok())
            .collect();
        names.sort_unstable();
        let shape = |name: &str| tensors.tensor(name).map(|t| t.shape().to_vec()).unwrap_or_default();
        let first = names.first().ok_or(FixtureError::Metadata("layer*.k"))?;
        let mut fixture = Self {
            num_tokens: shape(&format!("layer{first}.k")).first().copied().unwrap_or(0),
            num_steps: shape(&format!("layer{first}.q")).first().copied().unwrap_or(0),
            num_q_heads: number("num_q_heads")?,
            num_kv_heads: number("num_kv_heads")?,
            head_dim: number("head_dim")?,
            softmax_scale: text("softmax_scale")?
                .parse()
                .map_err(|_| FixtureError::Metadata("softmax_scale"))?,
            layers: Vec::new(),
        };
        for layer in names {
            let q = read(&tensors, &format!("layer{layer}.q"), fixture.q_shape())?;
            let k = read(&tensors, &format!("layer{layer}.k"), fixture.kv_shape())?;
            let v = read(&tensors, &format!("layer{layer}.v"), fixture.kv_shape())?;
            fixture.layers.push(Layer { layer, q, k, v });
        }
        Ok(fixture)
    }

    fn q_shape(&self) -> [usize; 3] {
        [self.num_steps, self.num_q_heads as usize, self.head_dim as usize]
    }

    fn kv_shape(&self) -> [usize; 3] {
        [self.num_tokens, self.num_kv_heads as usize, self.head_dim as usize]
    }

    /// Elements of one token of K or V.
    pub fn kv_row(&self) -> usize {
        self.num_kv_heads as usize * self.head_dim as usize
    }

    /// Elements of one position of q or of the output.
    pub fn q_row(&self) -> usize {
        self.num_q_heads as usize * self.head_dim as usize
    }
}

fn read(tensors: &SafeTensors<'_>, name: &str, want: [usize; 3]) -> Result<Vec<f16>, FixtureError> {
    let wrong = |got: String| FixtureError::Tensor { name: name.to_owned(), got, want };
    let tensor = tensors.tensor(name).map_err(|error| wrong(error.to_string()))?;
    if tensor.dtype() != safetensors::Dtype::F16 || tensor.shape() != want {
        return Err(wrong(format!("{:?} {:?}", tensor.dtype(), tensor.shape())));
    }
    // Tensors begin anywhere in the file, so their bytes cannot be borrowed as f16.
    let (pairs, _) = tensor.data().as_chunks::<2>();
    Ok(pairs.iter().map(|pair| f16::from_le_bytes(*pair)).collect())
}
