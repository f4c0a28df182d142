//! Copies through views: memory of an engine's own, or parts of ours.

use super::context::CudaDevice;
use super::driver;
use super::error::DeviceError;
use super::memory::DeviceView;
use super::stream::Stream;

impl CudaDevice {
    /// Copies from byte `offset` of a view; returns when the bytes are there. Work on streams other than the default
    /// one has to be waited for first.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`]; [`DeviceError::Driver`].
    pub fn read_view(&self, view: DeviceView, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let from = part(view, offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let _current = self.enter()?;
        // SAFETY: the target is a slice of that length, the source lies in the view, and the call is synchronous.
        let code = unsafe { driver::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), from.address(), bytes.len()) };
        self.check("cuMemcpyDtoH", code)
    }

    /// Copies to byte `offset` of a view; returns when the bytes are there, for every stream. Work on streams other than the
    /// default one has to be waited for first.
    /// (The driver's copy from pageable memory alone may return while the last part is still under way.)
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`]; [`DeviceError::Driver`].
    pub fn write_view(&self, view: DeviceView, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let to = part(view, offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let _current = self.enter()?;
        // SAFETY: the source is a slice of that length, the target lies in the view, and the call is synchronous.
        let code = unsafe { driver::cuMemcpyHtoD_v2(to.address(), bytes.as_ptr().cast(), bytes.len()) };
        self.check("cuMemcpyHtoD", code)?;
        Stream::default_of(self).synchronize()
    }
}

impl Stream {
    /// Queues a copy of `from` to the start of `to`. The two must not overlap. Can be captured.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] if `to` is shorter; [`DeviceError::Driver`].
    pub fn copy(&self, from: DeviceView, to: DeviceView) -> Result<(), DeviceError> {
        let bytes = usize::try_from(from.len_bytes()).unwrap_or(usize::MAX);
        let to = part(to, 0, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.device().enter()?;
        // SAFETY: both views are device memory of that length by their constructors' promise; the stream is alive.
        let code =
            unsafe { driver::cuMemcpyDtoDAsync_v2(to.address(), from.address(), bytes, self.handle()) };
        self.device().check("cuMemcpyDtoDAsync", code)
    }
}

fn part(view: DeviceView, offset: u64, len: usize) -> Result<DeviceView, DeviceError> {
    view.slice(offset, len as u64).ok_or(DeviceError::OutOfBounds {
        offset: usize::try_from(offset).unwrap_or(usize::MAX),
        len,
        buffer_bytes: usize::try_from(view.len_bytes()).unwrap_or(usize::MAX),
    })
}
