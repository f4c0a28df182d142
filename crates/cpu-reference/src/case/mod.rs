//! Whole decode problems built from a few numbers and a seed, with poison in everything that must not be read.
//!
//! A [`CaseConfig`] is small and prints itself; [`CaseConfig::build`] expands it to a cache, a page table, queries and a
//! plan. Codes of dead slots are -128, their scales NaN, page indices past the end of a row far out of range: a kernel
//! that reads one token too many does not get away with it.

mod data;
mod floats;
mod mismatch;
mod rng;

pub use data::Data;
pub use floats::Floats;
pub use mismatch::Mismatch;
pub use rng::Rng;

use crate::{Arithmetic, Error, oracle};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan, SplitPolicy};
use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, FloatSliceMut, FloatType, LayoutKind, Plane, PlaneId, ScaleType,
    Side,
};

/// The numbers that make a case. Any combination that the types of `kv_quant` and `attn_plan` accept is valid.
#[derive(Clone, Debug, PartialEq)]
pub struct CaseConfig {
    /// Heads of the cache.
    pub num_kv_heads: u32,
    /// Query heads a kv head.
    pub gqa_group: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Channels that share a scale of K.
    pub k_group_len: u32,
    /// Channels that share a scale of V.
    pub v_group_len: u32,
    /// Storage type of scales.
    pub scale_type: ScaleType,
    /// Arrangement of the cache.
    pub layout: LayoutKind,
    /// Slots of a page; a page is one slot for [`LayoutKind::LightLlm`] whatever this says.
    pub page_len: u32,
    /// Whether a request's pages lie in random order; in order otherwise.
    pub shuffled: bool,
    /// Whether rows of the page table start anywhere ([`PageRows::Starts`]); padded to one stride otherwise.
    pub ragged_rows: bool,
    /// Tokens of each request.
    pub kv_lens: Vec<u32>,
    /// New tokens of each request.
    pub q_len: u32,
    /// Sliding window.
    pub window: Option<u32>,
    /// Logit soft-cap.
    pub soft_cap: Option<f32>,
    /// Whether there are ALiBi slopes (`2^(-8 (h + 1) / num_q_heads)`).
    pub alibi: bool,
    /// Whether there are attention sinks (around 0, from the seed).
    pub sinks: bool,
    /// Type of the K and V that are appended.
    pub kv_type: FloatType,
    /// Type of q.
    pub q_type: FloatType,
    /// Type of the output.
    pub out_type: FloatType,
    /// What the numbers look like.
    pub data: Data,
    /// How the batch is cut.
    pub split: SplitConfig,
    /// Seed of everything random.
    pub seed: u64,
}

impl Default for CaseConfig {
    /// One request of 100 tokens, 2 kv heads of 64 channels, groups of 32, native layout, Gaussian data.
    fn default() -> Self {
        Self {
            num_kv_heads: 2,
            gqa_group: 2,
            head_dim: 64,
            k_group_len: 32,
            v_group_len: 32,
            scale_type: ScaleType::F16,
            layout: LayoutKind::Native,
            page_len: 16,
            shuffled: true,
            ragged_rows: false,
            kv_lens: vec![100],
            q_len: 1,
            window: None,
            soft_cap: None,
            alibi: false,
            sinks: false,
            kv_type: FloatType::F32,
            q_type: FloatType::F32,
            out_type: FloatType::F32,
            data: Data::Gaussian,
            split: SplitConfig { num_workers: 3, tile_len: 16, ..SplitConfig::throughput(3) },
            seed: 1,
        }
    }
}

/// A decode problem ready to run: cache filled and poisoned, page table, queries, plan.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it was built from.
    pub config: CaseConfig,
    /// Layout of the cache.
    pub layout: CacheLayout,
    /// The cache's memory.
    pub cache: CacheBuffers,
    /// Shapes, mask, types.
    pub spec: DecodeSpec,
    /// Page indices of all rows, poison between and behind them.
    pub pages: Vec<i32>,
    /// Where each request's row starts.
    pub row_starts: Vec<u64>,
    /// Distance between rows of a padded table; `None` if rows start anywhere.
    pub row_stride: Option<u64>,
    /// `[batch, q_len, num_q_heads, head_dim]`.
    pub q: Floats,
    /// The split schedule.
    pub plan: SplitPlan,
}

impl CaseConfig {
    /// Query heads.
    pub fn num_q_heads(&self) -> u32 {
        self.num_kv_heads * self.gqa_group
    }

    /// Expands the numbers. Equal configs give equal bits on every machine.
    ///
    /// # Errors
    /// A combination that a format, layout, spec, plan or the quantizer refuses.
    pub fn build(&self) -> Result<Case, Error> {
        let format = CacheFormat::new(
            self.num_kv_heads,
            self.head_dim,
            self.k_group_len,
            self.v_group_len,
            self.scale_type,
        )?;
        let mut rng = Rng::new(self.seed);
        let page_len = if self.layout == LayoutKind::LightLlm { 1 } else { self.page_len.max(1) };
        let needed: u64 = self.kv_lens.iter().map(|len| u64::from(len.div_ceil(page_len))).sum();
        let layout = self.layout(format, needed + 3, page_len)?;
        let mut free: Vec<i32> = (0..layout.num_pages() as i32).collect();
        if self.shuffled {
            rng.shuffle(&mut free);
        }
        let (pages, row_starts, row_stride) = self.page_table(&mut rng, free, page_len);
        let mut spec = DecodeSpec::new(self.num_q_heads(), self.num_kv_heads, self.head_dim);
        spec.q_len = self.q_len;
        spec.window = self.window;
        spec.soft_cap = self.soft_cap;
        let heads = self.num_q_heads();
        spec.alibi_slopes =
            self.alibi.then(|| (0..heads).map(|h| (-8.0 * (h + 1) as f32 / heads as f32).exp2()).collect());
        spec.sinks = self.sinks.then(|| (0..heads).map(|_| rng.gaussian() * 2.0).collect());
        (spec.q_type, spec.out_type, spec.want_lse) = (self.q_type, self.out_type, true);
        spec.check()?;
        let mut cache = CacheBuffers::zeroed(&layout)?;
        poison(&layout, &mut cache);
        let plan = SplitPlan::new(&spec, &self.kv_lens, &self.split)?;
        let q = Floats::round(self.q_type, &data::queries(self, &mut rng));
        let mut case = Case {
            config: self.clone(),
            layout,
            cache,
            spec,
            pages,
            row_starts,
            row_stride,
            q: q.clone(),
            plan,
        };
        for (request_idx, &kv_len) in self.kv_lens.iter().enumerate() {
            let slots = case.slots(request_idx, kv_len);
            let (k, v) = data::tokens(self, request_idx, &q, &mut rng);
            let (k, v) = (Floats::round(self.kv_type, &k), Floats::round(self.kv_type, &v));
            let Case { layout, cache, .. } = &mut case;
            kv_quant::append(layout, &mut cache.view_mut(), k.as_slice(), v.as_slice(), &slots)?;
        }
        Ok(case)
    }

    fn layout(&self, format: CacheFormat, num_pages: u64, page_len: u32) -> Result<CacheLayout, Error> {
        Ok(match self.layout {
            LayoutKind::LightLlm => CacheLayout::lightllm(format, num_pages)?,
            LayoutKind::Hnd => CacheLayout::hnd(format, num_pages, page_len)?,
            LayoutKind::Nhd => CacheLayout::nhd(format, num_pages, page_len)?,
            LayoutKind::Native => CacheLayout::native(format, num_pages, page_len)?,
            LayoutKind::Custom => {
                // Slot-major with odd gaps everywhere: nothing is aligned beyond the scales themselves.
                let plane = |buffer_idx, row: u64| {
                    let head_stride = row + 1;
                    let slot_stride = u64::from(self.num_kv_heads) * head_stride + 3;
                    let page_stride = u64::from(page_len) * slot_stride + 5;
                    Plane { buffer_idx, offset: 7, page_stride, slot_stride, head_stride }
                };
                let dim = u64::from(self.head_dim);
                let [k, v] = [Side::K, Side::V].map(|side| u64::from(format.num_groups(side)));
                let planes = [plane(0, dim), plane(1, dim), plane(2, k), plane(3, v)];
                CacheLayout::custom(format, num_pages, page_len, planes)?
            }
        })
    }

    /// Page indices with poison around every row.
    fn page_table(&self, rng: &mut Rng, free: Vec<i32>, page_len: u32) -> (Vec<i32>, Vec<u64>, Option<u64>) {
        const POISON: [i32; 4] = [i32::MAX, i32::MIN, -1, 0x4000_0000];
        let mut free = free.into_iter();
        let longest = self.kv_lens.iter().map(|len| len.div_ceil(page_len)).max().unwrap_or(0);
        let stride = u64::from(longest) + 2;
        let (mut pages, mut starts) = (Vec::new(), Vec::new());
        for (request_idx, len) in self.kv_lens.iter().enumerate() {
            if self.ragged_rows {
                pages.extend((0..1 + rng.below(3)).map(|i| POISON[i as usize % POISON.len()]));
            } else {
                pages.resize(request_idx * stride as usize, POISON[request_idx % POISON.len()]);
            }
            starts.push(pages.len() as u64);
            pages.extend(free.by_ref().take(len.div_ceil(page_len) as usize));
        }
        let end = if self.ragged_rows { pages.len() + 1 } else { self.kv_lens.len() * stride as usize };
        pages.resize(end, i32::MAX);
        (pages, starts, (!self.ragged_rows).then_some(stride))
    }
}

impl Case {
    /// The request, as a backend gets it.
    pub fn request(&self) -> DecodeRequest<'_> {
        let rows = match self.row_stride {
            Some(stride) => PageRows::Stride(stride),
            None => PageRows::Starts(&self.row_starts),
        };
        let page_table = PageTable { pages: &self.pages, rows };
        DecodeRequest { spec: &self.spec, kv_lens: &self.config.kv_lens, page_table }
    }

    /// Slots of a request's first `num_tokens` tokens.
    pub fn slots(&self, request_idx: usize, num_tokens: u32) -> Vec<i64> {
        let slot = |t| self.request().page_table.slot(request_idx, t, self.layout.page_len());
        (0..num_tokens).map(|t| slot(t).map_or(-1, |slot| slot as i64)).collect()
    }

    /// A NaN-filled output of the right length and type.
    pub fn empty_out(&self) -> Floats {
        Floats::round(self.spec.out_type, &vec![f32::NAN; self.q.len()])
    }

    /// A NaN-filled lse of the right length.
    pub fn empty_lse(&self) -> Vec<f32> {
        vec![f32::NAN; self.spec.lse_elements(self.config.kv_lens.len())]
    }

    /// Runs the oracle on every request.
    ///
    /// # Errors
    /// None for a case that was built by [`CaseConfig::build`] and not changed.
    pub fn expected(&self) -> Result<Vec<oracle::OracleOutput>, Error> {
        oracle::decode_request(&self.layout, &self.cache.view(), &self.request(), self.q.as_slice())
    }

    /// Runs the CPU backend on the case.
    ///
    /// # Errors
    /// Those of [`crate::decode`].
    pub fn run(&self, workspace: &mut crate::Workspace) -> Result<(Floats, Vec<f32>), Error> {
        let (mut out, mut lse) = (self.empty_out(), self.empty_lse());
        let out_slice: FloatSliceMut<'_> = out.as_mut_slice();
        let (q, lse_slice) = (self.q.as_slice(), Some(lse.as_mut_slice()));
        let view = self.cache.view();
        crate::decode(&self.layout, view, &self.request(), &self.plan, q, out_slice, lse_slice, workspace)?;
        Ok((out, lse))
    }

    /// Compares a kernel's output (and lse, if it has one) with the oracle, within the a-priori bound of its arithmetic.
    ///
    /// # Errors
    /// The element that is furthest beyond its bound.
    pub fn check(
        &self,
        out: &Floats,
        lse: Option<&[f32]>,
        arithmetic: &Arithmetic,
    ) -> Result<(), Box<Mismatch>> {
        mismatch::check(self, self.expected().as_deref().ok(), out, lse, arithmetic)
    }

    /// As [`Self::check`], with the oracle's word from [`Self::expected`]: for several kernels on one case.
    ///
    /// # Errors
    /// The element that is furthest beyond its bound.
    pub fn check_against(
        &self,
        expected: &[oracle::OracleOutput],
        out: &Floats,
        lse: Option<&[f32]>,
        arithmetic: &Arithmetic,
    ) -> Result<(), Box<Mismatch>> {
        mismatch::check(self, Some(expected), out, lse, arithmetic)
    }

    /// The arithmetic of an f32 backend over this case's plan.
    pub fn f32_arithmetic(&self) -> Arithmetic {
        Arithmetic::f32(&self.spec, &self.plan)
    }

    /// The arithmetic of [`Self::run`].
    pub fn host_arithmetic(&self) -> Arithmetic {
        Arithmetic::host(&self.spec, &self.plan)
    }
}

/// Codes -128, scales NaN, padding 0x80, in the whole cache.
fn poison(layout: &CacheLayout, cache: &mut CacheBuffers) {
    for buffer in cache.as_mut_vecs() {
        buffer.fill(0x80);
    }
    let mut view = cache.view_mut();
    for slot in 0..layout.num_slots() {
        for head in 0..layout.format().num_kv_heads() {
            for side in [Side::K, Side::V] {
                // All bits set is NaN in f16, bf16 and f32 alike.
                let (buffer_idx, range) = layout.row_bytes(PlaneId::Scales(side), slot, head);
                view.bytes_mut(buffer_idx, range).fill(0xff);
            }
        }
    }
}

/// Positions at which an off-by-one shows: first, last, and both sides of every edge of a tile or split.
pub fn edge_tokens(kv_len: u32, split: &SplitConfig) -> Vec<u32> {
    let step = match split.policy {
        SplitPolicy::BatchInvariant { split_len } => split_len,
        SplitPolicy::Throughput => split.tile_len,
    };
    let mut tokens = vec![0, 1, kv_len.saturating_sub(2), kv_len.saturating_sub(1)];
    for step in [step, split.tile_len] {
        for edge in (step.max(1)..kv_len).step_by(step.max(1) as usize) {
            tokens.extend([edge - 1, edge]);
        }
    }
    tokens.retain(|&t| t < kv_len);
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}
