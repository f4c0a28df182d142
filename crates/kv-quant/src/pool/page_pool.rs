//! The books of a pool: which pages are free, which sequence has which pages, how many share each page.

use super::sequence::Sequence;
use crate::{CacheLayout, PoolError, SequenceId};
use std::sync::atomic::{AtomicU64, Ordering};

/// 0 is no pool's, so that a fresh [`crate::AppendSlots`] belongs to none.
static NEXT_POOL_ID: AtomicU64 = AtomicU64::new(1);

/// Bookkeeping of pages and sequences. It touches no cache memory: the caller does the copies it is told to do.
///
/// A page is written only while one sequence has it. Forking shares pages; the first to write into a shared page gets
/// a copy of its own. One pool serves all layers of a model whose caches have the same number of pages.
///
/// ```
/// use kv_quant::{AppendSlots, PagePool, PageCopy};
/// let mut pool = PagePool::new(8, 4, 1024);            // 8 pages of 4 slots, 1024 bytes each
/// let mut append = AppendSlots::default();
/// let parent = pool.allocate();
/// pool.append(parent, 6, &mut append)?;
/// assert_eq!(append.slots(), [0, 1, 2, 3, 4, 5]);
/// let child = pool.fork(parent, 5)?;                   // shares pages 0 and 1
/// pool.append(child, 1, &mut append)?;                 // page 1 is copied before slot 1 of it is written
/// assert_eq!(append.copies(), [PageCopy { src: 1, dst: 2 }]);
/// assert_eq!(append.slots(), [9]);
/// assert_eq!(pool.page_row(parent)?, [0, 1]);
/// assert_eq!(pool.page_row(child)?, [0, 2]);
/// # Ok::<(), kv_quant::PoolError>(())
/// ```
#[derive(Debug)]
pub struct PagePool {
    /// Tells handles and appends of this pool from those of others.
    pub(super) pool_id: u64,
    pub(super) page_len: u32,
    bytes_per_page: u64,
    /// Sequences that have each page.
    pub(super) ref_counts: Vec<u32>,
    /// A stack; the page freed last is reused first.
    pub(super) free_pages: Vec<i32>,
    pub(super) sequences: Vec<Sequence>,
    free_sequences: Vec<usize>,
    /// Counts changes.
    pub(super) version: u64,
}

impl PagePool {
    /// All pages free. `num_pages` is at most 2^31 - 1 (page tables hold `i32`) and is cut to that; `page_len` is at
    /// least 1.
    pub fn new(num_pages: u32, page_len: u32, bytes_per_page: u64) -> Self {
        let num_pages = num_pages.min(i32::MAX as u32);
        Self {
            pool_id: NEXT_POOL_ID.fetch_add(1, Ordering::Relaxed),
            page_len: page_len.max(1),
            bytes_per_page,
            ref_counts: vec![0; num_pages as usize],
            free_pages: (0..num_pages as i32).rev().collect(),
            sequences: Vec::new(),
            free_sequences: Vec::new(),
            version: 0,
        }
    }

    /// A pool over all pages of a layout.
    pub fn for_layout(layout: &CacheLayout) -> Self {
        // A layout has at most i32::MAX pages.
        Self::new(layout.num_pages() as u32, layout.page_len(), layout.bytes_per_page())
    }

    /// A new, empty sequence. It takes no page until tokens come.
    pub fn allocate(&mut self) -> SequenceId {
        self.version += 1;
        let idx = self.free_sequences.pop().unwrap_or(self.sequences.len());
        if idx == self.sequences.len() {
            self.sequences.push(Sequence::default());
        }
        let mut generation = 0;
        if let Some(sequence) = self.sequences.get_mut(idx) {
            sequence.is_live = true;
            generation = sequence.generation;
        }
        SequenceId { pool_id: self.pool_id, idx, generation }
    }

    /// A new sequence of the first `prefix_len` tokens of another. No page is copied yet.
    ///
    /// # Errors
    /// [`PoolError::UnknownSequence`]; [`PoolError::BeyondLen`] if `parent` is shorter than `prefix_len`.
    pub fn fork(&mut self, parent: SequenceId, prefix_len: u32) -> Result<SequenceId, PoolError> {
        let len = self.len(parent)?;
        if prefix_len > len {
            return Err(PoolError::BeyondLen { sequence: parent, len, asked: prefix_len });
        }
        let child = self.allocate();
        let num_pages = self.pages_of(prefix_len);
        // The child's list leaves the table while the parent's is read.
        let mut pages = self.take_pages(child);
        pages.extend_from_slice(self.page_row(parent)?.get(..num_pages).unwrap_or_default());
        for &page in &pages {
            self.add_reference(page);
        }
        if let Some(sequence) = self.sequences.get_mut(child.idx) {
            sequence.len = prefix_len;
            sequence.pages = pages;
        }
        Ok(child)
    }

    /// Keeps the first `new_len` tokens of a sequence and gives up the pages behind them.
    ///
    /// # Errors
    /// [`PoolError::UnknownSequence`]; [`PoolError::BeyondLen`] if the sequence is shorter.
    pub fn truncate(&mut self, sequence: SequenceId, new_len: u32) -> Result<(), PoolError> {
        let len = self.len(sequence)?;
        if new_len > len {
            return Err(PoolError::BeyondLen { sequence, len, asked: new_len });
        }
        self.version += 1;
        let keep = self.pages_of(new_len);
        let mut pages = self.take_pages(sequence);
        for page in pages.drain(keep..).rev() {
            self.drop_reference(page);
        }
        if let Some(state) = self.sequences.get_mut(sequence.idx) {
            state.len = new_len;
            state.pages = pages;
        }
        Ok(())
    }

    /// Gives up a sequence. Its handle names nothing from now on.
    ///
    /// # Errors
    /// [`PoolError::UnknownSequence`].
    pub fn free(&mut self, sequence: SequenceId) -> Result<(), PoolError> {
        self.truncate(sequence, 0)?;
        if let Some(state) = self.sequences.get_mut(sequence.idx) {
            state.is_live = false;
            state.generation += 1;
        }
        self.free_sequences.push(sequence.idx);
        Ok(())
    }

    /// Tokens of a sequence.
    pub fn len(&self, sequence: SequenceId) -> Result<u32, PoolError> {
        Ok(self.state(sequence)?.len)
    }

    /// Page indices of a sequence, `ceil(len / page_len)` of them: its row of the page table.
    pub fn page_row(&self, sequence: SequenceId) -> Result<&[i32], PoolError> {
        Ok(&self.state(sequence)?.pages)
    }

    /// Slot of one token; `None` past the sequence's end.
    pub fn slot(&self, sequence: SequenceId, token: u32) -> Result<Option<u64>, PoolError> {
        let state = self.state(sequence)?;
        let page = state.pages.get((token / self.page_len) as usize).filter(|_| token < state.len);
        Ok(page.map(|&page| page as u64 * u64::from(self.page_len) + u64::from(token % self.page_len)))
    }

    /// Rows of several sequences end to end, and where each starts: a ragged page table. Both are overwritten.
    pub fn fill_page_table(
        &self,
        sequences: &[SequenceId],
        pages: &mut Vec<i32>,
        row_starts: &mut Vec<u64>,
    ) -> Result<(), PoolError> {
        pages.clear();
        row_starts.clear();
        for &sequence in sequences {
            row_starts.push(pages.len() as u64);
            pages.extend_from_slice(self.page_row(sequence)?);
        }
        Ok(())
    }

    /// Lengths of several sequences in tokens. `lens` is overwritten.
    pub fn fill_lens(&self, sequences: &[SequenceId], lens: &mut Vec<u32>) -> Result<(), PoolError> {
        lens.clear();
        for &sequence in sequences {
            lens.push(self.len(sequence)?);
        }
        Ok(())
    }

    /// Free pages that appending `num_tokens` would take, the copy of a shared page counted.
    pub fn pages_needed(&self, sequence: SequenceId, num_tokens: u32) -> Result<u64, PoolError> {
        let state = self.state(sequence)?;
        let len = state.len.checked_add(num_tokens).ok_or(PoolError::TooLong {
            sequence,
            len: state.len,
            num_tokens,
        })?;
        let copies = self.shared_last_page(state, num_tokens).is_some();
        Ok((self.pages_of(len) - state.pages.len()) as u64 + u64::from(copies))
    }

    /// How many sequences have a page: 0 is free, 2 or more is shared. `None` past the last page.
    pub fn ref_count(&self, page: u64) -> Option<u32> {
        self.ref_counts.get(usize::try_from(page).ok()?).copied()
    }

    /// Slots of a page.
    pub fn page_len(&self) -> u32 {
        self.page_len
    }

    /// Pages in all.
    pub fn num_pages(&self) -> u64 {
        self.ref_counts.len() as u64
    }

    /// Pages that no sequence has.
    pub fn num_free_pages(&self) -> u64 {
        self.free_pages.len() as u64
    }

    /// Live sequences.
    pub fn num_sequences(&self) -> usize {
        self.sequences.len() - self.free_sequences.len()
    }

    /// Bytes of the pages in use; a shared page counts once.
    pub fn bytes_used(&self) -> u64 {
        (self.num_pages() - self.num_free_pages()).saturating_mul(self.bytes_per_page)
    }

    /// Tokens that new sequences could take in whole pages before the pool is full.
    pub fn free_tokens(&self) -> u64 {
        self.num_free_pages().saturating_mul(u64::from(self.page_len))
    }

    pub(super) fn state(&self, id: SequenceId) -> Result<&Sequence, PoolError> {
        self.sequences
            .get(id.idx)
            .filter(|state| id.pool_id == self.pool_id && state.is_live && state.generation == id.generation)
            .ok_or(PoolError::UnknownSequence(id))
    }

    pub(super) fn pages_of(&self, len: u32) -> usize {
        len.div_ceil(self.page_len) as usize
    }

    pub(super) fn take_pages(&mut self, id: SequenceId) -> Vec<i32> {
        self.sequences.get_mut(id.idx).map(|state| std::mem::take(&mut state.pages)).unwrap_or_default()
    }

    /// The last page, if the next token goes into it and another sequence has it too.
    pub(super) fn shared_last_page(&self, state: &Sequence, num_tokens: u32) -> Option<i32> {
        let page = *state.pages.last()?;
        let writes_into_it = num_tokens > 0 && !state.len.is_multiple_of(self.page_len);
        (writes_into_it && self.ref_count(page as u64)? > 1).then_some(page)
    }

    pub(super) fn add_reference(&mut self, page: i32) {
        if let Some(count) = self.ref_counts.get_mut(page as usize) {
            *count += 1;
        }
    }

    pub(super) fn drop_reference(&mut self, page: i32) {
        if let Some(count) = self.ref_counts.get_mut(page as usize) {
            *count -= 1;
            if *count == 0 {
                self.free_pages.push(page);
            }
        }
    }

    /// A free page, now with one reference.
    pub(super) fn take_free_page(&mut self) -> Option<i32> {
        let page = self.free_pages.pop()?;
        self.add_reference(page);
        Some(page)
    }
}
