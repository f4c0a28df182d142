//! The kernel image on a device, and the functions in it.

use core::ffi::{CStr, c_int, c_void};
use std::ffi::CString;
use std::sync::Arc;

use cust::sys::{CUfunction_attribute_enum as Attribute, CUjit_option_enum as JitOption};

use super::context::CudaDevice;
use super::driver::{self, Handle};
use super::error::{DeviceError, DriverError};
use crate::image;
use crate::probe::Unavailable;

const CUDA_ERROR_NO_BINARY_FOR_GPU: u32 = 209;
const CUDA_ERROR_UNSUPPORTED_PTX_VERSION: u32 = 222;

/// The image, loaded. Clones share it; it is unloaded with the last clone and the last [`Kernel`] from it.
#[derive(Clone, Debug)]
pub struct Kernels {
    module: Arc<Module>,
}

#[derive(Debug)]
struct Module {
    device: CudaDevice,
    handle: Handle,
}

// SAFETY: the driver allows a module and its functions to be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above, and from several at once.
unsafe impl Sync for Module {}

/// What the loaded code of one kernel uses, as the driver tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelFacts {
    /// Registers a thread.
    pub registers: u32,
    /// Shared memory that the code itself declares, in bytes.
    pub static_shared_bytes: u32,
    /// Shared memory that a launch may ask for on top, in bytes.
    pub max_dynamic_shared_bytes: u32,
    /// Local memory a thread (spills and indexed arrays), in bytes.
    pub local_bytes: u32,
    /// Threads a block may have.
    pub max_block_threads: u32,
    /// Architecture of the machine code in use, major * 10 + minor.
    pub binary_version: u32,
}

/// One function of the image, ready to launch.
#[derive(Clone, Debug)]
pub struct Kernel {
    module: Arc<Module>,
    handle: FunctionHandle,
    symbol: &'static str,
    facts: KernelFacts,
}

#[derive(Clone, Copy, Debug)]
struct FunctionHandle(Handle);

// SAFETY: as for the module that the function is of.
unsafe impl Send for FunctionHandle {}
// SAFETY: as above.
unsafe impl Sync for FunctionHandle {}

impl Kernels {
    /// Loads the embedded image.
    ///
    /// # Errors
    /// [`DeviceError::Image`] if there is none or it is stale; [`DeviceError::Unavailable`] if it has no code for the
    /// device or the driver is too old for it; [`DeviceError::ImageRefused`] otherwise.
    pub fn load(device: &CudaDevice) -> Result<Self, DeviceError> {
        let image = image::embedded()?;
        // SAFETY: the build tool made the image, and its hash was compared with these sources'.
        unsafe { Self::from_fatbin(device, image.fatbin) }
    }

    /// Loads an image given as bytes (fatbin or cubin).
    ///
    /// # Safety
    /// The bytes are a well-formed image: the driver reads it by its own length fields.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub unsafe fn from_fatbin(device: &CudaDevice, fatbin: &[u8]) -> Result<Self, DeviceError> {
        let _current = device.enter()?;
        let mut handle = std::ptr::null_mut();
        let mut log = [0_u8; 4096];
        let mut options =
            [JitOption::CU_JIT_ERROR_LOG_BUFFER as u32, JitOption::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES as u32];
        // The driver takes a number in a pointer's place here, by value.
        let mut values: [*mut c_void; 2] =
            [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len())];
        // SAFETY: the image is well-formed by the caller's word; the two options and values match, and the log lives
        // through the call.
        let code = unsafe {
            driver::cuModuleLoadDataEx(
                &raw mut handle,
                fatbin.as_ptr().cast(),
                2,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        let needs = image::needs();
        match device.check("cuModuleLoadData", code) {
            Ok(()) => Ok(Self { module: Arc::new(Module { device: device.clone(), handle }) }),
            Err(DeviceError::Driver(error)) => Err(match error.code {
                CUDA_ERROR_NO_BINARY_FOR_GPU => {
                    Unavailable::UnsupportedArch { found: device.facts().sm, supported: needs.supported }
                        .into()
                }
                CUDA_ERROR_UNSUPPORTED_PTX_VERSION => Unavailable::DriverTooOld {
                    found: device.facts().driver_version,
                    needed: needs.driver_version_for_ptx,
                }
                .into(),
                _ => {
                    let log = CStr::from_bytes_until_nul(&log).unwrap_or_default();
                    DeviceError::ImageRefused { error, log: log.to_string_lossy().trim().to_owned() }
                }
            }),
            Err(other) => Err(other),
        }
    }

    /// The device that the image is loaded on.
    #[must_use]
    pub fn device(&self) -> &CudaDevice {
        &self.module.device
    }

    /// Looks a function up by its symbol and opts it into all the shared memory that the device has.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] with code 500 if the image has no such symbol.
    pub fn get(&self, symbol: &'static str) -> Result<Kernel, DeviceError> {
        let device = &self.module.device;
        let _current = device.enter()?;
        let not_found =
            |_| DriverError { code: 500, name: "CUDA_ERROR_NOT_FOUND", call: "cuModuleGetFunction" };
        let name = CString::new(symbol).map_err(not_found)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; the module is loaded and the name is a C string.
        let code = unsafe { driver::cuModuleGetFunction(&raw mut handle, self.module.handle, name.as_ptr()) };
        device.check("cuModuleGetFunction", code)?;
        let attribute = |which: Attribute| -> Result<u32, DeviceError> {
            let mut value: c_int = 0;
            // SAFETY: writes one integer; the function is of a loaded module.
            let code = unsafe { driver::cuFuncGetAttribute(&raw mut value, which as u32, handle) };
            device.check("cuFuncGetAttribute", code)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let static_shared_bytes = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let max_dynamic_shared_bytes =
            device.facts().shared_mem_optin_bytes.saturating_sub(static_shared_bytes);
        // Without this, a launch gets 48 KiB at most. Asking once here costs nothing at launch: what decides the
        // occupancy is what a launch uses, not what it might.
        let most = c_int::try_from(max_dynamic_shared_bytes).unwrap_or(c_int::MAX);
        let which = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
        // SAFETY: the function is of a loaded module.
        device.check("cuFuncSetAttribute", unsafe { driver::cuFuncSetAttribute(handle, which, most) })?;
        let facts = KernelFacts {
            registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            static_shared_bytes,
            max_dynamic_shared_bytes,
            local_bytes: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            max_block_threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            binary_version: attribute(Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
        };
        Ok(Kernel { module: Arc::clone(&self.module), handle: FunctionHandle(handle), symbol, facts })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Some(_current) = self.device.enter_to_free() {
            // SAFETY: loaded once, unloaded once, after the last function of it. A refusal cannot be reported here.
            let _ = unsafe { driver::cuModuleUnload(self.handle) };
        }
    }
}

impl Kernel {
    /// The symbol in the image.
    #[must_use]
    pub fn symbol(&self) -> &'static str {
        self.symbol
    }

    /// What the loaded code uses.
    #[must_use]
    pub fn facts(&self) -> KernelFacts {
        self.facts
    }

    /// The device that it is loaded on.
    #[must_use]
    pub fn device(&self) -> &CudaDevice {
        &self.module.device
    }

    /// Blocks of this size that one multiprocessor holds at once.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn blocks_per_sm(&self, block_threads: u32, dynamic_shared_bytes: u32) -> Result<u32, DeviceError> {
        let device = self.device();
        let _current = device.enter()?;
        let mut blocks = 0;
        // SAFETY: writes one integer; the function is of a loaded module.
        let code = unsafe {
            driver::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut blocks,
                self.handle.0,
                block_threads.cast_signed(),
                dynamic_shared_bytes as usize,
            )
        };
        device.check("cuOccupancyMaxActiveBlocksPerMultiprocessor", code)?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle.0
    }
}
