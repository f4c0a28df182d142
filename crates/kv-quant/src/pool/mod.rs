//! A cache pool for engines: sequences, pages shared by reference count, pages copied on write.
//!
//! [`PagePool`] keeps the books and touches no cache memory, so that it serves caches on any device; [`CachePool`]
//! adds host buffers and does the copying and the quantizing.

mod append_slots;
mod cache_pool;
mod error;
mod page_append;
mod page_pool;
mod sequence;

pub use append_slots::{AppendSlots, PageCopy};
pub use cache_pool::CachePool;
pub use error::PoolError;
pub use page_pool::PagePool;
pub use sequence::SequenceId;
