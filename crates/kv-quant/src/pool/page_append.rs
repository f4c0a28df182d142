//! Appending to sequences of a [`PagePool`], all of a batch or none of it.

use super::append_slots::Undo;
use crate::{AppendSlots, PageCopy, PagePool, PoolError, SequenceId};

impl PagePool {
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
