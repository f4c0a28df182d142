//! The error record on the device, and its way back to the host.

use super::context::CudaDevice;
use super::error::{DeviceError, DeviceReport};
use super::memory::{DeviceBuffer, DeviceView, PinnedBuffer};
use super::stream::Stream;
use crate::abi::{ErrorKind, ErrorRecord};

const RECORD_BYTES: usize = size_of::<ErrorRecord>();

/// One error record. Kernels that find bad data write it; launches go on.
#[derive(Debug)]
pub struct ErrorReport {
    record: DeviceBuffer,
    host: PinnedBuffer,
}

impl ErrorReport {
    /// An empty record.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        Ok(Self { record: device.alloc_zeroed(RECORD_BYTES)?, host: device.alloc_pinned(RECORD_BYTES)? })
    }

    /// What goes into the arguments of a launch.
    #[must_use]
    pub fn view(&self) -> DeviceView {
        self.record.view()
    }

    /// Waits for the stream and answers what its kernels have found; an error is taken, so that the next one counts.
    ///
    /// # Errors
    /// [`DeviceError::Reported`]; [`DeviceError::Driver`].
    pub fn take(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        self.queue_read(stream)?;
        stream.synchronize()?;
        let found = self.last_read();
        if found.is_err() {
            self.clear(stream)?;
        }
        found
    }

    /// Queues the record's copy to the host, for a caller that will synchronise anyway; then [`Self::last_read`].
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn queue_read(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        self.record.read_async(0, &mut self.host, 0, RECORD_BYTES, stream)
    }

    /// The record as last copied to the host.
    ///
    /// # Errors
    /// [`DeviceError::Reported`].
    pub fn last_read(&self) -> Result<(), DeviceError> {
        let record: ErrorRecord = bytemuck::pod_read_unaligned(self.host.bytes());
        if record.kind == 0 {
            return Ok(());
        }
        Err(DeviceReport { kind: ErrorKind::from_u32(record.kind), record }.into())
    }

    /// Queues emptying the record.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn clear(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.record.fill(0, stream)
    }
}
