//! A cache in device memory, filled with a pattern over and over.

use crate::bench::case::Case;
use crate::bench::inputs::{Pattern, PoolKey};
use anyhow::{Context, Result, ensure};
use attn_kernels::device::{CudaDevice, DeviceBuffer, DeviceView, Stream, StreamKernels};
use kv_quant::CacheLayout;
use std::sync::Arc;

/// Buffers of a pool begin at multiples of this in its arena.
const BUFFER_ALIGNMENT: u64 = 1 << 21;

/// One stretch of device memory that holds the cache of one case after the other: what it was last filled for, it serves
/// without being filled again.
pub struct Pool {
    arena: DeviceBuffer,
    filled: Option<Filled>,
}

/// What a pool holds.
pub struct Filled {
    pub layout: CacheLayout,
    pub views: Vec<DeviceView>,
    pub pattern: Arc<Pattern>,
}

impl Filled {
    fn key(&self) -> &PoolKey {
        &self.pattern.key
    }
}

impl Pool {
    /// A pool with room for caches of up to this many bytes.
    pub fn with_room(device: &CudaDevice, bytes: u64) -> Result<Self> {
        Ok(Self { arena: device.alloc(usize::try_from(bytes)?)?, filled: None })
    }

    /// The cache for a case, of at least `num_pages` pages; `pool` is kept as it is if it serves.
    pub fn ensure<'a>(
        pool: &'a mut Option<Pool>,
        case: &Case,
        pattern: &Arc<Pattern>,
        num_pages: u64,
        device: &CudaDevice,
        streams: &StreamKernels,
        stream: &Stream,
    ) -> Result<&'a Filled> {
        let serves = |filled: &Filled| *filled.key() == pattern.key && filled.layout.num_pages() >= num_pages;
        if !pool.as_ref().and_then(|pool| pool.filled.as_ref()).is_some_and(serves) {
            let layout = case.layout_of(num_pages.next_multiple_of(pattern.layout.num_pages()))?;
            let bytes = Self::room_for(&layout);
            if pool.as_ref().is_none_or(|pool| (pool.arena.len_bytes() as u64) < bytes) {
                // The old one's memory first: two large pools may not fit side by side.
                *pool = None;
                *pool = Some(Self::with_room(device, bytes)?);
            }
            if let Some(pool) = pool {
                pool.filled = None;
                pool.filled = Some(pool.fill(layout, pattern, streams, stream)?);
            }
        }
        pool.as_ref().and_then(|pool| pool.filled.as_ref()).context("no pool")
    }

    /// Bytes of an arena for a cache of this layout.
    pub fn room_for(layout: &CacheLayout) -> u64 {
        layout.buffer_bytes().iter().map(|bytes| bytes.next_multiple_of(BUFFER_ALIGNMENT)).sum()
    }

    fn fill(
        &self,
        layout: CacheLayout,
        pattern: &Arc<Pattern>,
        streams: &StreamKernels,
        stream: &Stream,
    ) -> Result<Filled> {
        let mut views = Vec::new();
        let mut start = 0;
        for (buffer_idx, &bytes) in layout.buffer_bytes().iter().enumerate() {
            let pattern_bytes = pattern.cache.view().buffer(buffer_idx);
            let mut filled = pattern_bytes.len() as u64;
            ensure!(filled > 0 && bytes.is_multiple_of(filled), "a pool is whole patterns");
            let view = self.arena.view().slice(start, bytes).context("the arena has room")?;
            self.arena.write(usize::try_from(start)?, pattern_bytes)?;
            while filled < bytes {
                let len = filled.min(bytes - filled);
                let (src, dst) = (view.slice(0, len), view.slice(filled, len));
                if let (Some(src), Some(dst)) = (src, dst) {
                    streams.copy(src, dst, stream)?;
                }
                filled += len;
            }
            views.push(view);
            start += bytes.next_multiple_of(BUFFER_ALIGNMENT);
        }
        stream.synchronize()?;
        Ok(Filled { layout, views, pattern: Arc::clone(pattern) })
    }
}
