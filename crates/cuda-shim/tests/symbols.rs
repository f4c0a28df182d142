//! The symbols link, answer without a driver, and carry every kind of argument through the first (slow) call.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#![allow(clippy::expect_used, clippy::print_stdout, reason = "tests")]

use std::ffi::{CStr, c_char, c_int};
use std::sync::Barrier;

use cuda_shim as _;

unsafe extern "C" {
    fn cuInit(flags: u32) -> u32;
    fn cuDeviceGetCount(count: *mut c_int) -> u32;
    fn cuDriverGetVersion(version: *mut c_int) -> u32;
    fn cuGetErrorString(code: u32, text: *mut *const c_char) -> u32;
    fn cuGetErrorName(code: u32, text: *mut *const c_char) -> u32;
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32;
    // Declared with no arguments: only its answer without a driver is looked at.
    fn cuLaunchKernelEx() -> u32;
}

fn has_driver() -> bool {
    cuda_shim::load_driver().is_ok()
}

#[test]
fn every_call_says_no_device_without_a_driver() {
    if has_driver() {
        println!("skipped: this machine has a driver");
        return;
    }
    let text = cuda_shim::load_driver().expect_err("has_driver said so");
    assert!(text.contains("libcuda"), "{text}");
    let mut count: c_int = -7;
    // SAFETY: the shim answers these itself and writes nothing.
    unsafe {
        for _ in 0..2 {
            assert_eq!(cuInit(0), 100);
            assert_eq!(cuDeviceGetCount(&raw mut count), 100);
            assert_eq!(cuDriverGetVersion(&raw mut count), 100);
            assert_eq!(cuMemGetInfo_v2(std::ptr::null_mut(), std::ptr::null_mut()), 100);
            assert_eq!(cuLaunchKernelEx(), 100);
        }
    }
    assert_eq!(count, -7);
}

#[test]
fn error_texts_are_there_with_and_without_a_driver() {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: `text` is a place for one pointer; what it is set to is a static C string.
    let (string, name) = unsafe {
        assert_eq!(cuGetErrorString(100, &raw mut text), 0);
        let string = CStr::from_ptr(text).to_str().expect("ASCII");
        assert_eq!(cuGetErrorName(100, &raw mut text), 0);
        (string, CStr::from_ptr(text).to_str().expect("ASCII"))
    };
    assert!(!string.is_empty());
    assert_eq!(name, "CUDA_ERROR_NO_DEVICE");
}

#[test]
fn first_calls_from_many_threads_agree() {
    let barrier = Barrier::new(8);
    let codes: Vec<u32> = std::thread::scope(|scope| {
        let call = || {
            barrier.wait();
            let mut version = 0;
            // SAFETY: writes one integer, or answers 100.
            unsafe { cuDriverGetVersion(&raw mut version) }
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(call)).collect();
        threads.into_iter().map(|thread| thread.join().expect("the call does not panic")).collect()
    });
    assert!(codes.iter().all(|code| *code == codes[0]), "{codes:?}");
}

#[test]
fn symbol_list_is_sorted_and_complete() {
    assert!(cuda_shim::num_symbols() >= 353, "cust_raw alone declares 353");
}
