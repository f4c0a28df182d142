//! The accuracy measurement: every cache variant over the same windows of real text, against the f32 cache.

use crate::cache::{CHUNK_LEN, CacheKind, CacheOptions, ModelCache, Transform};
use crate::model::{Config, Model};
use crate::score::{Reference, Score};
use crate::transform::{FakeQuant, Record, Recorded, Rounding, SmoothKeys};
use anyhow::{Context, Result};
use attn_backend::BackendId;
use kv_quant::{FloatType, KeyOffset, LayoutKind, ScaleType};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What happens around an INT8 cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Smoothing {
    /// Nothing.
    None,
    /// A fixed offset a K channel.
    KeyOffset,
    /// Walsh-Hadamard rotation of every head of q and K.
    Rotation,
    /// An offset, then the rotation.
    OffsetRotation,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq)]
pub enum Variant {
    /// A real cache of some format.
    Cache(CacheKind, Smoothing),
    /// Values rounded before they go into the f32 cache: for rules and sides that the format does not have.
    Rounded {
        /// Channels a scale of K, if K is rounded.
        k_group_len: Option<u32>,
        /// The same of V.
        v_group_len: Option<u32>,
        /// Scale type.
        scale_type: ScaleType,
        /// Rule.
        rounding: Rounding,
    },
}

impl Variant {
    /// What the table and the JSON call it: format, group length, scale type, rounding.
    pub fn labels(&self) -> [String; 4] {
        let none = || "-".to_owned();
        match self {
            Variant::Cache(CacheKind::Float(float_type), _) => {
                [float_type.to_string(), none(), none(), none()]
            }
            Variant::Cache(CacheKind::Int8 { k_group_len, v_group_len, scale_type }, smoothing) => {
                let format = match smoothing {
                    Smoothing::None => "int8",
                    Smoothing::KeyOffset => "int8, K offset",
                    Smoothing::Rotation => "int8, K rotated",
                    Smoothing::OffsetRotation => "int8, K offset and rotated",
                };
                let groups = match k_group_len == v_group_len {
                    true => k_group_len.to_string(),
                    false => format!("{k_group_len},{v_group_len}"),
                };
                [format.to_owned(), groups, scale_type.to_string(), "half-even".to_owned()]
            }
            Variant::Rounded { k_group_len, v_group_len, scale_type, rounding } => {
                let format = match (k_group_len, v_group_len) {
                    (Some(_), None) => "int8, K only",
                    (None, Some(_)) => "int8, V only",
                    _ => "int8",
                };
                let group_len = k_group_len.or(*v_group_len).unwrap_or(0);
                let rounding = match rounding {
                    Rounding::HalfEven => "half-even",
                    Rounding::TowardZero => "toward zero",
                };
                [format.to_owned(), group_len.to_string(), scale_type.to_string(), rounding.to_owned()]
            }
        }
    }

    /// A name for the saved state.
    pub fn key(&self) -> String {
        self.labels().join("/")
    }
}

/// Group lengths that divide a head of 64.
pub const GROUP_LENS: [u32; 4] = [8, 16, 32, 64];

/// Four rows for a quick look.
pub fn quick_variants() -> Vec<Variant> {
    let int8 = |group_len| Variant::Cache(CacheKind::int8(group_len, ScaleType::F16), Smoothing::None);
    vec![int8(8), int8(32), int8(64), truncated(8, ScaleType::F16)]
}

fn truncated(group_len: u32, scale_type: ScaleType) -> Variant {
    let group = Some(group_len);
    Variant::Rounded { k_group_len: group, v_group_len: group, scale_type, rounding: Rounding::TowardZero }
}

/// Everything.
pub fn all_variants() -> Vec<Variant> {
    let mut variants = vec![Variant::Cache(CacheKind::Float(FloatType::F16), Smoothing::None)];
    for group_len in GROUP_LENS {
        for scale_type in ScaleType::ALL {
            variants.push(Variant::Cache(CacheKind::int8(group_len, scale_type), Smoothing::None));
            variants.push(truncated(group_len, scale_type));
        }
        for (k_group_len, v_group_len) in [(Some(group_len), None), (None, Some(group_len))] {
            let (scale_type, rounding) = (ScaleType::F16, Rounding::HalfEven);
            variants.push(Variant::Rounded { k_group_len, v_group_len, scale_type, rounding });
        }
    }
    for group_len in [8, 32, 64] {
        for smoothing in [Smoothing::KeyOffset, Smoothing::Rotation, Smoothing::OffsetRotation] {
            variants.push(Variant::Cache(CacheKind::int8(group_len, ScaleType::F16), smoothing));
        }
    }
    variants
}

/// Constants for smoothing, from a sample that is none of the measured texts.
pub struct Calibration {
    offsets: Vec<KeyOffset>,
}

/// The sample: prose written for this purpose.
const CALIBRATION_TEXT: &str = "The harbour lay quiet under a pale sky. Two fishermen mended their nets and spoke \
    of the weather, the price of diesel, and a letter that one of them had from his daughter, who studies chemistry in \
    the capital. \"She measures how salts dissolve,\" he said, \"at 20, 40 and 60 degrees.\" Later the ferry came in, \
    forty minutes late: engineers had replaced a pump in the engine room. Here is what the log says:\n\n\
    1. 06:15 pump 3 stopped; pressure fell from 4.2 to 1.1 bar.\n2. 06:20 valve closed by hand.\n\
    3. 07:05 new pump started. fn main() { println!(\"all well\"); }\n\n\
    Nobody on the pier knew any of this, and the children waved as they always do.";

impl Calibration {
    /// Runs the sample through the model over an f32 cache.
    pub fn measure(model: &Model, tokens: &[u32]) -> Result<Self> {
        let width = model.config().num_kv_heads * model.config().head_dim;
        let recorded = record(model, tokens)?;
        let offsets = recorded.iter().map(|r| KeyOffset::from_sample(&r.k, width));
        Ok(Self { offsets: offsets.collect::<Result<_, _>>()? })
    }

    /// The text of the sample.
    pub fn text() -> &'static str {
        CALIBRATION_TEXT
    }
}

/// q, K and V of every layer over `tokens`.
pub fn record(model: &Model, tokens: &[u32]) -> Result<Vec<Recorded>> {
    let mut cache = open(model.config(), CacheKind::Float(FloatType::F32), tokens.len(), None)?;
    let record = Record::default();
    let layers = std::rc::Rc::clone(&record.layers);
    cache.transform = Some(Box::new(record));
    hidden(model, &mut cache, tokens)?;
    Ok(layers.take())
}

/// A cache of one format for `num_tokens` tokens; an unquantized one lies on the host whatever `backend` says.
pub fn open(
    config: &Config,
    kind: CacheKind,
    num_tokens: usize,
    backend: Option<BackendId>,
) -> Result<ModelCache<'static>> {
    // Floats are a host format: the reference stays there whatever backend is measured.
    let backend = if matches!(kind, CacheKind::Float(_)) { Some(BackendId::CPU) } else { backend };
    let options =
        CacheOptions { kind, f16_layers: Vec::new(), num_tokens, layout: LayoutKind::Native, backend };
    ModelCache::open(config, &options)
}

/// Hidden rows of `tokens`, read in chunks as a prompt would be.
fn hidden(model: &Model, cache: &mut ModelCache<'_>, tokens: &[u32]) -> Result<Vec<f32>> {
    let sequence = cache.pool().allocate();
    let mut hidden = Vec::with_capacity(tokens.len() * model.config().width);
    for chunk in tokens.chunks(CHUNK_LEN as usize) {
        let positions = cache.begin(&[sequence], chunk.len() as u32)?;
        hidden.extend(model.forward(chunk, &positions, cache)?);
    }
    cache.pool().free(sequence)?;
    Ok(hidden)
}

/// What was measured so far: scores by `text/window/variant`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// What the scores hold for; another setting starts afresh.
    pub setting: String,
    /// The scores.
    pub scores: BTreeMap<String, Score>,
}

/// A stretch of text that is read from an empty cache.
#[derive(Clone, Debug)]
pub struct Window {
    /// Text and number.
    pub key: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
}

/// Variants of a window that are scored together: the reference's logits are made once for them.
const SCORED_TOGETHER: usize = 6;

/// Measures what `state` lacks. `step` is called after each variant of each window, `save` whenever scores came in.
pub fn measure(
    model: &Model,
    calibration: &Calibration,
    windows: &[Window],
    variants: &[Variant],
    backend: Option<BackendId>,
    state: &mut State,
    mut step: impl FnMut(),
    mut save: impl FnMut(&State) -> Result<()>,
) -> Result<()> {
    let longest = windows.iter().map(|w| w.tokens.len()).max().unwrap_or(0);
    let config = model.config();
    let mut caches: Vec<(CacheKind, ModelCache<'static>)> = Vec::new();
    for window in windows {
        let key = |variant: &Variant| format!("{}/{}", window.key, variant.key());
        let missing: Vec<_> = variants.iter().filter(|v| !state.scores.contains_key(&key(v))).collect();
        if missing.is_empty() {
            continue;
        }
        let mut run = |kind: CacheKind, transform: Option<Box<dyn Transform>>| -> Result<Vec<f32>> {
            if !caches.iter().any(|(k, _)| *k == kind) {
                caches.push((kind, open(config, kind, longest, backend.clone())?));
            }
            let (_, cache) = caches.iter_mut().find(|(k, _)| *k == kind).context("just opened")?;
            cache.transform = transform;
            hidden(model, cache, &window.tokens)
        };
        let reference = Reference::new(run(CacheKind::Float(FloatType::F32), None)?);
        for together in missing.chunks(SCORED_TOGETHER) {
            let mut rows = Vec::with_capacity(together.len());
            for variant in together {
                let (kind, transform) = around(variant, calibration, config);
                rows.push(run(kind, transform)?);
                step();
            }
            let scores = reference.score(model, &window.tokens, &rows)?;
            for (variant, score) in together.iter().zip(scores) {
                state.scores.insert(key(variant), score);
            }
            save(state)?;
        }
    }
    Ok(())
}

/// The cache of a variant and what is done around it.
fn around(
    variant: &Variant,
    calibration: &Calibration,
    config: &Config,
) -> (CacheKind, Option<Box<dyn Transform>>) {
    match *variant {
        Variant::Cache(kind, Smoothing::None) => (kind, None),
        Variant::Cache(kind, smoothing) => {
            let offsets = match smoothing {
                Smoothing::Rotation => Vec::new(),
                _ => calibration.offsets.clone(),
            };
            let rotate = smoothing != Smoothing::KeyOffset;
            (kind, Some(Box::new(SmoothKeys { offsets, rotate, head_dim: config.head_dim })))
        }
        Variant::Rounded { k_group_len, v_group_len, scale_type, rounding } => {
            let len = |group_len: Option<u32>| group_len.map(|len| len as usize);
            let (k_group_len, v_group_len) = (len(k_group_len), len(v_group_len));
            let fake = FakeQuant { k_group_len, v_group_len, scale_type, rounding };
            (CacheKind::Float(FloatType::F32), Some(Box::new(fake)))
        }
    }
}
