//! The accuracy measurement: every cache variant over the same windows of real text, against the f32 cache.

use crate::cache::{CHUNK_LEN, CacheKind, CacheOptions, ModelCache, Transform};
use crate::calibration::Calibration;
use crate::model::{Config, Model};
use crate::score::{Reference, Score};
use crate::transform::{FakeQuant, Record, Recorded, Rounding, SmoothKeys};
use anyhow::{Context, Result};
use attn_backend::BackendId;
use kv_quant::{FloatType, LayoutKind, ScaleType};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// The rotation, then K and V rounded for what reads them.
    Shaping,
    /// An offset over all positions, the rotation, then K and V rounded for what reads them.
    OffsetShaping,
}

impl Smoothing {
    fn is_rotated(self) -> bool {
        !matches!(self, Self::None | Self::KeyOffset)
    }

    fn is_shaped(self) -> bool {
        matches!(self, Self::Shaping | Self::OffsetShaping)
    }
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
        /// Whether q and K are rotated first.
        is_rotated: bool,
    },
}

impl Variant {
    /// The reference.
    pub const F32: Self = Self::Cache(CacheKind::Float(FloatType::F32), Smoothing::None);

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
                    Smoothing::Shaping => "int8, rotated and shaped",
                    Smoothing::OffsetShaping => "int8, offset, rotated, shaped",
                };
                let groups = match k_group_len == v_group_len {
                    true => k_group_len.to_string(),
                    false => format!("{k_group_len},{v_group_len}"),
                };
                [format.to_owned(), groups, scale_type.to_string(), "half-even".to_owned()]
            }
            Variant::Rounded { k_group_len, v_group_len, scale_type, rounding, is_rotated } => {
                let format = match (k_group_len, v_group_len, is_rotated) {
                    (Some(_), None, false) => "int8, K only",
                    (Some(_), None, true) => "int8, K only, rotated",
                    (None, Some(_), _) => "int8, V only",
                    (_, _, false) => "int8",
                    (_, _, true) => "int8, K rotated",
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

    /// Whether q and K are rotated.
    pub fn is_rotated(&self) -> bool {
        match self {
            Variant::Cache(_, smoothing) => smoothing.is_rotated(),
            Variant::Rounded { is_rotated, .. } => *is_rotated,
        }
    }

    /// A name for the saved state.
    pub fn key(&self) -> String {
        self.labels().join("/")
    }
}

/// Group lengths that divide a head of 64.
pub const GROUP_LENS: [u32; 4] = [8, 16, 32, 64];

fn int8(group_len: u32, scale_type: ScaleType, smoothing: Smoothing) -> Variant {
    Variant::Cache(CacheKind::int8(group_len, scale_type), smoothing)
}

fn truncated(group_len: u32, scale_type: ScaleType, is_rotated: bool) -> Variant {
    let (k_group_len, v_group_len) = (Some(group_len), Some(group_len));
    Variant::Rounded { k_group_len, v_group_len, scale_type, rounding: Rounding::TowardZero, is_rotated }
}

/// Four rows for a quick look.
pub fn quick_variants(rotates_keys: bool) -> Vec<Variant> {
    let f16 = ScaleType::F16;
    match rotates_keys {
        true => [8, 64]
            .into_iter()
            .flat_map(|len| [int8(len, f16, Smoothing::OffsetShaping), int8(len, f16, Smoothing::None)])
            .collect(),
        false => {
            let plain = [8, 32, 64].map(|len| int8(len, f16, Smoothing::None));
            plain.into_iter().chain([truncated(8, f16, false)]).collect()
        }
    }
}

/// Whom a needle is hidden from.
pub fn needle_variants(rotates_keys: bool) -> Vec<Variant> {
    let smoothing = if rotates_keys { Smoothing::OffsetShaping } else { Smoothing::None };
    [8, 32, 64].map(|len| int8(len, ScaleType::F16, smoothing)).to_vec()
}

/// Everything, in the order of importance: a run may be cut short.
pub fn all_variants(rotates_keys: bool) -> Vec<Variant> {
    let f16 = ScaleType::F16;
    let mut variants = Vec::new();
    for smoothing in [Smoothing::OffsetShaping, Smoothing::Rotation, Smoothing::None] {
        variants.extend(GROUP_LENS.map(|len| int8(len, f16, smoothing)));
    }
    variants.extend(GROUP_LENS.map(|len| truncated(len, f16, false)));
    for is_k in [true, false] {
        variants.extend(GROUP_LENS.map(|len| Variant::Rounded {
            k_group_len: is_k.then_some(len),
            v_group_len: (!is_k).then_some(len),
            scale_type: f16,
            rounding: Rounding::HalfEven,
            is_rotated: false,
        }));
    }
    variants.push(Variant::Cache(CacheKind::Float(FloatType::F16), Smoothing::None));
    let others = [ScaleType::Bf16, ScaleType::F32];
    let of_others = |variant: &dyn Fn(u32, ScaleType) -> Variant| -> Vec<Variant> {
        others.iter().flat_map(|scale_type| GROUP_LENS.map(|len| variant(len, *scale_type))).collect()
    };
    variants.extend(of_others(&|len, scale_type| int8(len, scale_type, Smoothing::Rotation)));
    variants.extend(of_others(&|len, scale_type| truncated(len, scale_type, false)));
    variants.extend(of_others(&|len, scale_type| int8(len, scale_type, Smoothing::None)));
    variants.extend(GROUP_LENS.map(|len| truncated(len, f16, true)));
    for smoothing in [Smoothing::Shaping, Smoothing::OffsetRotation, Smoothing::KeyOffset] {
        variants.extend([8, 32, 64].map(|len| int8(len, f16, smoothing)));
    }
    variants.retain(|variant| rotates_keys || !variant.is_rotated());
    variants
}

/// q, K and V of every layer over `tokens`.
pub fn record(model: &Model, tokens: &[u32]) -> Result<Vec<Recorded>> {
    let mut cache = open(model.config(), CacheKind::Float(FloatType::F32), tokens.len(), None)?;
    let (sender, receiver) = std::sync::mpsc::channel();
    cache.transforms.push(Box::new(Record { sender }));
    hidden(model, &mut cache, tokens)?;
    let mut layers = vec![Recorded::default(); model.config().num_layers];
    for (layer, chunk) in receiver.try_iter() {
        layers.get_mut(layer).context("no such layer")?.extend(chunk);
    }
    Ok(layers)
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

/// Variants that are scored together: the reference's logits are made once for them.
const SCORED_TOGETHER: usize = 8;
/// Passes that run at a time: the products of one fill the processors while the other does what is not parallel.
const LANES: usize = 2;

/// Caches that passes go through one after another.
struct Lane<'a> {
    model: &'a Model,
    longest: usize,
    backend: Option<BackendId>,
    caches: Vec<(CacheKind, ModelCache<'static>)>,
}

impl Lane<'_> {
    fn pass(
        &mut self,
        kind: CacheKind,
        transforms: Vec<Box<dyn Transform>>,
        tokens: &[u32],
    ) -> Result<Vec<f32>> {
        if !self.caches.iter().any(|(k, _)| *k == kind) {
            let cache = open(self.model.config(), kind, self.longest, self.backend.clone())?;
            self.caches.push((kind, cache));
        }
        let (_, cache) = self.caches.iter_mut().find(|(k, _)| *k == kind).context("just opened")?;
        cache.transforms = transforms;
        hidden(self.model, cache, tokens)
    }
}

/// Measures what `state` lacks, variants in the order given. `step` is called after each variant of each window, `save`
/// whenever scores came in.
pub fn measure(
    model: &Model,
    calibration: &Calibration,
    windows: &[Window],
    variants: &[Variant],
    backend: Option<BackendId>,
    state: &mut State,
    step: impl Fn() + Sync,
    mut save: impl FnMut(&State) -> Result<()>,
) -> Result<()> {
    let longest = windows.iter().map(|w| w.tokens.len()).max().unwrap_or(0);
    let f32_cache = CacheKind::Float(FloatType::F32);
    let mut references: Vec<Option<Reference>> = windows.iter().map(|_| None).collect();
    for together in variants.chunks(SCORED_TOGETHER) {
        let lane = || Lane { model, longest, backend: backend.clone(), caches: Vec::new() };
        let mut lanes: [Lane<'_>; LANES] = std::array::from_fn(|_| lane());
        for (window, reference) in windows.iter().zip(&mut references) {
            let key = |variant: &Variant| format!("{}/{}", window.key, variant.key());
            let missing: Vec<_> = together.iter().filter(|v| !state.scores.contains_key(&key(v))).collect();
            if missing.is_empty() {
                continue;
            }
            let reference = match (reference, &mut lanes) {
                (Some(reference), _) => reference,
                (none, [lane, ..]) => {
                    none.insert(Reference::new(lane.pass(f32_cache, Vec::new(), &window.tokens)?))
                }
            };
            let rows = passes(&mut lanes, &missing, calibration, &window.tokens, &step)?;
            let scores = reference.score(model, &window.tokens, &rows)?;
            for (variant, score) in missing.iter().zip(scores) {
                state.scores.insert(key(variant), score);
            }
            save(state)?;
        }
    }
    Ok(())
}

/// Hidden rows of a window under each of `variants`.
fn passes(
    lanes: &mut [Lane<'_>],
    variants: &[&Variant],
    calibration: &Calibration,
    tokens: &[u32],
    step: &(impl Fn() + Sync),
) -> Result<Vec<Vec<f32>>> {
    let (num_lanes, next) = (lanes.len(), AtomicUsize::new(0));
    let mut rows = vec![Vec::new(); variants.len()];
    let work = |lane: &mut Lane<'_>| -> Result<Vec<(usize, Vec<f32>)>> {
        let mut done = Vec::with_capacity(variants.len() / num_lanes + 1);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(variant) = variants.get(i) else { return Ok(done) };
            let (kind, transforms) = around(variant, calibration, lane.model.config(), lane.longest)?;
            done.push((i, lane.pass(kind, transforms, tokens)?));
            step();
        }
    };
    let of_lanes = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes.iter_mut().map(|lane| scope.spawn(|| work(lane))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;
    for (i, hidden) in of_lanes.into_iter().flatten() {
        if let Some(row) = rows.get_mut(i) {
            *row = hidden;
        }
    }
    Ok(rows)
}

/// The cache of a variant for `num_positions` positions, and what is done before it.
pub fn around(
    variant: &Variant,
    calibration: &Calibration,
    config: &Config,
    num_positions: usize,
) -> Result<(CacheKind, Vec<Box<dyn Transform>>)> {
    let num_positions = num_positions as u32;
    let mut transforms: Vec<Box<dyn Transform>> = Vec::new();
    let smoothing = match variant {
        Variant::Cache(_, smoothing) => *smoothing,
        Variant::Rounded { is_rotated: true, .. } => Smoothing::Rotation,
        Variant::Rounded { is_rotated: false, .. } => Smoothing::None,
    };
    if smoothing != Smoothing::None {
        let offsets = match smoothing {
            Smoothing::KeyOffset | Smoothing::OffsetRotation => calibration.offsets(),
            Smoothing::OffsetShaping => calibration.offsets_over(config, num_positions)?,
            _ => Vec::new(),
        };
        let rotate = smoothing.is_rotated();
        transforms.push(Box::new(SmoothKeys { offsets, rotate, head_dim: config.head_dim }));
    }
    match *variant {
        Variant::Cache(kind, _) => {
            if smoothing.is_shaped() {
                transforms.push(Box::new(calibration.shape(config, kind, &[], num_positions)?));
            }
            Ok((kind, transforms))
        }
        Variant::Rounded { k_group_len, v_group_len, scale_type, rounding, .. } => {
            let len = |group_len: Option<u32>| group_len.map(|len| len as usize);
            let (k_group_len, v_group_len) = (len(k_group_len), len(v_group_len));
            transforms.push(Box::new(FakeQuant { k_group_len, v_group_len, scale_type, rounding }));
            Ok((CacheKind::Float(FloatType::F32), transforms))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn rows_have_names_of_their_own_and_cover_what_is_compared() {
        let all = all_variants(true);
        let keys: BTreeSet<String> = all.iter().map(Variant::key).collect();
        assert_eq!(keys.len(), all.len());
        for group_len in GROUP_LENS {
            for scale_type in ScaleType::ALL {
                for format in ["int8", "int8, K rotated"] {
                    assert!(keys.contains(&format!("{format}/{group_len}/{scale_type}/half-even")));
                }
                assert!(keys.contains(&format!("int8/{group_len}/{scale_type}/toward zero")));
            }
            for side in ["K", "V"] {
                assert!(keys.contains(&format!("int8, {side} only/{group_len}/f16/half-even")));
            }
        }
        assert!(all_variants(false).iter().all(|variant| !variant.key().contains("rotated")));
        for rotates_keys in [true, false] {
            let quick = quick_variants(rotates_keys);
            assert_eq!(quick.len(), 4);
            assert_eq!(quick.iter().any(Variant::is_rotated), rotates_keys);
            assert!(quick.iter().any(|variant| !variant.is_rotated()));
        }
    }
}
