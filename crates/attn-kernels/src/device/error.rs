//! What can go wrong below validation: the machine, the driver, memory, the image.

use core::fmt;

use thiserror::Error;

use crate::abi::{ErrorKind, ErrorRecord};
use crate::image::ImageError;
use crate::key::KeyMiss;
use crate::probe::Unavailable;

/// An answer of the driver other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverError {
    /// The driver's number.
    pub code: u32,
    /// The driver's name of it.
    pub name: &'static str,
    /// The call that answered.
    pub call: &'static str,
}

impl DriverError {
    /// Whether the context is lost: after such an error the driver answers every later call of the process with it.
    ///
    /// The list is that of the driver's documentation, errors that leave "the process in an inconsistent state".
    #[must_use]
    pub fn is_sticky(&self) -> bool {
        matches!(self.code, 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721)
    }
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}) from {}", self.name, self.code, self.call)
    }
}

impl core::error::Error for DriverError {}

/// Everything that the device side can answer.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The machine lacks something.
    #[error("CUDA unavailable: {0}")]
    Unavailable(#[from] Unavailable),
    /// There is no kernel image, or it is not of these sources.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The table has no such kernel.
    #[error(transparent)]
    KeyMiss(#[from] KeyMiss),
    /// Device or pinned memory is used up. The device stays usable.
    #[error(
        "out of {kind} memory: {requested_bytes} bytes asked for, {free_bytes} of {total_bytes} bytes of device memory free"
    )]
    OutOfMemory {
        /// "device" or "pinned".
        kind: &'static str,
        /// What was asked for.
        requested_bytes: usize,
        /// Free device memory after the refusal.
        free_bytes: usize,
        /// All device memory.
        total_bytes: usize,
    },
    /// An earlier error has made the context unusable. The driver allows no way back within this process.
    #[error("the CUDA context is lost since: {first}; restart the process")]
    ContextPoisoned {
        /// The error that did it.
        first: DriverError,
    },
    /// The driver does not take the image.
    #[error("kernel image refused: {error}{}{log}", if log.is_empty() { "" } else { "; " })]
    ImageRefused {
        /// The driver's answer.
        error: DriverError,
        /// What its compiler said, if PTX had to be compiled.
        log: String,
    },
    /// A copy beyond the end of a buffer.
    #[error("bytes {offset}..{} of a buffer of {buffer_bytes} bytes", offset.saturating_add(*len))]
    OutOfBounds {
        /// First byte of the copy.
        offset: usize,
        /// Length of the copy in bytes.
        len: usize,
        /// Length of the buffer in bytes.
        buffer_bytes: usize,
    },
    /// The launch does not fit the kernel or the device.
    #[error("launch refused: {what}")]
    Launch {
        /// Which number, and what was allowed.
        what: String,
    },
    /// Any other answer of the driver.
    #[error("driver: {0}")]
    Driver(#[from] DriverError),
    /// A kernel found bad data and said so.
    #[error(transparent)]
    Reported(#[from] DeviceReport),
}

/// What a kernel found, as read back from its [`ErrorRecord`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// What it was; `None` for a number that no kernel of this version writes.
    pub kind: Option<ErrorKind>,
    /// The record as written.
    pub record: ErrorRecord,
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ErrorRecord { request_idx, head_idx, channel, value, plane, count, kind, .. } = self.record;
        let side = if plane == 0 { "K" } else { "V" };
        match self.kind {
            Some(ErrorKind::PageOutOfRange) => {
                write!(
                    f,
                    "request {request_idx}: page index {value} at token {channel} is outside the pool"
                )?;
            }
            Some(ErrorKind::SlotOutOfRange) => {
                write!(f, "token {request_idx}: slot {value} is outside the pool")?
            }
            Some(ErrorKind::NonFinite) => {
                write!(f, "{side} of token {request_idx}, head {head_idx}, channel {channel} is not finite")?;
            }
            Some(ErrorKind::ScaleOverflow) => write!(
                f,
                "{side} of token {request_idx}, head {head_idx}: the scale of the group at channel {channel} overflows its type"
            )?,
            None => write!(f, "a kernel reported error kind {kind}, which this version does not know")?,
        }
        if count > 1 { write!(f, " (the first of {count} reports)") } else { Ok(()) }
    }
}

impl core::error::Error for DeviceReport {}
