//! Streams and events. A stream is ours, or an engine's by its raw handle.

use super::context::CudaDevice;
use super::driver::{self, Handle};
use super::error::DeviceError;

/// An ordered queue of device work.
#[derive(Debug)]
pub struct Stream {
    device: CudaDevice,
    handle: Handle,
    owned: bool,
}

// SAFETY: the driver allows a stream to be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above, and from several at once.
unsafe impl Sync for Stream {}

const NON_BLOCKING: u32 = 1;

impl Stream {
    /// A new stream that does not wait for the legacy default stream.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        let _current = device.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle.
        device.check("cuStreamCreate", unsafe { driver::cuStreamCreate(&raw mut handle, NON_BLOCKING) })?;
        Ok(Self { device: device.clone(), handle, owned: true })
    }

    /// The legacy default stream of the device's context.
    #[must_use]
    pub fn default_of(device: &CudaDevice) -> Self {
        Self { device: device.clone(), handle: std::ptr::null_mut(), owned: false }
    }

    /// An engine's stream by its `CUstream` (or `cudaStream_t`) handle; 0 is the legacy default stream.
    /// It is not destroyed on drop.
    ///
    /// # Safety
    /// The handle is a stream of this device's primary context and lives at least as long as this value.
    #[must_use]
    pub unsafe fn from_raw(device: &CudaDevice, handle: u64) -> Self {
        Self { device: device.clone(), handle: handle as usize as Handle, owned: false }
    }

    /// The `CUstream` handle as a number.
    #[must_use]
    pub fn raw(&self) -> u64 {
        self.handle as u64
    }

    /// The device of the stream.
    #[must_use]
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Waits for all work queued so far. Errors of that work surface here.
    ///
    /// # Errors
    /// [`DeviceError::Driver`], or [`DeviceError::ContextPoisoned`] once the context is lost.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.device.enter()?;
        // SAFETY: the stream is alive.
        self.device.check("cuStreamSynchronize", unsafe { driver::cuStreamSynchronize(self.handle) })
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned
            && let Some(_current) = self.device.enter_to_free()
        {
            // SAFETY: created by `new` and destroyed once; queued work still runs. A refusal cannot be reported here.
            let _ = unsafe { driver::cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// A point in a stream, for measuring time on the device.
#[derive(Debug)]
pub struct Event {
    device: CudaDevice,
    handle: Handle,
}

// SAFETY: the driver allows an event to be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above, and from several at once.
unsafe impl Sync for Event {}

impl Event {
    /// A new event that keeps time.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        let _current = device.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle.
        device.check("cuEventCreate", unsafe { driver::cuEventCreate(&raw mut handle, 0) })?;
        Ok(Self { device: device.clone(), handle })
    }

    /// Queues the event.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        let _current = self.device.enter()?;
        // SAFETY: both are alive.
        self.device.check("cuEventRecord", unsafe { driver::cuEventRecord(self.handle, stream.handle()) })
    }

    /// Waits until the device has reached the event.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.device.enter()?;
        // SAFETY: the event is alive.
        self.device.check("cuEventSynchronize", unsafe { driver::cuEventSynchronize(self.handle) })
    }

    /// Microseconds from `start` to this event; both must have been reached.
    ///
    /// # Errors
    /// [`DeviceError::Driver`]; code 600 if one of them has not been reached.
    pub fn microseconds_since(&self, start: &Event) -> Result<f64, DeviceError> {
        let _current = self.device.enter()?;
        let mut milliseconds = 0.0_f32;
        // SAFETY: writes one float; both events are alive.
        let code = unsafe { driver::cuEventElapsedTime(&raw mut milliseconds, start.handle, self.handle) };
        self.device.check("cuEventElapsedTime", code)?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(_current) = self.device.enter_to_free() {
            // SAFETY: created by `new` and destroyed once. A refusal cannot be reported here.
            let _ = unsafe { driver::cuEventDestroy_v2(self.handle) };
        }
    }
}
