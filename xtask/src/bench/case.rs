//! One case: cache layout, request, schedule policy.

use anyhow::Result;
use attn_plan::{DecodeSpec, SplitPolicy};
use kv_quant::{CacheFormat, CacheLayout, FloatType, LayoutKind, ScaleType};

/// What is measured.
#[derive(Clone, Debug)]
pub struct Case {
    pub layout: LayoutKind,
    pub page_len: u32,
    pub group_len: u32,
    pub scale_type: ScaleType,
    pub spec: DecodeSpec,
    pub kv_lens: Vec<u32>,
    pub policy: SplitPolicy,
    /// What is special about it, for its name.
    pub note: &'static str,
    /// An append of this many tokens instead of a decode.
    pub append_tokens: Option<u32>,
    /// Whether the output is compared with the oracle.
    pub is_checked: bool,
}

impl Case {
    /// A uniform batch over a paged or single-slot cache: bf16 in and out, f16 scales, groups of 8.
    pub fn new(heads: (u32, u32, u32), batch: usize, kv_len: u32, layout: LayoutKind, page_len: u32) -> Self {
        let (num_q_heads, num_kv_heads, head_dim) = heads;
        let spec = DecodeSpec {
            q_type: FloatType::Bf16,
            out_type: FloatType::Bf16,
            ..DecodeSpec::new(num_q_heads, num_kv_heads, head_dim)
        };
        Self {
            layout,
            page_len,
            group_len: 8,
            scale_type: ScaleType::F16,
            spec,
            kv_lens: vec![kv_len; batch],
            policy: SplitPolicy::Throughput,
            note: "",
            append_tokens: None,
            is_checked: false,
        }
    }

    /// Whether the peers' figures are of the same problem.
    pub fn is_plain(&self) -> bool {
        let spec = &self.spec;
        let has_mask = spec.window.is_some() || spec.soft_cap.is_some() || spec.sinks.is_some();
        self.note.is_empty() && self.append_tokens.is_none() && spec.q_len == 1 && !has_mask
    }

    /// The layout of a cache of this many pages.
    pub fn layout_of(&self, num_pages: u64) -> Result<CacheLayout> {
        let spec = &self.spec;
        let format = CacheFormat::new(
            spec.num_kv_heads,
            spec.head_dim,
            self.group_len,
            self.group_len,
            self.scale_type,
        )?;
        Ok(match self.layout {
            LayoutKind::LightLlm => CacheLayout::lightllm(format, num_pages * u64::from(self.page_len))?,
            LayoutKind::Hnd => CacheLayout::hnd(format, num_pages, self.page_len)?,
            LayoutKind::Nhd => CacheLayout::nhd(format, num_pages, self.page_len)?,
            _ => CacheLayout::native(format, num_pages, self.page_len)?,
        })
    }

    /// Pages of each request.
    pub fn pages_of(&self, kv_len: u32) -> u64 {
        u64::from(kv_len.div_ceil(self.page_len))
    }

    /// A readable name that tells the case from all others.
    pub fn name(&self) -> String {
        let spec = &self.spec;
        let longest = self.kv_lens.iter().copied().max().unwrap_or(0);
        let size = match self.append_tokens {
            Some(tokens) => format!("append {tokens} tokens"),
            None => format!("{} x {longest}", self.kv_lens.len()),
        };
        let mut name = format!(
            "{size} {}/{} d{} {} p{} g{} {}",
            spec.num_q_heads,
            spec.num_kv_heads,
            spec.head_dim,
            self.layout,
            self.page_len,
            self.group_len,
            self.scale_type
        );
        if spec.q_len > 1 {
            name += &format!(" q_len{}", spec.q_len);
        }
        if !self.note.is_empty() {
            name += &format!(" {}", self.note);
        }
        name
    }
}
