//! The kernel image on a device, and the functions in it.

use core::ffi::{CStr, c_int, c_void};
use std::borrow::Cow;
use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cust::sys::{CUfunction_attribute_enum as Attribute, CUjit_option_enum as JitOption};

use super::context::{CudaDevice, ModuleKey};
use super::driver::{self, Handle};
use super::error::DeviceError;
use crate::image::{self, ImageError, Unit};
use crate::probe::Unavailable;

/// The first virtual architecture that has clusters.
pub(super) const CLUSTER_VERSION: u32 = 90;
/// `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`.
const NON_PORTABLE_CLUSTER_SIZE_ALLOWED: u32 = 14;

const CUDA_ERROR_NO_BINARY_FOR_GPU: u32 = 209;
const CUDA_ERROR_NOT_FOUND: u32 = 500;
const CUDA_ERROR_UNSUPPORTED_PTX_VERSION: u32 = 222;

/// The kernel image on a device. A unit of it is loaded when the first of its kernels is asked for, so a program pays
/// for what it uses. A loaded unit belongs to the device and stays until that is closed: graphs and queued work may
/// still need its code when nobody holds a [`Kernel`] of it any more.
#[derive(Clone, Debug)]
pub struct Kernels {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    device: CudaDevice,
    bytes: Cow<'static, [u8]>,
    units: Units,
}

#[derive(Debug)]
enum Units {
    Table(&'static [Unit]),
    /// All bytes are one unit, whose kernels are not known beforehand; the number is its name.
    One(u64),
}

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
    /// Virtual architecture that it was compiled for, major * 10 + minor: less than the other where the driver translated PTX.
    pub ptx_version: u32,
}

/// One function of the image, ready to launch.
#[derive(Clone, Debug)]
pub struct Kernel {
    device: CudaDevice,
    handle: FunctionHandle,
    symbol: Arc<str>,
    facts: KernelFacts,
}

#[derive(Clone, Copy, Debug)]
struct FunctionHandle(Handle);

// SAFETY: the driver allows a function to be used from any thread; its module lives as long as the device.
unsafe impl Send for FunctionHandle {}
// SAFETY: as above.
unsafe impl Sync for FunctionHandle {}

impl Kernels {
    /// The embedded image. Loads nothing yet.
    ///
    /// # Errors
    /// [`DeviceError::Image`] if there is none or it is stale.
    pub fn embedded(device: &CudaDevice) -> Result<Self, DeviceError> {
        let image = image::embedded()?;
        Ok(Self::new(device, Cow::Borrowed(image.bytes), Units::Table(image.units)))
    }

    /// An image given as bytes: one fatbin or cubin. Its code stays loaded until the device is closed.
    ///
    /// # Safety
    /// The bytes are well-formed: the driver reads them by their own length fields.
    #[must_use]
    pub unsafe fn from_fatbin(device: &CudaDevice, fatbin: Vec<u8>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self::new(device, Cow::Owned(fatbin), Units::One(NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    fn new(device: &CudaDevice, bytes: Cow<'static, [u8]>, units: Units) -> Self {
        Self { shared: Arc::new(Shared { device: device.clone(), bytes, units }) }
    }

    /// The unit that has a kernel, loaded now if it has not been.
    fn module_of(&self, symbol: &str) -> Result<Handle, DeviceError> {
        let Shared { device, bytes, units } = &*self.shared;
        let missing = || ImageError::NoSuchKernel { symbol: symbol.to_owned() };
        let (key, unit_bytes) = match units {
            Units::One(number) => (ModuleKey::Given(*number), &bytes[..]),
            Units::Table(units) => {
                let unit = units.iter().find(|unit| unit.symbols.contains(&symbol)).ok_or_else(missing)?;
                (ModuleKey::Embedded(unit.name), bytes.get(unit.range.clone()).ok_or_else(missing)?)
            }
        };
        // SAFETY: the bytes are the build tool's, tied to these sources by their hash, or well-formed by the word of
        // whoever called `from_fatbin`.
        device.module(key, || unsafe { load_unit(device, unit_bytes) })
    }

    /// The device that the image is for.
    #[must_use]
    pub fn device(&self) -> &CudaDevice {
        &self.shared.device
    }

    /// Looks a kernel up by its symbol, loads its unit if need be, and opts it into all the shared memory that the
    /// device has. Once a kernel: keep the answer.
    ///
    /// # Errors
    /// [`ImageError::NoSuchKernel`]; [`DeviceError::Unavailable`] if the unit has no code for the device or the driver is
    /// too old for it; [`DeviceError::ImageRefused`] if the driver does not take it for another reason.
    pub fn get(&self, symbol: &str) -> Result<Kernel, DeviceError> {
        let device = &self.shared.device;
        let missing = || ImageError::NoSuchKernel { symbol: symbol.to_owned() };
        let module = self.module_of(symbol)?;
        let _current = device.enter()?;
        let name = CString::new(symbol).map_err(|_| missing())?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; the module is loaded and the name is a C string.
        let code = unsafe { driver::cuModuleGetFunction(&raw mut handle, module, name.as_ptr()) };
        if code == CUDA_ERROR_NOT_FOUND {
            return Err(missing().into());
        }
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
        let ptx_version = attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
        if ptx_version >= CLUSTER_VERSION {
            // Clusters of more than eight blocks; a driver that refuses this has smaller ones.
            // SAFETY: the function is of a loaded module.
            let _ = unsafe { driver::cuFuncSetAttribute(handle, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1) };
        }
        let facts = KernelFacts {
            registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            static_shared_bytes,
            max_dynamic_shared_bytes,
            local_bytes: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            max_block_threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            binary_version: attribute(Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
            ptx_version,
        };
        Ok(Kernel { device: device.clone(), handle: FunctionHandle(handle), symbol: symbol.into(), facts })
    }
}

/// # Safety
/// The bytes are one well-formed fatbin or cubin.
unsafe fn load_unit(device: &CudaDevice, bytes: &[u8]) -> Result<Handle, DeviceError> {
    let _current = device.enter()?;
    let mut handle = std::ptr::null_mut();
    let mut log = [0_u8; 4096];
    let mut options =
        [JitOption::CU_JIT_ERROR_LOG_BUFFER as u32, JitOption::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES as u32];
    // The driver takes a number in a pointer's place here, by value.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len())];
    // SAFETY: the image is well-formed by the caller's word; the two options and values match, and the log lives
    // through the call.
    let code = unsafe {
        driver::cuModuleLoadDataEx(
            &raw mut handle,
            bytes.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let needs = image::needs();
    match device.check_alloc("device", "cuModuleLoadData", bytes.len(), code) {
        Ok(()) => Ok(handle),
        Err(DeviceError::Driver(error)) => Err(match error.code {
            _ if error.is_sticky() => error.into(),
            CUDA_ERROR_NO_BINARY_FOR_GPU => {
                Unavailable::UnsupportedArch { found: device.facts().sm, supported: needs.supported }.into()
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

impl Kernel {
    /// The symbol in the image.
    #[must_use]
    pub fn symbol(&self) -> &str {
        &self.symbol
    }

    /// What the loaded code uses.
    #[must_use]
    pub fn facts(&self) -> KernelFacts {
        self.facts
    }

    /// The device that it is loaded on.
    #[must_use]
    pub fn device(&self) -> &CudaDevice {
        &self.device
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
