//! What the cases read: pools of real quantized data, shuffled page tables, ragged lengths.

use super::case::Case;
use anyhow::{Result, ensure};
use attn_kernels::device::{CudaDevice, DeviceBuffer, DeviceView, Stream, StreamKernels};
use cpu_reference::case::{Floats, Rng};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatType, LayoutKind};

/// The stream that replicates the pattern copies whole multiples of this many bytes.
const COPY_UNIT: u64 = 65_536;
/// Fewest distinct tokens of a pattern.
const PATTERN_TOKENS: u64 = 4096;

/// A cache in device memory, filled with Gaussian rows: `pattern_pages` distinct pages, over and over.
pub struct Pool {
    key: (LayoutKind, u32, CacheFormat),
    pub layout: CacheLayout,
    buffers: Vec<DeviceBuffer>,
    pub pattern: CacheBuffers,
    pub pattern_layout: CacheLayout,
}

impl Pool {
    /// The pool for a case, of at least `num_pages` pages; `pool` is kept if it serves.
    pub fn ensure<'a>(
        pool: &'a mut Option<Pool>,
        case: &Case,
        num_pages: u64,
        device: &CudaDevice,
        streams: &StreamKernels,
        stream: &Stream,
    ) -> Result<&'a Pool> {
        let key = (case.layout, case.page_len, *case.layout_of(1)?.format());
        let serves = |pool: &Pool| pool.key == key && pool.layout.num_pages() >= num_pages;
        if !pool.as_ref().is_some_and(serves) {
            // The old one's memory first: two large pools may not fit side by side.
            *pool = None;
            *pool = Some(Self::fill(case, key, num_pages, device, streams, stream)?);
        }
        pool.as_ref().ok_or_else(|| anyhow::anyhow!("no pool"))
    }

    fn fill(
        case: &Case,
        key: (LayoutKind, u32, CacheFormat),
        num_pages: u64,
        device: &CudaDevice,
        streams: &StreamKernels,
        stream: &Stream,
    ) -> Result<Self> {
        let one_page = case.layout_of(1)?;
        let mut pattern_pages = (PATTERN_TOKENS / u64::from(case.page_len)).max(1);
        while one_page.buffer_bytes().iter().any(|bytes| !(bytes * pattern_pages).is_multiple_of(COPY_UNIT)) {
            pattern_pages *= 2;
        }
        let num_pages = num_pages.next_multiple_of(pattern_pages);
        let pattern_layout = case.layout_of(pattern_pages)?;
        let layout = case.layout_of(num_pages)?;
        let pattern = gaussian_cache(&pattern_layout)?;
        let mut buffers = Vec::new();
        for (buffer_idx, bytes) in layout.buffer_bytes().iter().enumerate() {
            let buffer = device.alloc(usize::try_from(*bytes)?)?;
            buffer.write(0, pattern.view().buffer(buffer_idx))?;
            let view = buffer.view();
            let mut filled = pattern_layout.buffer_bytes().get(buffer_idx).copied().unwrap_or(0);
            ensure!(filled > 0 && bytes.is_multiple_of(filled), "a pool is whole patterns");
            while filled < *bytes {
                let len = filled.min(bytes - filled);
                let (src, dst) = (view.slice(0, len), view.slice(filled, len));
                if let (Some(src), Some(dst)) = (src, dst) {
                    streams.copy(src, dst, stream)?;
                }
                filled += len;
            }
            buffers.push(buffer);
        }
        stream.synchronize()?;
        Ok(Self { key, layout, buffers, pattern, pattern_layout })
    }

    pub fn views(&self) -> Vec<DeviceView> {
        self.buffers.iter().map(DeviceBuffer::view).collect()
    }
}

/// A host cache of Gaussian rows, every slot written through the append that users call.
fn gaussian_cache(layout: &CacheLayout) -> Result<CacheBuffers> {
    let mut rng = Rng::new(1);
    let row = layout.format().num_kv_heads() as usize * layout.format().head_dim() as usize;
    let tokens = usize::try_from(layout.num_slots())?;
    // Rows are windows at random places of one long random block: no two alike, and made in a moment.
    let block: Vec<f32> = (0..1 << 20).map(|_| rng.gaussian()).collect();
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

/// Page tables of `rotations` steps over disjoint, shuffled pages, and where each request's row starts.
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
