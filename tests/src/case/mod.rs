//! What the suite can ask of a backend, as small printable values: a shape and a seed, from which a [`crate::problem::Problem`]
//! is made.

mod profile;
mod strategy;

use attn_plan::{DecodeSpec, SplitConfig, SplitPolicy};
use kv_quant::{CacheFormat, CacheLayout, FloatType, LayoutKind, Plane, ScaleType, Side};

pub use profile::Profile;
pub use strategy::{cases, lens_around};

/// What the numbers look like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Data {
    /// Gaussian K and V of this standard deviation.
    Normal(f32),
    /// Gaussian, two channels of K larger by this factor.
    Outliers(f32),
    /// All keys alike in direction, so that the query finds one token: the one at this share of the visible range.
    Needle(f32),
    /// As `Needle`, at this token.
    NeedleAt(u32),
    /// q = 0 and V integer: the output is the exact mean of the visible V rows.
    Mean,
    /// All keys are 0 but this token's, whose logit leaves nothing to the others: the output is its V row, exactly.
    OneHot(u32),
    /// Every V is 127, and so is every output.
    Ones,
    /// Every logit is this number and V is integer: an exact mean again, however extreme the number.
    EqualLogits(f32),
    /// Any codes, -128 among them, and any positive scales, subnormal ones among them: not written by append.
    Raw,
}

/// How rows of the page table lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// `[batch, stride]`.
    Padded,
    /// Rows anywhere, in any order, with gaps.
    Scattered,
}

/// One decode step with its cache: everything but the numbers, which follow from `seed`.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Channels of a head.
    pub head_dim: u32,
    /// K group.
    pub k_group_len: u32,
    /// V group.
    pub v_group_len: u32,
    /// Type of scales.
    pub scale_type: ScaleType,
    /// Arrangement of the cache.
    pub layout: LayoutKind,
    /// Slots of a page.
    pub page_len: u32,
    /// Heads of the cache.
    pub num_kv_heads: u32,
    /// Query heads a kv head.
    pub gqa_group: u32,
    /// New tokens a request.
    pub q_len: u32,
    /// Tokens of each request.
    pub kv_lens: Vec<u32>,
    /// softmax_scale times the square root of head_dim.
    pub scale_factor: f32,
    /// Sliding window.
    pub window: Option<u32>,
    /// Logit soft-cap.
    pub soft_cap: Option<f32>,
    /// ALiBi slopes from the seed.
    pub alibi: bool,
    /// Sinks from the seed.
    pub sinks: bool,
    /// Type of k and v.
    pub in_type: FloatType,
    /// Type of q.
    pub q_type: FloatType,
    /// Type of the output.
    pub out_type: FloatType,
    /// Whether lse is asked for.
    pub want_lse: bool,
    /// How the batch is cut.
    pub config: SplitConfig,
    /// Page table.
    pub rows: Rows,
    /// Requests that share their leading pages with request 0.
    pub shares_prefix: bool,
    /// Numbers.
    pub data: Data,
    /// Of every random choice that is left.
    pub seed: u64,
}

impl Case {
    /// One request of `kv_len` tokens, one head of 64 channels, no mask, f32 in and out: the base of directed cases.
    pub fn plain(tile_len: u32, kv_len: u32) -> Self {
        Self {
            head_dim: 64,
            k_group_len: 32,
            v_group_len: 32,
            scale_type: ScaleType::F16,
            layout: LayoutKind::Hnd,
            page_len: 16,
            num_kv_heads: 1,
            gqa_group: 1,
            q_len: 1,
            kv_lens: vec![kv_len],
            scale_factor: 1.0,
            window: None,
            soft_cap: None,
            alibi: false,
            sinks: false,
            in_type: FloatType::F32,
            q_type: FloatType::F32,
            out_type: FloatType::F32,
            want_lse: true,
            config: SplitConfig { tile_len, ..SplitConfig::throughput(4) },
            rows: Rows::Padded,
            shares_prefix: false,
            data: Data::Normal(1.0),
            seed: 0,
        }
    }

    /// As [`Self::plain`], 64 channels in groups of 16: the cheapest case that every backend offers.
    pub fn small(tile_len: u32, kv_len: u32) -> Self {
        Self { head_dim: 64, k_group_len: 16, v_group_len: 16, ..Self::plain(tile_len, kv_len) }
    }

    /// The same with other data.
    pub fn with_data(self, data: Data) -> Self {
        Self { data, ..self }
    }

    /// The same under the batch-invariant policy, `tiles` a split.
    pub fn batch_invariant(mut self, tiles: u32) -> Self {
        let split_len = tiles * self.config.tile_len;
        self.config.policy = SplitPolicy::BatchInvariant { split_len };
        self.config.num_shares = 0;
        self
    }

    /// The same with each request in this many equal shares.
    pub fn shared_out(mut self, num_shares: u32) -> Self {
        self.config.policy = SplitPolicy::Throughput;
        self.config.num_shares = num_shares;
        self
    }

    /// Query heads.
    pub fn num_q_heads(&self) -> u32 {
        self.num_kv_heads * self.gqa_group
    }

    /// Multiplications of the oracle: what a case costs.
    pub fn cost(&self) -> u64 {
        let tokens: u64 = self.kv_lens.iter().map(|&n| u64::from(n) + 1).sum();
        tokens * u64::from(self.num_q_heads() * self.q_len * self.head_dim)
    }

    /// The format.
    pub fn format(&self) -> CacheFormat {
        let Self { num_kv_heads, head_dim, k_group_len, v_group_len, scale_type, .. } = *self;
        CacheFormat::new(num_kv_heads, head_dim, k_group_len, v_group_len, scale_type)
            .expect("cases have valid formats")
    }

    /// The layout of a cache of `num_pages`.
    pub fn layout_of(&self, num_pages: u64) -> CacheLayout {
        let (format, page_len) = (self.format(), self.page_len);
        match self.layout {
            LayoutKind::LightLlm => CacheLayout::lightllm(format, num_pages * u64::from(page_len)),
            LayoutKind::Hnd => CacheLayout::hnd(format, num_pages, page_len),
            LayoutKind::Nhd => CacheLayout::nhd(format, num_pages, page_len),
            LayoutKind::Native => CacheLayout::native(format, num_pages, page_len),
            LayoutKind::Custom => custom(format, num_pages, page_len),
        }
        .expect("cases have valid layouts")
    }

    /// The spec without per-head arrays.
    pub fn bare_spec(&self) -> DecodeSpec {
        let mut spec = DecodeSpec::new(self.num_q_heads(), self.num_kv_heads, self.head_dim);
        spec.q_len = self.q_len;
        spec.softmax_scale *= self.scale_factor;
        spec.window = self.window;
        spec.soft_cap = self.soft_cap;
        spec.q_type = self.q_type;
        spec.out_type = self.out_type;
        spec.want_lse = self.want_lse;
        spec
    }
}

/// Strides that no named layout has: slots outermost, V before K in one buffer, gaps after every row, odd offsets.
fn custom(format: CacheFormat, num_pages: u64, page_len: u32) -> Result<CacheLayout, kv_quant::Error> {
    let heads = u64::from(format.num_kv_heads());
    let plane = |buffer_idx, row: u64, gap: u64, offset: u64| {
        let head_stride = row + gap;
        let page_stride = head_stride * heads + 16;
        Plane { buffer_idx, offset, page_stride, slot_stride: page_stride * num_pages + 32, head_stride }
    };
    let dim = u64::from(format.head_dim()).next_multiple_of(16);
    let span = plane(0, dim, 16, 0).slot_stride * u64::from(page_len);
    let groups = |side| u64::from(format.num_groups(side));
    CacheLayout::custom(
        format,
        num_pages,
        page_len,
        [
            plane(0, dim, 16, span + 48),
            plane(0, dim, 16, 16),
            plane(1, groups(Side::K), 8, 8),
            plane(2, groups(Side::V), 24, 16),
        ],
    )
}
