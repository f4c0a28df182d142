//! What can be wrong with a request. Each error names what was asked and what would be valid.

/// Every error of this crate.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No kv heads, or more than a cache can have.
    #[error("num_kv_heads is {0}; valid: 1 to 65535")]
    NumKvHeads(u32),
    /// No query heads, too many, or not a multiple of the kv heads.
    #[error("num_q_heads is {num_q_heads}; valid: a multiple of num_kv_heads ({num_kv_heads}) up to {max}")]
    NumQHeads {
        /// What was asked.
        num_q_heads: u32,
        /// What it must be a multiple of.
        num_kv_heads: u32,
        /// The largest valid value.
        max: u32,
    },
    /// A head dimension that no cache has.
    #[error("head_dim is {0}; valid: 16 to 256")]
    HeadDim(u32),
    /// No new tokens, or too many.
    #[error("q_len is {q_len}; valid: 1 to {max}")]
    QLen {
        /// What was asked.
        q_len: u32,
        /// The largest valid value.
        max: u32,
    },
    /// NaN, infinite.
    #[error("softmax_scale is {0}; valid: any finite number")]
    SoftmaxScale(f32),
    /// A window that shows nothing.
    #[error("window is 0; valid: 1 or more tokens, or none for no window")]
    Window,
    /// Zero, negative, NaN or infinite.
    #[error("soft_cap is {0}; valid: a positive finite number, or none for no cap")]
    SoftCap(f32),
    /// One number a query head is needed.
    #[error("{what} has {got} entries; needed: one a query head ({want})")]
    PerHead {
        /// Which array.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The number of query heads.
        want: u32,
    },
    /// NaN or infinite entry of a per-head array.
    #[error("{what}[{head}] is {value}; valid: any finite number")]
    PerHeadValue {
        /// Which array.
        what: &'static str,
        /// Query head.
        head: usize,
        /// What was given.
        value: f32,
    },
    /// More requests than a plan can index.
    #[error("the batch has {got} requests; valid: up to {max}")]
    Batch {
        /// What was given.
        got: usize,
        /// The largest valid value.
        max: usize,
    },
    /// The spec's heads or head_dim differ from the cache's.
    #[error("{what} is {spec} in the request and {cache} in the cache")]
    CacheMismatch {
        /// Which number.
        what: &'static str,
        /// The request's.
        spec: u32,
        /// The cache's.
        cache: u32,
    },
    /// `PageRows::Starts` must have one entry a request.
    #[error("the page table has {got} row starts; needed: one a request ({want})")]
    PageRowCount {
        /// Entries given.
        got: usize,
        /// Requests in the batch.
        want: usize,
    },
    /// A request's row of the page table ends before its tokens do.
    #[error(
        "request {request}: {kv_len} tokens need {need} pages from entry {start} of a page table of {have} entries"
    )]
    PageTableShort {
        /// Which request.
        request: usize,
        /// Its length in tokens.
        kv_len: u32,
        /// Pages it needs.
        need: u64,
        /// Where its row starts.
        start: u64,
        /// Entries of the page table.
        have: usize,
    },
    /// With `PageRows::Stride`, a row is longer than the stride.
    #[error("request {request}: {kv_len} tokens need {need} pages; a row of the page table has {stride}")]
    PageRowStride {
        /// Which request.
        request: usize,
        /// Its length in tokens.
        kv_len: u32,
        /// Pages it needs.
        need: u64,
        /// Entries of a row.
        stride: u64,
    },
    /// A page index outside the cache.
    #[error("request {request}, page {position} of its row: index {page}; valid: 0 to {max}", max = .num_pages - 1)]
    PageOutOfRange {
        /// Which request.
        request: usize,
        /// Position in its row.
        position: u64,
        /// What was given.
        page: i32,
        /// Pages in the cache.
        num_pages: u64,
    },
    /// A schedule needs at least one worker.
    #[error("num_workers is {0}; valid: 1 to 1048576")]
    NumWorkers(u32),
    /// A tile holds at least one token.
    #[error("tile_len is {0}; valid: 1 to 65536")]
    TileLen(u32),
    /// A block of a device takes some of the kv heads.
    #[error("heads_per_block is {0}; valid: 1, 2 or 4")]
    HeadsPerBlock(u32),
    /// A request in more shares than a cluster has room for, or in shares where the policy fixes the cuts.
    #[error("num_shares is {0}; valid: 0 to {max}, and 0 under the batch-invariant policy", max = crate::MAX_SHARES)]
    NumShares(u32),
    /// A batch-invariant split that is no whole number of tiles.
    #[error("split_len is {split_len}; valid: a positive multiple of tile_len ({tile_len})")]
    SplitLen {
        /// What was asked.
        split_len: u32,
        /// What it must be a multiple of.
        tile_len: u32,
    },
    /// The batch would be cut into too many pieces.
    #[error("the plan needs {0} work items; valid: up to {max}", max = crate::MAX_ITEMS)]
    TooManyItems(u64),
    /// A workspace beyond u64.
    #[error("the workspace size overflows")]
    WorkspaceOverflow,
}
