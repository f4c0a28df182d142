//! Device memory, pinned host memory, and copies between them.

use core::ffi::c_void;

use bytemuck::Pod;

use super::context::CudaDevice;
use super::driver;
use super::error::DeviceError;
use super::stream::Stream;
pub use crate::view::DeviceView;

const CUDA_ERROR_OUT_OF_MEMORY: u32 = 2;

/// Device memory that is freed on drop. Freeing waits for work that still uses it (the driver sees to that).
#[derive(Debug)]
pub struct DeviceBuffer {
    device: CudaDevice,
    address: u64,
    len_bytes: usize,
}

impl CudaDevice {
    /// Allocates `len_bytes` of device memory, contents undefined. Zero bytes is a valid, empty buffer.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with what was asked for and what is free.
    pub fn alloc(&self, len_bytes: usize) -> Result<DeviceBuffer, DeviceError> {
        let mut address = 0;
        if len_bytes > 0 {
            let _current = self.enter()?;
            // SAFETY: writes one address.
            let code = unsafe { driver::cuMemAlloc_v2(&raw mut address, len_bytes) };
            self.check_alloc("device", "cuMemAlloc", len_bytes, code)?;
        }
        Ok(DeviceBuffer { device: self.clone(), address, len_bytes })
    }

    /// Allocates and zeroes; waits for the device.
    ///
    /// # Errors
    /// As [`Self::alloc`].
    pub fn alloc_zeroed(&self, len_bytes: usize) -> Result<DeviceBuffer, DeviceError> {
        let buffer = self.alloc(len_bytes)?;
        let stream = Stream::default_of(self);
        buffer.fill(0, &stream)?;
        stream.synchronize()?;
        Ok(buffer)
    }

    /// Allocates and copies `values` in; waits for the copy.
    ///
    /// # Errors
    /// As [`Self::alloc`].
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<DeviceBuffer, DeviceError> {
        let buffer = self.alloc(size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Allocates page-locked host memory, zeroed, for copies that run beside the host.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with kind "pinned".
    pub fn alloc_pinned(&self, len_bytes: usize) -> Result<PinnedBuffer, DeviceError> {
        let mut pointer: *mut c_void = std::ptr::null_mut();
        if len_bytes > 0 {
            let _current = self.enter()?;
            // Flag 1: the memory counts as pinned in every context.
            // SAFETY: writes one pointer.
            let code = unsafe { driver::cuMemHostAlloc(&raw mut pointer, len_bytes, 1) };
            self.check_alloc("pinned", "cuMemHostAlloc", len_bytes, code)?;
            // SAFETY: the driver has just given `len_bytes` writable bytes.
            unsafe { pointer.cast::<u8>().write_bytes(0, len_bytes) };
        }
        Ok(PinnedBuffer { device: self.clone(), pointer: pointer.cast(), len_bytes })
    }

    /// As [`Self::check`], for calls that need memory.
    pub(super) fn check_alloc(
        &self,
        kind: &'static str,
        call: &'static str,
        requested_bytes: usize,
        code: u32,
    ) -> Result<(), DeviceError> {
        if code == CUDA_ERROR_OUT_OF_MEMORY {
            let (free_bytes, total_bytes) = self.memory_info().unwrap_or((0, 0));
            return Err(DeviceError::OutOfMemory { kind, requested_bytes, free_bytes, total_bytes });
        }
        self.check(call, code)
    }
}

impl DeviceBuffer {
    /// The whole buffer as a view.
    #[must_use]
    pub fn view(&self) -> DeviceView {
        DeviceView::of(self.address, self.len_bytes as u64)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The device that the memory is of.
    #[must_use]
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Copies `values` to byte `offset`; returns when the bytes are there, for every stream.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`]; [`DeviceError::Driver`].
    pub fn write<T: Pod>(&self, offset: usize, values: &[T]) -> Result<(), DeviceError> {
        self.device.write_view(self.view(), offset as u64, bytemuck::cast_slice(values))
    }

    /// Copies from byte `offset` into `values`, after all earlier work of the default stream.
    /// Work on other streams has to be waited for first.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`]; [`DeviceError::Driver`].
    pub fn read<T: Pod>(&self, offset: usize, values: &mut [T]) -> Result<(), DeviceError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        let from = self.range(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: the target is a slice of that length, the source lies in the buffer, and the call is synchronous.
        let code = unsafe { driver::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), from, bytes.len()) };
        self.device.check("cuMemcpyDtoH", code)
    }

    /// Sets every byte, in the order of the stream.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn fill(&self, value: u8, stream: &Stream) -> Result<(), DeviceError> {
        if self.len_bytes == 0 {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: the whole of this buffer; the stream is alive.
        let code = unsafe { driver::cuMemsetD8Async(self.address, value, self.len_bytes, stream.handle()) };
        self.device.check("cuMemsetD8Async", code)
    }

    /// Copies `len` bytes of pinned memory from its byte `from` to byte `offset` here, in the order of the stream.
    /// Returns at once: what is written to the pinned memory before the copy has run may be copied too.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`]; [`DeviceError::Driver`].
    pub fn write_async(
        &self,
        offset: usize,
        pinned: &PinnedBuffer,
        from: usize,
        len: usize,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let to = self.range(offset, len)?;
        pinned.check_range(from, len)?;
        if len == 0 {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: both ranges were checked; pinned memory is freed only after the device has finished with it.
        let code = unsafe {
            driver::cuMemcpyHtoDAsync_v2(to, pinned.pointer.add(from).cast(), len, stream.handle())
        };
        self.device.check("cuMemcpyHtoDAsync", code)
    }

    /// Copies `len` bytes from byte `offset` here to byte `to` of pinned memory, in the order of the stream.
    /// The bytes are there once the stream has been synchronised.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`]; [`DeviceError::Driver`].
    pub fn read_async(
        &self,
        offset: usize,
        pinned: &mut PinnedBuffer,
        to: usize,
        len: usize,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        let from = self.range(offset, len)?;
        pinned.check_range(to, len)?;
        if len == 0 {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: both ranges were checked; pinned memory is freed only after the device has finished with it.
        let code = unsafe {
            driver::cuMemcpyDtoHAsync_v2(pinned.pointer.add(to).cast(), from, len, stream.handle())
        };
        self.device.check("cuMemcpyDtoHAsync", code)
    }

    fn range(&self, offset: usize, len: usize) -> Result<u64, DeviceError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len_bytes => Ok(self.address + offset as u64),
            _ => Err(DeviceError::OutOfBounds { offset, len, buffer_bytes: self.len_bytes }),
        }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.address != 0
            && let Some(_current) = self.device.enter_to_free()
        {
            // SAFETY: allocated by `alloc` and freed once. A refusal cannot be reported here.
            let _ = unsafe { driver::cuMemFree_v2(self.address) };
        }
    }
}

/// Page-locked host memory, freed on drop.
#[derive(Debug)]
pub struct PinnedBuffer {
    device: CudaDevice,
    pointer: *mut u8,
    len_bytes: usize,
}

// SAFETY: the memory is the buffer's own; `&mut` guards writing from the host.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// The bytes. While a copy into them is under way, some may be old and some new.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        if self.pointer.is_null() {
            return &[];
        }
        // SAFETY: the driver gave that many bytes, and they were initialised.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len_bytes) }
    }

    /// The bytes, for writing. A copy from them that has not run yet may see the new ones.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.pointer.is_null() {
            return &mut [];
        }
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len_bytes) }
    }

    fn check_range(&self, offset: usize, len: usize) -> Result<(), DeviceError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len_bytes => Ok(()),
            _ => Err(DeviceError::OutOfBounds { offset, len, buffer_bytes: self.len_bytes }),
        }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if !self.pointer.is_null()
            && let Some(_current) = self.device.enter_to_free()
        {
            // SAFETY: allocated by `alloc_pinned` and freed once. A refusal cannot be reported here.
            let _ = unsafe { driver::cuMemFreeHost(self.pointer.cast()) };
        }
    }
}
