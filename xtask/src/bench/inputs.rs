//! What a case reads: real quantized data, shuffled page tables, random queries, ragged lengths. All on the host.

use super::case::Case;
use anyhow::Result;
use cpu_reference::case::{Floats, Rng};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatType, LayoutKind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The stream that replicates a pattern copies whole multiples of this many bytes.
const COPY_UNIT: u64 = 65_536;
/// Fewest distinct tokens of a pattern.
const PATTERN_TOKENS: u64 = 4096;
/// Pools rotate through this many times the L2.
const L2_TIMES: u64 = 5;
/// A graph should run at least this long, so that its launch does not show.
const GRAPH_MICROSECONDS: f64 = 600.0;

/// Layout kind, page length and format: what two pools of the same contents have in common.
pub type PoolKey = (LayoutKind, u32, CacheFormat);

/// A host cache of Gaussian rows, which a pool repeats over and over.
#[derive(Debug)]
pub struct Pattern {
    pub key: PoolKey,
    pub layout: CacheLayout,
    pub cache: CacheBuffers,
}

impl Pattern {
    fn new(case: &Case) -> Result<Self> {
        let one_page = case.layout_of(1)?;
        let mut num_pages = (PATTERN_TOKENS / u64::from(case.page_len)).max(1);
        while one_page.buffer_bytes().iter().any(|bytes| !(bytes * num_pages).is_multiple_of(COPY_UNIT)) {
            num_pages *= 2;
        }
        let layout = case.layout_of(num_pages)?;
        let cache = gaussian_cache(&layout)?;
        Ok(Self { key: (case.layout, case.page_len, *layout.format()), layout, cache })
    }
}

/// The patterns that were made so far.
#[derive(Debug, Default)]
pub struct Patterns(Mutex<Vec<Arc<Pattern>>>);

impl Patterns {
    /// The pattern of a case.
    pub fn of(&self, case: &Case) -> Result<Arc<Pattern>> {
        let key = (case.layout, case.page_len, *case.layout_of(1)?.format());
        // A pattern is pushed whole or not at all.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pattern) = known.iter().find(|pattern| pattern.key == key) {
            return Ok(Arc::clone(pattern));
        }
        let pattern = Arc::new(Pattern::new(case)?);
        known.push(Arc::clone(&pattern));
        Ok(pattern)
    }
}

/// A host cache of Gaussian rows, every slot written through the append that users call.
fn gaussian_cache(layout: &CacheLayout) -> Result<CacheBuffers> {
    // Rows are windows at random places of one long random block: no two alike, and made in a moment.
    static BLOCK: OnceLock<Vec<f32>> = OnceLock::new();
    let block = BLOCK.get_or_init(|| {
        let mut rng = Rng::new(1);
        (0..1 << 20).map(|_| rng.gaussian()).collect()
    });
    let mut rng = Rng::new(7);
    let row = layout.format().num_kv_heads() as usize * layout.format().head_dim() as usize;
    let tokens = usize::try_from(layout.num_slots())?;
    let mut values = |scale: f32| {
        let mut values = Vec::with_capacity(tokens * row);
        for _ in 0..tokens {
            let start = rng.below((block.len() - row) as u64) as usize;
            values.extend(block.iter().skip(start).take(row).map(|x| x * scale));
        }
        Floats::round(FloatType::F16, &values)
    };
    let (k, v) = (values(1.0), values(0.7));
    let slots: Vec<i64> = (0..layout.num_slots() as i64).collect();
    let mut cache = CacheBuffers::zeroed(layout)?;
    cpu_reference::append(layout, &mut cache.view_mut(), k.as_slice(), v.as_slice(), &slots)?;
    Ok(cache)
}

/// How many launches a timed graph takes, and how many tables they rotate through.
pub fn launches(bytes: f64, l2_bytes: u64, read_gb_per_s: f64) -> (usize, u64) {
    let rotations = ((L2_TIMES * l2_bytes) as f64 / bytes).ceil().clamp(1.0, 256.0) as u64;
    let expected = 4.0 + bytes / read_gb_per_s / 1e3;
    let launches = ((GRAPH_MICROSECONDS / expected).ceil() as usize).clamp(1, 400);
    (launches.max(rotations as usize), rotations)
}

/// A case and everything of it that the host makes.
#[derive(Debug)]
pub struct Inputs {
    pub case: Case,
    /// Codes and scales that a launch reads.
    pub bytes: f64,
    /// Launches of one timed graph.
    pub launches: usize,
    pub rotations: u64,
    pub tables: Tables,
    pub q: Floats,
    pub pattern: Arc<Pattern>,
}

impl Inputs {
    pub fn new(case: &Case, patterns: &Patterns, l2_bytes: u64, read_gb_per_s: f64) -> Result<Self> {
        let per_token = case.layout_of(1)?.format().bytes_per_token();
        let run = attn_tune::RunKey::of_step(&case.spec, &case.kv_lens);
        let bytes = (run.kv_tokens * per_token) as f64;
        let (launches, rotations) = launches(bytes, l2_bytes, read_gb_per_s);
        Ok(Self {
            bytes,
            launches,
            rotations,
            tables: Tables::shuffled(case, rotations),
            q: gaussians(case.spec.q_type, case.spec.q_elements(case.kv_lens.len()), 4),
            pattern: patterns.of(case)?,
            case: case.clone(),
        })
    }

    /// Pages that all rotations read.
    pub fn num_pages(&self) -> u64 {
        self.tables.pages_per_step * self.rotations
    }

    /// One request's pages in the first rotation, as pages of the pattern.
    pub fn pattern_pages(&self, request: usize) -> Vec<i32> {
        let num_pages =
            self.case.kv_lens.get(request).map_or(0, |&kv_len| self.case.pages_of(kv_len)) as usize;
        let start = self.tables.starts.get(request).copied().unwrap_or(0) as usize;
        let in_pattern = self.pattern.layout.num_pages() as i32;
        self.tables.pages.iter().skip(start).take(num_pages).map(|page| page % in_pattern).collect()
    }
}

/// Page tables of `rotations` steps over disjoint, shuffled pages, and where each request's row starts.
#[derive(Debug)]
pub struct Tables {
    /// `[rotations, pages of a step]`.
    pub pages: Vec<i32>,
    /// `[batch]`, within a step.
    pub starts: Vec<u64>,
    pub pages_per_step: u64,
}

impl Tables {
    pub fn shuffled(case: &Case, rotations: u64) -> Self {
        let mut starts = Vec::with_capacity(case.kv_lens.len());
        let mut pages_per_step = 0;
        for &kv_len in &case.kv_lens {
            starts.push(pages_per_step);
            pages_per_step += case.pages_of(kv_len);
        }
        let mut pages: Vec<i32> = (0..(pages_per_step * rotations) as i32).collect();
        Rng::new(2).shuffle(&mut pages);
        Self { pages, starts, pages_per_step }
    }
}

/// Random numbers of a type.
pub fn gaussians(float_type: FloatType, len: usize, seed: u64) -> Floats {
    let mut rng = Rng::new(seed);
    let values: Vec<f32> = (0..len).map(|_| rng.gaussian()).collect();
    Floats::round(float_type, &values)
}

/// Log-normal lengths with this median and this deviation of the logarithm, at most 128 k.
pub fn log_normal_lens(batch: usize, median: f64, sigma: f64, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..batch)
        .map(|_| (median * (sigma * f64::from(rng.gaussian())).exp()).clamp(1.0, 131_072.0) as u32)
        .collect()
}
