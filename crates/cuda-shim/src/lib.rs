//! CUDA driver symbols that are resolved on first use.
//!
//! `cust` (like any binding of the driver) asks the linker for `cuInit` and its siblings. With the usual `-lcuda`
//! a program needs the toolkit to link and a driver to start at all. This crate defines the symbols itself:
//! each is a few instructions that jump to the driver's function once `libcuda.so.1` has been opened.
//! A binary therefore links on a machine with neither toolkit nor driver, and starts on both kinds of machine.
//!
//! What a call answers:
//!
//! * with a driver that has the symbol: the driver's own answer, arguments and result untouched;
//! * without a driver: 100 (`CUDA_ERROR_NO_DEVICE`); `cuGetErrorString` and `cuGetErrorName` give a static text and 0,
//!   because callers print what they point at;
//! * with a driver too old to have the symbol: 500 (`CUDA_ERROR_NOT_FOUND`).
//!
//! The symbols are hidden: they do not appear in the executable's dynamic table, so a `libcuda` loaded later by
//! somebody else (cudarc, a Python extension) never binds to them.
//!
//! A crate that wants the symbols has to name this one (`use cuda_shim as _;`), or rustc does not link it.
//! Linux on x86-64 has been run; Linux on aarch64 is written after the same calling rules but has not been run.
//! Elsewhere the crate is empty and the toolkit's own library is linked as usual.

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod resolve;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod symbols;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod trampoline;

/// Opens the driver library if that has not been tried yet, and says why it could not be opened.
///
/// # Errors
/// The loader's own text, such as "libcuda.so.1: cannot open shared object file: No such file or directory".
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn load_driver() -> Result<(), &'static str> {
    resolve::driver().map(|_| ())
}

/// Here the toolkit's own library is linked, so a process that runs has the driver.
///
/// # Errors
/// None on this platform.
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub fn load_driver() -> Result<(), &'static str> {
    Ok(())
}

/// How many driver symbols this crate defines; 0 where the toolkit's library is linked instead.
#[must_use]
pub fn num_symbols() -> usize {
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    return trampoline::NAMES.len();
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    return 0;
}
