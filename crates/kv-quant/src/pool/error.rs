//! What a pool refuses. On every error the pool is as it was before the call.

use crate::SequenceId;

/// Every error of a pool. Nothing was changed, nothing was written.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The call needs more pages than are free. Free or truncate a sequence, then ask again.
    #[error("out of pages: {needed} needed, {free} free")]
    OutOfPages {
        /// Pages that the whole call needs, copies of shared pages counted.
        needed: u64,
        /// Pages that are free.
        free: u64,
    },
    /// The handle's sequence was freed, or the handle is of another pool.
    #[error("{0} is not in this pool; it was freed or is of another pool")]
    UnknownSequence(SequenceId),
    /// A batch names a sequence twice.
    #[error("{0} stands twice in the batch; valid: once")]
    SequenceTwice(SequenceId),
    /// A sequence would exceed the largest length that a request can state.
    #[error("{sequence} has {len} tokens and cannot take {num_tokens} more; valid: up to 4294967295 in all")]
    TooLong {
        /// Which sequence.
        sequence: SequenceId,
        /// Its length.
        len: u32,
        /// What was to be added.
        num_tokens: u32,
    },
    /// A truncation or a fork keeps more tokens than there are.
    #[error("{sequence} has {len} tokens; asked to keep {asked}")]
    BeyondLen {
        /// Which sequence.
        sequence: SequenceId,
        /// Its length.
        len: u32,
        /// What was asked.
        asked: u32,
    },
    /// The pool changed after the append that was to be undone.
    #[error("the append cannot be undone: the pool has changed since")]
    StaleAppend,
    /// The rows are not one for each token of the batch, or the cache refuses them.
    #[error(transparent)]
    Cache(#[from] crate::Error),
}
