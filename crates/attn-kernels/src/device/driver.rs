//! The driver's functions as they are: every result a plain number.
//!
//! `cust` has the same functions, but its result type is a Rust enum of the codes that CUDA 11.4 knew. A newer driver
//! may answer others, and an enum with an unknown value is undefined behaviour. So what may fail is called from here,
//! and `cust` serves for what has succeeded before. Nothing outside this crate's `device` and `probe` calls these.

use core::ffi::{CStr, c_char, c_int, c_void};

use super::error::DriverError;
use super::launch::LaunchConfig;

// The symbols come from here, not from a library.
use cuda_shim as _;

pub type Handle = *mut c_void;

unsafe extern "C" {
    pub fn cuInit(flags: u32) -> u32;
    pub fn cuDriverGetVersion(version: *mut c_int) -> u32;
    pub fn cuDeviceGetCount(count: *mut c_int) -> u32;
    pub fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> u32;
    pub fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> u32;
    pub fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> u32;
    pub fn cuDeviceGetAttribute(value: *mut c_int, attribute: u32, device: c_int) -> u32;
    pub fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> u32;
    pub fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> u32;
    pub fn cuCtxGetCurrent(context: *mut Handle) -> u32;
    pub fn cuCtxSetCurrent(context: Handle) -> u32;
    pub fn cuCtxSynchronize() -> u32;
    pub fn cuGetErrorName(code: u32, text: *mut *const c_char) -> u32;

    pub fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32;
    pub fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> u32;
    pub fn cuMemFree_v2(address: u64) -> u32;
    pub fn cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: u32) -> u32;
    pub fn cuMemFreeHost(pointer: *mut c_void) -> u32;
    pub fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> u32;
    pub fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> u32;
    pub fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) -> u32;
    pub fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) -> u32;
    pub fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> u32;
    pub fn cuMemsetD8Async(address: u64, value: u8, count: usize, stream: Handle) -> u32;

    pub fn cuStreamCreate(stream: *mut Handle, flags: u32) -> u32;
    pub fn cuStreamDestroy_v2(stream: Handle) -> u32;
    pub fn cuStreamSynchronize(stream: Handle) -> u32;
    pub fn cuEventCreate(event: *mut Handle, flags: u32) -> u32;
    pub fn cuEventDestroy_v2(event: Handle) -> u32;
    pub fn cuEventRecord(event: Handle, stream: Handle) -> u32;
    pub fn cuEventSynchronize(event: Handle) -> u32;
    pub fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) -> u32;

    pub fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) -> u32;
    pub fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> u32;
    pub fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) -> u32;
    pub fn cuGraphDestroy(graph: Handle) -> u32;
    pub fn cuGraphExecDestroy(exec: Handle) -> u32;
    pub fn cuGraphLaunch(exec: Handle, stream: Handle) -> u32;

    pub fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        num_options: u32,
        options: *mut u32,
        values: *mut *mut c_void,
    ) -> u32;
    pub fn cuModuleUnload(module: Handle) -> u32;
    pub fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> u32;
    pub fn cuFuncGetAttribute(value: *mut c_int, attribute: u32, function: Handle) -> u32;
    pub fn cuFuncSetAttribute(function: Handle, attribute: u32, value: c_int) -> u32;
    pub fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        function: Handle,
        block_threads: c_int,
        dynamic_shared_bytes: usize,
    ) -> u32;
    pub fn cuOccupancyMaxPotentialClusterSize(
        blocks: *mut c_int,
        function: Handle,
        config: *const LaunchConfig,
    ) -> u32;
    pub fn cuLaunchKernel(
        function: Handle,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared_bytes: u32,
        stream: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> u32;
    pub fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> u32;
}

/// 0 as success, anything else as the number it is.
pub fn number(code: u32) -> Result<(), u32> {
    if code == 0 { Ok(()) } else { Err(code) }
}

/// 0 as success, anything else with its name and the call that answered it.
pub fn check(call: &'static str, code: u32) -> Result<(), DriverError> {
    if code == 0 { Ok(()) } else { Err(DriverError { code, name: name_of(code), call }) }
}

/// The driver's name of a code, such as "CUDA_ERROR_OUT_OF_MEMORY".
pub fn name_of(code: u32) -> &'static str {
    let mut text: *const c_char = core::ptr::null();
    // SAFETY: writes one pointer, to a C string that lives as long as the driver, which is never closed.
    unsafe {
        if cuGetErrorName(code, &raw mut text) != 0 || text.is_null() {
            return "unknown";
        }
        CStr::from_ptr::<'static>(text).to_str().unwrap_or("unknown")
    }
}
