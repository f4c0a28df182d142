//! A pool with host memory behind it: appends quantize, shared pages are copied before they are written.

use crate::append::{check_data, write_rows};
use crate::{
    AppendSlots, CacheBuffers, CacheLayout, CacheView, FloatSlice, PagePool, PoolError, SequenceId, Side,
};

/// A [`PagePool`] and the host buffers of one cache.
///
/// ```
/// use kv_quant::{CacheFormat, CacheLayout, CachePool, FloatSlice, ScaleType, Side};
/// let format = CacheFormat::new(1, 64, 32, 32, ScaleType::F16)?;
/// let mut pool = CachePool::new(CacheLayout::native(format, 4, 16)?)?;
/// let parent = pool.allocate();
/// let rows = vec![0.5f32; 3 * 64];                          // [3 tokens, 1 head, 64 channels]
/// pool.append(parent, FloatSlice::F32(&rows), FloatSlice::F32(&rows))?;
/// let child = pool.fork(parent, 2)?;                        // shares the page
/// let other = vec![-1f32; 64];
/// pool.append(child, FloatSlice::F32(&other), FloatSlice::F32(&other))?;
/// assert_eq!((pool.len(parent)?, pool.len(child)?), (3, 3));
/// let mut row = vec![0f32; 64];
/// pool.dequantize_row(child, Side::V, 2, 0, &mut row)?;
/// assert!((row[0] + 1.0).abs() < 1e-3);
/// pool.dequantize_row(parent, Side::V, 2, 0, &mut row)?;    // the parent's third token is untouched
/// assert!((row[0] - 0.5).abs() < 1e-3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CachePool {
    layout: CacheLayout,
    pages: PagePool,
    buffers: CacheBuffers,
    /// Reused from append to append.
    append: AppendSlots,
}

impl CachePool {
    /// Zeroed buffers for the whole layout, all pages free.
    ///
    /// # Errors
    /// [`crate::Error::TooLarge`] if the machine has not that much memory.
    pub fn new(layout: CacheLayout) -> Result<Self, PoolError> {
        let buffers = CacheBuffers::zeroed(&layout)?;
        let pages = PagePool::for_layout(&layout);
        Ok(Self { layout, pages, buffers, append: AppendSlots::default() })
    }

    /// A new, empty sequence.
    pub fn allocate(&mut self) -> SequenceId {
        self.pages.allocate()
    }

    /// A new sequence of the first `prefix_len` tokens of another; as [`PagePool::fork`].
    pub fn fork(&mut self, parent: SequenceId, prefix_len: u32) -> Result<SequenceId, PoolError> {
        self.pages.fork(parent, prefix_len)
    }

    /// Keeps the first `new_len` tokens; as [`PagePool::truncate`].
    pub fn truncate(&mut self, sequence: SequenceId, new_len: u32) -> Result<(), PoolError> {
        self.pages.truncate(sequence, new_len)
    }

    /// Gives up a sequence; as [`PagePool::free`].
    pub fn free(&mut self, sequence: SequenceId) -> Result<(), PoolError> {
        self.pages.free(sequence)
    }

    /// Tokens of a sequence.
    pub fn len(&self, sequence: SequenceId) -> Result<u32, PoolError> {
        self.pages.len(sequence)
    }

    /// Quantizes `k` and `v`, `[num_tokens, num_kv_heads, head_dim]`, onto the end of one sequence.
    ///
    /// # Errors
    /// As [`Self::append_batch`]. [`crate::Error::Len`] if the rows are no whole number of tokens.
    pub fn append(
        &mut self,
        sequence: SequenceId,
        k: FloatSlice<'_>,
        v: FloatSlice<'_>,
    ) -> Result<(), PoolError> {
        let row = self.layout.format().row_elements();
        let num_tokens = u32::try_from(k.len() / row).unwrap_or(u32::MAX);
        self.append_batch(&[(sequence, num_tokens)], k, v)?;
        Ok(())
    }

    /// Quantizes `k` and `v` onto the ends of several sequences: first the rows of `batch[0]`, then those of
    /// `batch[1]`, and so on; `(sequence, num_tokens)` each. Returns the slots, one a row.
    ///
    /// # Errors
    /// Those of [`PagePool::append_batch`], and as [`PoolError::Cache`] those of [`crate::append()`]. On any error
    /// neither the books nor a byte of the cache change.
    pub fn append_batch(
        &mut self,
        batch: &[(SequenceId, u32)],
        k: FloatSlice<'_>,
        v: FloatSlice<'_>,
    ) -> Result<&[i64], PoolError> {
        // The lengths first: they say how many tokens the batch may have at all.
        let tokens = batch.iter().fold(0usize, |sum, &(_, n)| sum.saturating_add(n as usize));
        crate::append::check_lens(&self.layout, k, v, tokens)?;
        self.pages.append_batch(batch, &mut self.append)?;
        if let Err(error) = check_data(&self.layout, k, v, self.append.slots()) {
            self.pages.undo_append(&mut self.append)?;
            return Err(error.into());
        }
        for copy in self.append.copies() {
            self.buffers.copy_page(&self.layout, copy.src, copy.dst)?;
        }
        write_rows(&self.layout, &mut self.buffers.view_mut(), k, v, self.append.slots())?;
        Ok(self.append.slots())
    }

    /// One row of one token, dequantized into `out` (`head_dim` values).
    ///
    /// # Errors
    /// [`PoolError::UnknownSequence`]; [`PoolError::BeyondLen`] past the end; [`crate::Error::HeadOutOfRange`].
    pub fn dequantize_row(
        &self,
        sequence: SequenceId,
        side: Side,
        token: u32,
        head: u32,
        out: &mut [f32],
    ) -> Result<(), PoolError> {
        let len = self.pages.len(sequence)?;
        let beyond = PoolError::BeyondLen { sequence, len, asked: token.saturating_add(1) };
        let slot = self.pages.slot(sequence, token)?.ok_or(beyond)?;
        crate::dequantize_row(&self.layout, &self.buffers.view(), side, slot, head, out)?;
        Ok(())
    }

    /// Format, size and strides.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// The books: rows of the page table, free pages, bytes used.
    pub fn pages(&self) -> &PagePool {
        &self.pages
    }

    /// The cache, for reading.
    pub fn view(&self) -> CacheView<'_> {
        self.buffers.view()
    }

    /// The buffers, e.g. to load a cache or to poison dead slots.
    pub fn buffers_mut(&mut self) -> &mut CacheBuffers {
        &mut self.buffers
    }
}
