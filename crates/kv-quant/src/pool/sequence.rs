//! Handles of sequences, and what a pool knows of each.

/// A sequence of a pool. Once freed, the handle names nothing: its place is handed out under another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    pub(crate) pool_id: u64,
    pub(crate) idx: usize,
    pub(crate) generation: u64,
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sequence {}.{}", self.idx, self.generation)
    }
}

/// A place in the pool's table. A free place keeps the memory of its page list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequence {
    pub generation: u64,
    pub is_live: bool,
    /// Tokens.
    pub len: u32,
    /// `ceil(len / page_len)` page indices.
    pub pages: Vec<i32>,
    /// Version of the pool at which a batch last named this sequence: finds doubles without a look-up table.
    pub batch_stamp: u64,
}
