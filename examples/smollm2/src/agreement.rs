//! Whether backends agree: the steps of a real decode, layer by layer, run again through each of them. Stored bytes must be
//! the same, and outputs and lse within the a-priori bound of `docs/error-bound.md` around the oracle.

use crate::cache::{CHUNK_LEN, CacheKind, CacheOptions, ModelCache, PAGE_LEN};
use crate::model::Model;
use crate::sample::argmax;
use crate::transform::{Record, Recorded, SmoothKeys};
use anyhow::{Context, Result, ensure};
use attn_backend::{
    Backend, BackendId, Descriptor, Registry, SelectOptions, Session, SessionOptions, select,
};
use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitPlan};
use candle_core::{Device, Tensor};
use cpu_reference::{Arithmetic, Isa, Workspace, oracle};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, LayoutKind};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Tokens of the prompt's last chunk, which is judged; the chunks before it only fill the cache.
const LAST_CHUNK: usize = 16;

/// What went into attention in a decode: for each layer, step by step, q, K and V of the new tokens. The first step is not
/// judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    /// `[num_layers][num_steps]`.
    pub layers: Vec<Vec<Recorded>>,
    /// Heads of q.
    pub num_q_heads: usize,
    /// Heads of K and V.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl Recording {
    /// Reads `prompt` and decodes `num_steps` tokens greedily over an INT8 cache.
    pub fn of_decode(
        model: &Model,
        kind: CacheKind,
        rotates_keys: bool,
        prompt: &[u32],
        num_steps: usize,
    ) -> Result<Self> {
        let config = model.config();
        ensure!(prompt.len() > LAST_CHUNK, "a prompt of {} tokens; {LAST_CHUNK} are too few", prompt.len());
        let options = CacheOptions {
            kind,
            f16_layers: Vec::new(),
            num_tokens: prompt.len() + num_steps,
            layout: LayoutKind::Native,
            backend: Some(BackendId::CPU),
        };
        let mut cache = ModelCache::open(config, &options)?;
        let (sender, receiver) = std::sync::mpsc::channel();
        if rotates_keys {
            let head_dim = config.head_dim;
            cache.transforms.push(Box::new(SmoothKeys { offsets: Vec::new(), rotate: true, head_dim }));
        }
        cache.transforms.push(Box::new(Record { sender }));
        let sequence = cache.pool().allocate();
        let mut layers = vec![Vec::new(); config.num_layers];
        let (filling, last) = prompt.split_at(prompt.len() - LAST_CHUNK);
        // Returns the last hidden row.
        let mut step = |tokens: &[u32]| -> Result<Vec<f32>> {
            let mut new = vec![Recorded::default(); config.num_layers];
            let mut hidden = Vec::new();
            for chunk in tokens.chunks(CHUNK_LEN as usize) {
                let positions = cache.begin(&[sequence], chunk.len() as u32)?;
                hidden = model.forward(chunk, &positions, &mut cache)?;
                for (layer, part) in receiver.try_iter() {
                    new.get_mut(layer).context("no such layer")?.extend(part);
                }
            }
            layers.iter_mut().zip(new).for_each(|(layer, new): (&mut Vec<Recorded>, _)| layer.push(new));
            Ok(hidden.split_off(hidden.len() - config.width))
        };
        step(filling)?;
        let mut hidden = step(last)?;
        for _ in 0..num_steps {
            let token = argmax(&model.logits(&hidden)?) as u32;
            hidden = step(&[token])?;
        }
        let (num_q_heads, num_kv_heads, head_dim) =
            (config.num_q_heads, config.num_kv_heads, config.head_dim);
        Ok(Self { layers, num_q_heads, num_kv_heads, head_dim })
    }

    /// Writes it as safetensors.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = HashMap::new();
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            for (step_idx, step) in layer.iter().enumerate() {
                // The first step's queries are not asked.
                let q: &[f32] = if step_idx == 0 { &[] } else { &step.q };
                for (name, x, heads) in [
                    ("q", q, self.num_q_heads),
                    ("k", &step.k, self.num_kv_heads),
                    ("v", &step.v, self.num_kv_heads),
                ] {
                    let shape = (x.len() / (heads * self.head_dim), heads, self.head_dim);
                    let tensor = Tensor::from_slice(x, shape, &Device::Cpu)?;
                    tensors.insert(format!("{layer_idx}.{step_idx}.{name}"), tensor);
                }
            }
        }
        candle_core::safetensors::save(&tensors, path)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads what [`Self::save`] wrote.
    pub fn load(path: &Path) -> Result<Self> {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let get = |layer: usize, step: usize, name: &str| tensors.get(&format!("{layer}.{step}.{name}"));
        let heads = |name| Ok::<_, anyhow::Error>(get(0, 0, name).context("no recorded decode")?.dims3()?);
        let ((_, num_q_heads, head_dim), (_, num_kv_heads, _)) = (heads("q")?, heads("k")?);
        let values = |layer, step, name| -> Result<Vec<f32>> {
            let tensor = get(layer, step, name).with_context(|| format!("no {layer}.{step}.{name}"))?;
            Ok(tensor.flatten_all()?.to_vec1()?)
        };
        let num = |of: &dyn Fn(usize) -> bool| (0..).take_while(|i| of(*i)).count();
        let num_steps = num(&|step| get(0, step, "k").is_some());
        let layers = (0..num(&|layer| get(layer, 0, "k").is_some()))
            .map(|layer| {
                let step = |step| {
                    let (q, k) = (values(layer, step, "q")?, values(layer, step, "k")?);
                    Ok(Recorded { q, k, v: values(layer, step, "v")? })
                };
                (0..num_steps).map(step).collect::<Result<Vec<_>>>()
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers, num_q_heads, num_kv_heads, head_dim })
    }

    fn row(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    fn num_tokens(&self) -> usize {
        self.layers.first().map_or(0, |steps| steps.iter().map(|s| s.k.len() / self.row()).sum())
    }

    /// The cache of one layer, and the longest step of all.
    fn descriptor(&self, kind: CacheKind) -> Result<Descriptor> {
        let CacheKind::Int8 { k_group_len, v_group_len, scale_type } = kind else {
            anyhow::bail!("backends are compared on INT8 caches");
        };
        let (heads, dim) = (self.num_kv_heads as u32, self.head_dim as u32);
        let format = CacheFormat::new(heads, dim, k_group_len, v_group_len, scale_type)?;
        let num_pages = self.num_tokens().div_ceil(PAGE_LEN as usize) as u64;
        let layout = CacheLayout::native(format, num_pages, PAGE_LEN)?;
        Ok(Descriptor::new(layout, self.spec(1)).also(self.spec(LAST_CHUNK as u32)))
    }

    fn spec(&self, q_len: u32) -> DecodeSpec {
        DecodeSpec {
            q_len,
            q_type: FloatType::F32,
            out_type: FloatType::F32,
            want_lse: true,
            ..DecodeSpec::new(self.num_q_heads as u32, self.num_kv_heads as u32, self.head_dim as u32)
        }
    }
}

/// Who is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A registered backend, through a session.
    Backend(BackendId),
    /// The CPU backend's code on one instruction set.
    Isa(Isa),
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Backend(id) => write!(f, "{id}"),
            Subject::Isa(isa) => write!(f, "cpu {isa}"),
        }
    }
}

/// A subject over the cache of one layer.
enum Opened {
    Session(Box<Session<'static>>, Arc<dyn Backend>),
    Isa(CacheBuffers, Workspace),
}

/// Output and lse of a step, and how they may have been rounded.
struct Answer {
    out: Vec<f32>,
    lse: Vec<f32>,
    arithmetic: Arithmetic,
}

impl Opened {
    fn new(subject: &Subject, registry: &Registry, descriptor: &Descriptor) -> Result<Self> {
        Ok(match subject {
            Subject::Backend(id) => {
                let selection = select(registry, descriptor, &SelectOptions::named(id.clone()))?;
                let session = Session::open(&selection, SessionOptions::default())?;
                Opened::Session(Box::new(session), Arc::clone(selection.chosen()))
            }
            Subject::Isa(isa) => {
                Opened::Isa(CacheBuffers::zeroed(&descriptor.layout)?, Workspace::for_isa(*isa)?)
            }
        })
    }

    fn append(&mut self, layout: &CacheLayout, step: &Recorded, slots: &[i64]) -> Result<()> {
        let (k, v) = (FloatSlice::F32(&step.k), FloatSlice::F32(&step.v));
        match self {
            Opened::Session(session, _) => Ok(session.append(k, v, slots)?),
            // The plain rule: no instruction set but the portable one has a say in the bytes that others must match.
            Opened::Isa(cache, _) => Ok(kv_quant::append(layout, &mut cache.view_mut(), k, v, slots)?),
        }
    }

    fn decode(
        &mut self,
        layout: &CacheLayout,
        spec: &DecodeSpec,
        kv_len: u32,
        pages: &[i32],
        q: &[f32],
    ) -> Result<Answer> {
        let (mut out, mut lse) = (vec![0f32; q.len()], vec![0f32; spec.lse_elements(1)]);
        let kv_lens = [kv_len];
        let page_table = PageTable::padded(pages, pages.len() as u64);
        let arithmetic = match self {
            Opened::Session(session, backend) => {
                session.plan_for(spec, &kv_lens, page_table)?;
                session.decode(FloatSlice::F32(q), FloatSliceMut::F32(&mut out), Some(&mut lse))?;
                backend.arithmetic(spec, session.split_plan())
            }
            Opened::Isa(cache, workspace) => {
                let plan = SplitPlan::new(
                    spec,
                    &kv_lens,
                    &cpu_reference::Machine::here()
                        .split_config(layout.format(), attn_plan::SplitPolicy::Throughput),
                )?;
                let request = DecodeRequest { spec, kv_lens: &kv_lens, page_table };
                let (q, out) = (FloatSlice::F32(q), FloatSliceMut::F32(&mut out));
                cpu_reference::decode(
                    layout,
                    cache.view(),
                    &request,
                    &plan,
                    q,
                    out,
                    Some(&mut lse),
                    workspace,
                )?;
                Arithmetic::host(spec, &plan)
            }
        };
        Ok(Answer { out, lse, arithmetic })
    }

    fn cache(&mut self, layout: &CacheLayout) -> Result<CacheBuffers> {
        match self {
            Opened::Isa(cache, _) => Ok(cache.clone()),
            Opened::Session(session, _) => {
                let mut cache = CacheBuffers::zeroed(layout)?;
                for (buffer_idx, bytes) in cache.as_mut_vecs().iter_mut().enumerate() {
                    session.read_bytes(buffer_idx, 0, bytes)?;
                }
                Ok(cache)
            }
        }
    }
}

/// What was found of one subject.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Agreement {
    /// Its name.
    pub subject: String,
    /// Steps judged, over all layers.
    pub steps: u64,
    /// Elements of outputs and lse judged.
    pub elements: u64,
    /// Elements beyond the bound.
    pub beyond: u64,
    /// Largest error against the oracle, as a share of its bound.
    pub worst_share: f64,
    /// Layer and step where that was.
    pub worst_at: (usize, usize),
    /// Largest difference of an output element from the first subject's.
    pub largest_difference: f64,
    /// Steps after which the stored bytes were not those of the first subject.
    pub other_bytes: u64,
}

impl Agreement {
    /// Whether everything was within the bound and the same bytes were stored.
    pub fn is_right(&self) -> bool {
        self.beyond == 0 && self.other_bytes == 0 && self.elements > 0
    }

    fn judge(&mut self, got: &[f32], want: &[f64], bound: &[f64], at: (usize, usize)) {
        for ((got, want), bound) in got.iter().zip(want).zip(bound) {
            self.elements += 1;
            let error = (f64::from(*got) - want).abs();
            let share = match error {
                0.0 => 0.0,
                // No comparison would find it.
                _ if error.is_nan() => f64::INFINITY,
                _ => error / bound,
            };
            if share > 1.0 {
                self.beyond += 1;
            }
            if share > self.worst_share {
                (self.worst_share, self.worst_at) = (share, at);
            }
        }
    }
}

/// Runs the recording through every subject. `tick` is called after each layer.
pub fn compare(
    recording: &Recording,
    kind: CacheKind,
    subjects: &[Subject],
    mut tick: impl FnMut(),
) -> Result<Vec<Agreement>> {
    let registry = Registry::builtin();
    let descriptor = recording.descriptor(kind)?;
    let layout = &descriptor.layout;
    // Backwards, so that a backend that ignores the table is found.
    let pages: Vec<i32> = (0..layout.num_pages() as i32).rev().collect();
    let mut found: Vec<Agreement> = subjects
        .iter()
        .map(|subject| Agreement {
            subject: subject.to_string(),
            steps: 0,
            elements: 0,
            beyond: 0,
            worst_share: 0.0,
            worst_at: (0, 0),
            largest_difference: 0.0,
            other_bytes: 0,
        })
        .collect();
    for (layer_idx, steps) in recording.layers.iter().enumerate() {
        let mut opened = subjects
            .iter()
            .map(|subject| Opened::new(subject, &registry, &descriptor))
            .collect::<Result<Vec<_>>>()?;
        let mut kv_len = 0u32;
        for (step_idx, step) in steps.iter().enumerate() {
            let new = (step.k.len() / recording.row()) as u32;
            let table = PageTable::padded(&pages, pages.len() as u64);
            let slots: Vec<i64> = (kv_len..kv_len + new)
                .map(|t| table.slot(0, t, PAGE_LEN).map_or(-1, |slot| slot as i64))
                .collect();
            kv_len += new;
            opened.iter_mut().try_for_each(|subject| subject.append(layout, step, &slots))?;
            if step_idx == 0 {
                continue;
            }
            let at = (layer_idx, step_idx);
            judge(recording, layout, (&mut opened, &mut found), (kv_len, &pages), step, at)?;
        }
        tick();
    }
    Ok(found)
}

fn judge(
    recording: &Recording,
    layout: &CacheLayout,
    (opened, found): (&mut [Opened], &mut [Agreement]),
    (kv_len, pages): (u32, &[i32]),
    step: &Recorded,
    at: (usize, usize),
) -> Result<()> {
    let spec = recording.spec((step.k.len() / recording.row()) as u32);
    let kv_lens = [kv_len];
    let page_table = PageTable::padded(pages, pages.len() as u64);
    let request = DecodeRequest { spec: &spec, kv_lens: &kv_lens, page_table };
    let mut first: Option<(CacheBuffers, oracle::OracleOutput, Vec<f32>)> = None;
    for (subject, found) in opened.iter_mut().zip(found) {
        let answer = subject.decode(layout, &spec, kv_len, pages, &step.q)?;
        let cache = subject.cache(layout)?;
        if first.is_none() {
            let expected = oracle::decode_request(layout, &cache.view(), &request, FloatSlice::F32(&step.q))?;
            let expected = expected.into_iter().next().context("no request")?;
            first = Some((cache.clone(), expected, answer.out.clone()));
        }
        let Some((bytes, expected, first_out)) = &first else { continue };
        found.other_bytes += u64::from(*bytes != cache);
        found.judge(&answer.out, &expected.out, &expected.bound(&answer.arithmetic), at);
        found.judge(&answer.lse, &expected.lse, &expected.lse_bound(&answer.arithmetic), at);
        let differences = answer.out.iter().zip(first_out).map(|(a, b)| f64::from(a - b).abs());
        found.largest_difference = differences.fold(found.largest_difference, f64::max);
        found.steps += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_quant::ScaleType;

    fn recording() -> Recording {
        let (num_q_heads, num_kv_heads, head_dim) = (6, 2, 32);
        let mut seed = 1u32;
        let mut values = |n: usize| -> Vec<f32> {
            let next = || {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            std::iter::repeat_with(next).take(n).collect()
        };
        let mut step = |tokens: usize| {
            let mut of = |heads: usize| values(tokens * heads * head_dim);
            Recorded { q: of(num_q_heads), k: of(num_kv_heads), v: of(num_kv_heads) }
        };
        let layers = (0..2).map(|_| vec![step(70), step(LAST_CHUNK), step(1), step(1)]).collect();
        Recording { layers, num_q_heads, num_kv_heads, head_dim }
    }

    #[test]
    fn all_instruction_sets_store_the_same_bytes_and_stay_within_the_bound() {
        let subjects: Vec<Subject> = [Subject::Backend(BackendId::CPU)]
            .into_iter()
            .chain(Isa::available().into_iter().map(Subject::Isa))
            .collect();
        let kind = CacheKind::int8(16, ScaleType::F16);
        let found = compare(&recording(), kind, &subjects, || ()).unwrap();
        assert!(found.len() > 1);
        for found in found {
            assert!(found.is_right(), "{found:?}");
            assert_eq!((found.steps, found.elements), (6, 2 * 18 * 6 * 33));
            assert!(found.worst_share > 0.0, "{found:?}");
        }
    }

    #[test]
    fn a_wrong_element_and_a_nan_are_beyond() {
        let mut found = compare(&recording(), CacheKind::int8(32, ScaleType::F16), &[], || ()).unwrap();
        assert!(found.is_empty());
        found.push(Agreement {
            subject: String::new(),
            steps: 0,
            elements: 0,
            beyond: 0,
            worst_share: 0.0,
            worst_at: (0, 0),
            largest_difference: 0.0,
            other_bytes: 0,
        });
        let found = found.first_mut().unwrap();
        found.judge(&[1.0, 1.5], &[1.0, 1.0], &[0.0, 0.5], (0, 1));
        assert!(found.is_right() && found.worst_share == 1.0);
        found.judge(&[1.6], &[1.0], &[0.5], (2, 3));
        assert_eq!((found.beyond, found.worst_at), (1, (2, 3)));
        found.judge(&[f32::NAN], &[1.0], &[0.5], (4, 5));
        assert_eq!((found.beyond, found.worst_at), (2, (4, 5)));
    }

    #[test]
    fn a_recording_comes_back_as_it_was_written() {
        let folder = std::env::temp_dir().join(format!("kv8-recording-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("decode.safetensors");
        let mut recording = recording();
        recording.save(&path).unwrap();
        let loaded = Recording::load(&path).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        recording.layers.iter_mut().filter_map(|steps| steps.first_mut()).for_each(|step| step.q.clear());
        assert_eq!(loaded, recording);
    }
}
