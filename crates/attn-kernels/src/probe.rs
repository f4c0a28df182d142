//! What is on this machine: a driver, a device, and whether the kernels can run on it.
//!
//! The probe comes before any other use of the driver, and reads every answer as a plain number:
//! `cust`'s result type is an enum of the codes of one toolkit, so a code from a newer driver must never reach it.

use thiserror::Error;

/// Facts of one device, read once.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DeviceFacts {
    /// The driver's ordinal.
    pub ordinal: u32,
    /// Marketing name, such as "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Compute capability, major * 10 + minor.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// Shared memory that one block may ask for after opting in, in bytes.
    pub shared_mem_optin_bytes: u32,
    /// Shared memory of one multiprocessor, in bytes.
    pub shared_mem_per_sm_bytes: u32,
    /// L2 cache, in bytes.
    pub l2_bytes: u32,
    /// Device memory, in bytes.
    pub memory_bytes: u64,
    /// What its clock and its width allow, in 10^9 bytes a second; 0 where the driver does not say.
    pub memory_gb_per_s: f64,
    /// Highest CUDA version of the driver, major * 1000 + minor * 10.
    pub driver_version: u32,
}

/// Why no device can be used. Each is a state of the machine, not a bug.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unavailable {
    /// The crate was built without feature `cuda`.
    #[error("built without feature `cuda`")]
    NotCompiled,
    /// No driver library could be opened.
    #[error("no driver: {reason}")]
    NoDriver {
        /// The loader's text.
        reason: String,
    },
    /// A driver is there, but no device that it can use.
    #[error("no device (driver code {code} from {call})")]
    NoDevice {
        /// The driver's code.
        code: u32,
        /// The call that answered it.
        call: &'static str,
    },
    /// The ordinal is beyond the devices that there are.
    #[error("no device {ordinal}: the driver lists {count}")]
    NoSuchDevice {
        /// The ordinal asked for.
        ordinal: u32,
        /// Devices listed.
        count: u32,
    },
    /// The driver is older than the kernel image needs.
    #[error("driver too old: it supports CUDA {}.{}, the kernels need {}.{}", found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10)]
    DriverTooOld {
        /// The driver's CUDA version, major * 1000 + minor * 10.
        found: u32,
        /// The lowest version that loads the image.
        needed: u32,
    },
    /// The image has no code for this device.
    #[error("unsupported architecture: the device is sm_{found}, the kernels are built for {supported}")]
    UnsupportedArch {
        /// Compute capability of the device, major * 10 + minor.
        found: u32,
        /// What the image holds, such as "sm_80, sm_89, sm_90a, compute_80 PTX".
        supported: String,
    },
}

/// Reads the facts of a device, or says why it cannot be used.
///
/// Creates no context and allocates nothing. Cheap after the first call of a process.
///
/// # Errors
/// [`Unavailable`], one variant for each missing thing.
#[cfg(feature = "cuda")]
pub fn probe(ordinal: u32) -> Result<DeviceFacts, Unavailable> {
    let facts = read_facts(ordinal)?;
    check_image(&facts)?;
    Ok(facts)
}

/// Without feature `cuda` there is nothing to probe.
///
/// # Errors
/// Always [`Unavailable::NotCompiled`].
#[cfg(not(feature = "cuda"))]
pub fn probe(_ordinal: u32) -> Result<DeviceFacts, Unavailable> {
    Err(Unavailable::NotCompiled)
}

/// How many devices there are.
///
/// # Errors
/// [`Unavailable`] without a driver or without a device.
#[cfg(feature = "cuda")]
pub fn num_devices() -> Result<u32, Unavailable> {
    use crate::device::driver;

    cuda_shim::load_driver().map_err(|reason| Unavailable::NoDriver { reason: reason.to_owned() })?;
    let no_device = |call| move |code| Unavailable::NoDevice { code, call };
    let mut count = 0;
    // SAFETY: no arguments beyond the flags, which must be 0.
    let code = unsafe { driver::cuInit(0) };
    driver::number(code).map_err(no_device("cuInit"))?;
    // SAFETY: writes one integer.
    let code = unsafe { driver::cuDeviceGetCount(&raw mut count) };
    driver::number(code).map_err(no_device("cuDeviceGetCount"))?;
    u32::try_from(count)
        .ok()
        .filter(|count| *count > 0)
        .ok_or(Unavailable::NoDevice { code: 100, call: "cuDeviceGetCount" })
}

/// Without feature `cuda` there is nothing to count.
///
/// # Errors
/// Always [`Unavailable::NotCompiled`].
#[cfg(not(feature = "cuda"))]
pub fn num_devices() -> Result<u32, Unavailable> {
    Err(Unavailable::NotCompiled)
}

#[cfg(feature = "cuda")]
fn read_facts(ordinal: u32) -> Result<DeviceFacts, Unavailable> {
    use crate::device::driver;
    use cust::sys::CUdevice_attribute_enum as Attribute;

    let count = num_devices()?;
    if ordinal >= count {
        return Err(Unavailable::NoSuchDevice { ordinal, count });
    }
    let no_device = |call| move |code| Unavailable::NoDevice { code, call };
    let (mut device, mut version, mut memory) = (0, 0, 0_usize);
    let mut name = [0_u8; 128];
    // SAFETY: each call writes one integer.
    unsafe {
        driver::number(driver::cuDeviceGet(&raw mut device, ordinal.cast_signed()))
            .map_err(no_device("cuDeviceGet"))?;
        driver::number(driver::cuDriverGetVersion(&raw mut version))
            .map_err(no_device("cuDriverGetVersion"))?;
        driver::number(driver::cuDeviceTotalMem_v2(&raw mut memory, device))
            .map_err(no_device("cuDeviceTotalMem"))?;
    }
    // SAFETY: the driver writes at most the length given, with its closing zero.
    let code = unsafe { driver::cuDeviceGetName(name.as_mut_ptr().cast(), 128, device) };
    driver::number(code).map_err(no_device("cuDeviceGetName"))?;
    let attribute = |which: Attribute| -> Result<u32, Unavailable> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let code = unsafe { driver::cuDeviceGetAttribute(&raw mut value, which as u32, device) };
        driver::number(code).map_err(no_device("cuDeviceGetAttribute"))?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    Ok(DeviceFacts {
        ordinal,
        name: core::ffi::CStr::from_bytes_until_nul(&name)
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        sm: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        num_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_mem_optin_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_mem_per_sm_bytes: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        memory_bytes: memory as u64,
        // Both edges of the clock, which is in kHz; the width is in bits.
        memory_gb_per_s: 2.0 / 8.0 / 1e6
            * f64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?)
            * f64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?),
        driver_version: u32::try_from(version).unwrap_or(0),
    })
}

#[cfg(feature = "cuda")]
fn check_image(facts: &DeviceFacts) -> Result<(), Unavailable> {
    let needs = crate::image::needs();
    if facts.driver_version < needs.driver_version {
        return Err(Unavailable::DriverTooOld { found: facts.driver_version, needed: needs.driver_version });
    }
    if facts.sm < needs.lowest_sm {
        return Err(Unavailable::UnsupportedArch { found: facts.sm, supported: needs.supported });
    }
    Ok(())
}
