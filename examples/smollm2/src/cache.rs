//! The model's KV cache: one session a layer, one pool of pages for all of them.

use crate::model::{Attention, Config};
use anyhow::{Context, Result, ensure};
use attn_backend::{
    BackendId, Descriptor, Registry, SelectOptions, Selection, Session, SessionOptions, select,
};
use attn_plan::{DecodeSpec, PageRows, PageTable};
use kv_quant::{
    AppendSlots, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, LayoutKind, PagePool,
    ScaleType, SequenceId,
};
use std::time::{Duration, Instant};

/// Slots of a page.
pub const PAGE_LEN: u32 = 16;
/// The largest prefill chunk.
pub const CHUNK_LEN: u32 = 512;

/// How K and V are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheKind {
    /// INT8 codes in groups.
    Int8 {
        /// Channels a scale of K.
        k_group_len: u32,
        /// Channels a scale of V.
        v_group_len: u32,
        /// Scale type.
        scale_type: ScaleType,
    },
    /// Unquantized floats.
    Float(FloatType),
}

impl CacheKind {
    /// INT8 with one group length.
    pub fn int8(group_len: u32, scale_type: ScaleType) -> Self {
        Self::Int8 { k_group_len: group_len, v_group_len: group_len, scale_type }
    }

    /// The format for a model.
    pub fn format(self, config: &Config) -> Result<CacheFormat> {
        let (heads, dim) = (config.num_kv_heads as u32, config.head_dim as u32);
        Ok(match self {
            CacheKind::Int8 { k_group_len, v_group_len, scale_type } => {
                CacheFormat::new(heads, dim, k_group_len, v_group_len, scale_type)?
            }
            CacheKind::Float(float_type) => CacheFormat::unquantized(heads, dim, float_type)?,
        })
    }
}

/// What a cache is to be.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Format of every layer.
    pub kind: CacheKind,
    /// Layers kept in f16 instead.
    pub f16_layers: Vec<usize>,
    /// Tokens that fit, over all sequences.
    pub num_tokens: usize,
    /// Arrangement: native, hnd or nhd.
    pub layout: LayoutKind,
    /// A backend by name; otherwise the best.
    pub backend: Option<BackendId>,
}

/// Looks at, or changes, what goes into attention: `q` `[n, num_q_heads, head_dim]`, `k` and `v`
/// `[n, num_kv_heads, head_dim]`, after the rotary embedding.
pub trait Transform: Send {
    /// Before K and V are stored.
    fn before(&mut self, layer: usize, q: &mut [f32], k: &mut [f32], v: &mut [f32]) -> Result<()>;
}

/// Sessions of all layers, pages, and the step in hand.
pub struct ModelCache<'a> {
    sessions: Vec<Session<'static>>,
    selection: Selection,
    pool: PagePool,
    spec: DecodeSpec,
    append: AppendSlots,
    kv_lens: Vec<u32>,
    pages: Vec<i32>,
    row_starts: Vec<u64>,
    /// Time spent in append, plan and decode.
    pub attention_time: Duration,
    /// What is done before attention, in this order.
    pub transforms: Vec<Box<dyn Transform + 'a>>,
}

impl<'a> ModelCache<'a> {
    /// Selects a backend and opens a session for each layer.
    pub fn open(config: &Config, options: &CacheOptions) -> Result<Self> {
        let num_pages = options.num_tokens.div_ceil(PAGE_LEN as usize).max(1) as u64;
        let spec = |q_len| DecodeSpec {
            q_len,
            q_type: FloatType::F32,
            out_type: FloatType::F32,
            ..DecodeSpec::new(config.num_q_heads as u32, config.num_kv_heads as u32, config.head_dim as u32)
        };
        let registry = Registry::builtin();
        let choose = |kind: CacheKind| -> Result<Selection> {
            let format = kind.format(config)?;
            let layout = match options.layout {
                LayoutKind::Hnd => CacheLayout::hnd(format, num_pages, PAGE_LEN)?,
                LayoutKind::Nhd => CacheLayout::nhd(format, num_pages, PAGE_LEN)?,
                _ => CacheLayout::native(format, num_pages, PAGE_LEN)?,
            };
            // Shorter chunks are covered by the longest.
            let descriptor = Descriptor::new(layout, spec(1)).also(spec(CHUNK_LEN));
            let select_options =
                SelectOptions { backend: options.backend.clone(), ..SelectOptions::default() };
            Ok(select(&registry, &descriptor, &select_options)?)
        };
        let selection = choose(options.kind)?;
        let plain = match options.f16_layers.is_empty() {
            true => None,
            false => Some(choose(CacheKind::Float(FloatType::F16))?),
        };
        let sessions = (0..config.num_layers)
            .map(|layer| {
                let plain = plain.as_ref().filter(|_| options.f16_layers.contains(&layer));
                Ok(Session::open(plain.unwrap_or(&selection), SessionOptions::default())?)
            })
            .collect::<Result<Vec<_>>>()?;
        let bytes_per_page = sessions.iter().map(|s| s.layout().bytes_per_page()).sum();
        Ok(Self {
            pool: PagePool::new(num_pages as u32, PAGE_LEN, bytes_per_page),
            sessions,
            selection,
            spec: spec(1),
            append: AppendSlots::default(),
            kv_lens: Vec::new(),
            pages: Vec::new(),
            row_starts: Vec::new(),
            attention_time: Duration::ZERO,
            transforms: Vec::new(),
        })
    }

    /// Which backend runs and why the others do not.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// The books: sequences, forks, pages in use.
    pub fn pool(&mut self) -> &mut PagePool {
        &mut self.pool
    }

    /// Prepares a step that appends `num_new` tokens (at most [`CHUNK_LEN`]) to each sequence: takes pages, copies
    /// shared ones, and returns the positions of the new tokens, `[batch, num_new]`.
    pub fn begin(&mut self, sequences: &[SequenceId], num_new: u32) -> Result<Vec<u32>> {
        ensure!((1..=CHUNK_LEN).contains(&num_new), "a chunk of {num_new} tokens; valid: 1 to {CHUNK_LEN}");
        self.spec.q_len = num_new;
        let batch: Vec<_> = sequences.iter().map(|&sequence| (sequence, num_new)).collect();
        self.pool.append_batch(&batch, &mut self.append).context("the cache is full")?;
        if !self.append.copies().is_empty() {
            for session in &mut self.sessions {
                session.copy_pages(self.append.copies())?;
            }
        }
        self.pool.fill_page_table(sequences, &mut self.pages, &mut self.row_starts)?;
        self.pool.fill_lens(sequences, &mut self.kv_lens)?;
        Ok(self.kv_lens.iter().flat_map(|&len| len - num_new..len).collect())
    }

    /// Bytes of the pages in use.
    pub fn bytes_used(&self) -> u64 {
        self.pool.bytes_used()
    }

    /// Bytes that f16 K and V of the same pages would take.
    pub fn bytes_in_f16(&self) -> u64 {
        let tokens = (self.pool.num_pages() - self.pool.num_free_pages()) * u64::from(PAGE_LEN);
        let rows = self.sessions.iter().map(|s| s.layout().format().row_elements() as u64).sum::<u64>();
        tokens * rows * 2 * 2
    }
}

impl Attention for ModelCache<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &mut [f32],
        k: &mut [f32],
        v: &mut [f32],
        out: &mut [f32],
    ) -> Result<()> {
        let session = self.sessions.get_mut(layer).context("no such layer")?;
        for transform in &mut self.transforms {
            transform.before(layer, q, k, v)?;
        }
        let start = Instant::now();
        let table = PageTable { pages: &self.pages, rows: PageRows::Starts(&self.row_starts) };
        session.append(FloatSlice::F32(k), FloatSlice::F32(v), self.append.slots())?;
        session.plan_for(&self.spec, &self.kv_lens, table)?;
        session.decode(FloatSlice::F32(q), FloatSliceMut::F32(out), None)?;
        self.attention_time += start.elapsed();
        Ok(())
    }
}
