//! Opening the driver library and looking up one symbol of it.

use core::ffi::{CStr, c_char, c_void};
use core::sync::atomic::{AtomicPtr, Ordering};
use std::sync::OnceLock;

/// The soname that NVIDIA's driver packages install; `libcuda.so` without a version exists only beside a toolkit.
const LIBRARY: &CStr = c"libcuda.so.1";

const CUDA_ERROR_NO_DEVICE: u32 = 100;
const CUDA_ERROR_NOT_FOUND: u32 = 500;

/// One symbol: the address to jump to (null until the first call) and the name to look up.
/// The trampoline reads `target` at offset 0.
#[repr(C)]
pub struct Slot {
    target: AtomicPtr<c_void>,
    name: &'static CStr,
}

impl Slot {
    pub const fn new(name: &'static CStr) -> Self {
        Self { target: AtomicPtr::new(core::ptr::null_mut()), name }
    }
}

struct Driver(*mut c_void);

// SAFETY: the handle is only ever given to `dlsym`, which is thread-safe, and it is never closed.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// The handle of the driver library, opened once; a failure is remembered as the loader's text.
pub fn driver() -> Result<*mut c_void, &'static str> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    let opened = DRIVER.get_or_init(|| {
        // SAFETY: the name is a C string; the library's constructors are the driver's and run at most once.
        let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(loader_error()) } else { Ok(Driver(handle)) }
    });
    match opened {
        Ok(driver) => Ok(driver.0),
        Err(text) => Err(text),
    }
}

fn loader_error() -> String {
    // SAFETY: `dlerror` returns null or a C string of this thread that lives until its next dl call.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "libcuda.so.1 could not be opened".to_owned()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

/// Called by the trampolines' slow path: finds the target of a slot, stores it and returns it.
///
/// Two threads may both get here for one slot; they find the same address, so the second store changes nothing.
pub extern "C" fn resolve_slot(slot: &'static Slot) -> *const c_void {
    let target = match driver() {
        Err(_) => without_driver(slot.name),
        Ok(handle) => {
            // SAFETY: the handle is open for the life of the process and the name is a C string.
            let found = unsafe { libc::dlsym(handle, slot.name.as_ptr()) };
            if found.is_null() { answer_not_found as *const c_void } else { found.cast_const() }
        }
    };
    slot.target.store(target.cast_mut(), Ordering::Release);
    target
}

fn without_driver(name: &CStr) -> *const c_void {
    match name.to_bytes() {
        b"cuGetErrorString" => answer_error_string as *const c_void,
        b"cuGetErrorName" => answer_error_name as *const c_void,
        _ => answer_no_device as *const c_void,
    }
}

// The stand-ins ignore their arguments: under both calling conventions the caller owns the argument registers and
// stack, so a callee that takes fewer of them is harmless. None of the driver's functions is variadic.

extern "C" fn answer_no_device() -> u32 {
    CUDA_ERROR_NO_DEVICE
}

extern "C" fn answer_not_found() -> u32 {
    CUDA_ERROR_NOT_FOUND
}

unsafe extern "C" fn answer_error_string(_code: u32, text: *mut *const c_char) -> u32 {
    // SAFETY: the caller passes the address of a pointer, as `cuGetErrorString` demands.
    unsafe { answer_text(text, c"no CUDA driver on this machine (libcuda.so.1 could not be opened)") }
}

unsafe extern "C" fn answer_error_name(code: u32, text: *mut *const c_char) -> u32 {
    let name = if code == CUDA_ERROR_NO_DEVICE { c"CUDA_ERROR_NO_DEVICE" } else { c"CUDA_ERROR (no driver)" };
    // SAFETY: the caller passes the address of a pointer, as `cuGetErrorName` demands.
    unsafe { answer_text(text, name) }
}

unsafe fn answer_text(out: *mut *const c_char, text: &'static CStr) -> u32 {
    if !out.is_null() {
        // SAFETY: not null, and the caller promised that it points to a pointer.
        unsafe { out.write(text.as_ptr()) };
    }
    0
}
