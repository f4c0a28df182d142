//! The commands of the binary, one file each, and the options they share.

pub mod accuracy;
pub mod advise;
pub mod agree;
pub mod generate;
mod needle;
mod plot;

use crate::matrix::Products;
use crate::{cache::CacheKind, fetch, model::Model, vocabulary::Vocabulary, weights::Weights};
use anyhow::{Result, bail};
use attn_backend::BackendId;
use kv_quant::{FloatType, LayoutKind, ScaleType};
use std::path::PathBuf;

/// Which model, which backend.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// A GGUF file to use as it is, without looking at the network
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Where a fetched model is kept [default: kv8 in the user's cache folder, or $KV8_CACHE_DIR]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Backend of attention [default: the best that can do it]
    #[arg(long, value_name = "NAME")]
    pub backend: Option<String>,
    /// Threads [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl ModelArgs {
    /// Loads model and tokenizer; fetches the file if need be.
    pub fn load(&self, products: Products) -> Result<(Model, Vocabulary)> {
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        }
        let bytes = fetch::model_bytes(self.model.as_deref(), self.cache_dir.as_deref())?;
        let weights = Weights::parse(bytes)?;
        Ok((Model::load(&weights, products)?, Vocabulary::load(&weights)?))
    }

    /// The backend's name.
    pub fn backend(&self) -> Option<BackendId> {
        self.backend.clone().map(BackendId::named)
    }
}

/// How K and V are kept.
#[derive(Clone, Debug, clap::Args)]
pub struct CacheArgs {
    /// Elements of the cache: int8, f16, bf16 or f32
    #[arg(long, default_value = "int8")]
    pub cache: String,
    /// Channels a scale: 8, 16, 32 or 64; K,V if they differ
    #[arg(long, value_delimiter = ',', default_value = "8")]
    pub group_len: Vec<u32>,
    /// Scale type: f16, bf16 or f32
    #[arg(long, default_value = "f16")]
    pub scale_type: String,
    /// Arrangement of the cache: native, hnd or nhd
    #[arg(long, default_value = "native")]
    pub layout: String,
    /// Leave q and K as they are: an INT8 cache holds K rotated otherwise, so that outlier channels are spread
    #[arg(long)]
    pub no_rotate_keys: bool,
    /// Use nothing of a sample of text: an INT8 cache whose K is rotated holds it less a fixed offset otherwise, K and V
    /// rounded for what reads them
    #[arg(long)]
    pub no_calibrate: bool,
    /// Layers kept in f16, e.g. 0,29
    #[arg(long, value_delimiter = ',')]
    pub f16_layers: Vec<usize>,
}

/// A scale type by name.
pub fn scale_type(name: &str) -> Result<ScaleType> {
    match ScaleType::ALL.into_iter().find(|t| t.to_string() == name) {
        Some(scale_type) => Ok(scale_type),
        None => bail!("scale type {name}; known: f16, bf16, f32"),
    }
}

impl CacheArgs {
    /// The format asked for.
    pub fn kind(&self) -> Result<CacheKind> {
        if let Some(float_type) = FloatType::ALL.into_iter().find(|t| t.to_string() == self.cache) {
            return Ok(CacheKind::Float(float_type));
        }
        let (k_group_len, v_group_len) = match (self.cache.as_str(), self.group_len.as_slice()) {
            ("int8", &[both]) => (both, both),
            ("int8", &[k, v]) => (k, v),
            ("int8", other) => bail!("--group-len takes one length or two, not {}", other.len()),
            (other, _) => bail!("cache {other}; known: int8, f16, bf16, f32"),
        };
        Ok(CacheKind::Int8 { k_group_len, v_group_len, scale_type: scale_type(&self.scale_type)? })
    }

    /// Whether q and K are rotated; for floats there is nothing to gain.
    pub fn rotates_keys(&self) -> bool {
        self.cache == "int8" && !self.no_rotate_keys
    }

    /// Whether K is stored less an offset, and K and V rounded for what reads them.
    pub fn calibrates(&self) -> bool {
        self.rotates_keys() && !self.no_calibrate
    }

    /// The layout asked for.
    pub fn layout(&self) -> Result<LayoutKind> {
        match [LayoutKind::Native, LayoutKind::Hnd, LayoutKind::Nhd]
            .into_iter()
            .find(|k| k.to_string() == self.layout)
        {
            Some(kind) => Ok(kind),
            None => bail!("layout {}; known: native, hnd, nhd", self.layout),
        }
    }
}
