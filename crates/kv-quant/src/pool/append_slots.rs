//! The answer to an append: where each token goes, and which pages are to be copied first.

/// Copy page `src` onto page `dst`: codes and scales of K and V, in every layer that shares the page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageCopy {
    /// The shared page.
    pub src: u64,
    /// A page that only the writer has.
    pub dst: u64,
}

/// Slots and copies of one append, filled by [`crate::PagePool::append_batch`]; keep one and reuse it.
///
/// Do all `copies`, then write token `i` of the batch to slot `slots[i]`.
#[derive(Clone, Debug, Default)]
pub struct AppendSlots {
    pub(crate) slots: Vec<i64>,
    pub(crate) copies: Vec<PageCopy>,
    pub(crate) undo: Vec<Undo>,
    pub(crate) pool_id: u64,
    pub(crate) version: u64,
}

impl AppendSlots {
    /// One slot a token, in the order of the batch; never -1.
    pub fn slots(&self) -> &[i64] {
        &self.slots
    }

    /// Pages to copy before anything is written. No page is the destination of two copies, and no destination is a
    /// source.
    pub fn copies(&self) -> &[PageCopy] {
        &self.copies
    }
}

/// How to take back one sequence's part of an append.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Undo {
    pub sequence_idx: usize,
    pub len: u32,
    pub num_pages: usize,
    /// The shared last page that a copy replaced.
    pub shared_page: Option<i32>,
    /// False if pages had run out: then only the reference to `shared_page` was dropped.
    pub was_extended: bool,
}
