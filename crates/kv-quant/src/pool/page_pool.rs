//! The books of a pool: which pages are free, which sequence has which pages, how many share each page.

use super::append_slots::Undo;
use super::sequence::Sequence;
use crate::{AppendSlots, CacheLayout, PageCopy, PoolError, SequenceId};
use std::sync::atomic::{AtomicU64, Ordering};

/// 0 is no pool's, so that a fresh [`AppendSlots`] belongs to none.
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
    pool_id: u64,
    page_len: u32,
    bytes_per_page: u64,
    /// Sequences that have each page.
    ref_counts: Vec<u32>,
    /// A stack; the page freed last is reused first.
    free_pages: Vec<i32>,
    sequences: Vec<Sequence>,
    free_sequences: Vec<usize>,
    /// Counts changes.
    version: u64,
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

    /// Appends `num_tokens` to one sequence; see [`Self::append_batch`].
    pub fn append(
        &mut self,
        sequence: SequenceId,
        num_tokens: u32,
        out: &mut AppendSlots,
    ) -> Result<(), PoolError> {
        self.append_batch(&[(sequence, num_tokens)], out)
    }

    /// Appends tokens to several sequences, all or none: `out` says which pages to copy and where each token goes.
    ///
    /// `out` is overwritten. Memory grows only with pages and with the largest batch.
    ///
    /// # Errors
    /// [`PoolError::UnknownSequence`], [`PoolError::SequenceTwice`], [`PoolError::TooLong`], or
    /// [`PoolError::OutOfPages`] with the need of the whole batch. The pool is unchanged.
    pub fn append_batch(
        &mut self,
        batch: &[(SequenceId, u32)],
        out: &mut AppendSlots,
    ) -> Result<(), PoolError> {
        out.slots.clear();
        out.copies.clear();
        out.undo.clear();
        self.version += 1;
        let free = self.free_pages.len() as u64;
        let mut needed = 0u64;
        let mut failure = None;
        for &(id, num_tokens) in batch {
            match self.extend(id, num_tokens, out) {
                Ok(pages) => needed += pages,
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        if failure.is_none() && needed > free {
            failure = Some(PoolError::OutOfPages { needed, free });
        }
        if let Some(error) = failure {
            self.take_back(out);
            return Err(error);
        }
        out.pool_id = self.pool_id;
        out.version = self.version;
        Ok(())
    }

    /// Takes back the pool's last change, which was the append that filled `append`: for a device that refused the
    /// rows after the books were written. Copies that were done meanwhile do no harm.
    ///
    /// # Errors
    /// [`PoolError::StaleAppend`] if the pool has changed since that append.
    pub fn undo_append(&mut self, append: &mut AppendSlots) -> Result<(), PoolError> {
        if append.pool_id != self.pool_id || append.version != self.version {
            return Err(PoolError::StaleAppend);
        }
        self.version += 1;
        self.take_back(append);
        Ok(())
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

    fn state(&self, id: SequenceId) -> Result<&Sequence, PoolError> {
        self.sequences
            .get(id.idx)
            .filter(|state| id.pool_id == self.pool_id && state.is_live && state.generation == id.generation)
            .ok_or(PoolError::UnknownSequence(id))
    }

    fn pages_of(&self, len: u32) -> usize {
        len.div_ceil(self.page_len) as usize
    }

    fn take_pages(&mut self, id: SequenceId) -> Vec<i32> {
        self.sequences.get_mut(id.idx).map(|state| std::mem::take(&mut state.pages)).unwrap_or_default()
    }

    /// The last page, if the next token goes into it and another sequence has it too.
    fn shared_last_page(&self, state: &Sequence, num_tokens: u32) -> Option<i32> {
        let page = *state.pages.last()?;
        let writes_into_it = num_tokens > 0 && !state.len.is_multiple_of(self.page_len);
        (writes_into_it && self.ref_count(page as u64)? > 1).then_some(page)
    }

    fn add_reference(&mut self, page: i32) {
        if let Some(count) = self.ref_counts.get_mut(page as usize) {
            *count += 1;
        }
    }

    fn drop_reference(&mut self, page: i32) {
        if let Some(count) = self.ref_counts.get_mut(page as usize) {
            *count -= 1;
            if *count == 0 {
                self.free_pages.push(page);
            }
        }
    }

    /// A free page, now with one reference.
    fn take_free_page(&mut self) -> Option<i32> {
        let page = self.free_pages.pop()?;
        self.add_reference(page);
        Some(page)
    }

    /// One sequence's part of an append. Returns the pages it needs. If pages have run out, it only drops the
    /// reference to a page that would have been copied, so that the rest of the batch is counted as if it had been.
    fn extend(&mut self, id: SequenceId, num_tokens: u32, out: &mut AppendSlots) -> Result<u64, PoolError> {
        let state = self.state(id)?;
        let (len, num_pages) = (state.len, state.pages.len());
        if state.batch_stamp == self.version {
            return Err(PoolError::SequenceTwice(id));
        }
        let pages = self.pages_needed(id, num_tokens)?;
        let shared_page = self.shared_last_page(state, num_tokens);
        let free = self.free_pages.len() as u64;
        let short = out.undo.last().is_some_and(|undo| !undo.was_extended) || pages > free;
        out.undo.push(Undo { sequence_idx: id.idx, len, num_pages, shared_page, was_extended: !short });
        if let Some(page) = shared_page {
            self.drop_reference(page);
        }
        let mut row = self.take_pages(id);
        if !short {
            if let (Some(src), Some(last)) = (shared_page, row.last_mut())
                && let Some(dst) = self.take_free_page()
            {
                *last = dst;
                out.copies.push(PageCopy { src: src as u64, dst: dst as u64 });
            }
            for _ in 0..self.pages_of(len + num_tokens) - num_pages {
                row.extend(self.take_free_page());
            }
            let page_len = self.page_len;
            out.slots.extend((len..len + num_tokens).filter_map(|token| {
                let page = *row.get((token / page_len) as usize)?;
                Some(i64::from(page) * i64::from(page_len) + i64::from(token % page_len))
            }));
        }
        let version = self.version;
        if let Some(state) = self.sequences.get_mut(id.idx) {
            state.pages = row;
            state.batch_stamp = version;
            if !short {
                state.len = len + num_tokens;
            }
        }
        Ok(pages)
    }

    /// Undoes the parts of an append, last first, so that the free pages come to lie as they were.
    fn take_back(&mut self, append: &mut AppendSlots) {
        while let Some(undo) = append.undo.pop() {
            let Some(state) = self.sequences.get_mut(undo.sequence_idx) else { continue };
            state.len = undo.len;
            let mut row = std::mem::take(&mut state.pages);
            if undo.was_extended {
                for page in row.drain(undo.num_pages..).rev() {
                    self.drop_reference(page);
                }
            }
            if let Some(shared) = undo.shared_page {
                if let (true, Some(last)) = (undo.was_extended, row.last_mut()) {
                    self.drop_reference(*last);
                    *last = shared;
                }
                self.add_reference(shared);
            }
            if let Some(state) = self.sequences.get_mut(undo.sequence_idx) {
                state.pages = row;
            }
        }
        append.slots.clear();
        append.copies.clear();
    }
}
