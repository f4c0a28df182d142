//! A stretch of device memory as plain data: known with and without feature `cuda`, so that whoever validates can be tested anywhere.

/// A stretch of device memory: address and length in bytes. Plain data; holding one keeps nothing alive.
///
/// Safe code can get one from a `device::DeviceBuffer` only, so that a launch never writes to host memory.
/// A view that outlives its buffer names device memory of somebody else: wrong results, or a lost context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceView {
    address: u64,
    len_bytes: u64,
}

impl DeviceView {
    /// A view of memory that this crate has allocated.
    #[cfg(feature = "cuda")]
    pub(crate) fn of(address: u64, len_bytes: u64) -> Self {
        Self { address, len_bytes }
    }

    /// A view of memory that an engine has allocated.
    ///
    /// # Safety
    /// `address .. address + len_bytes` is device memory of the context that the launch uses (not pinned or managed
    /// host memory that Rust also has references to), and lives until the work launched with it has ended.
    #[must_use]
    pub unsafe fn from_raw(address: u64, len_bytes: u64) -> Self {
        Self { address, len_bytes }
    }

    /// Device address of the first byte.
    #[must_use]
    pub fn address(self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(self) -> u64 {
        self.len_bytes
    }

    /// The part that starts at `offset`, `len_bytes` long; `None` beyond the end.
    #[must_use]
    pub fn slice(self, offset: u64, len_bytes: u64) -> Option<Self> {
        let end = offset.checked_add(len_bytes)?;
        (end <= self.len_bytes).then(|| Self { address: self.address + offset, len_bytes })
    }
}
