//! Calls reach a driver with all their arguments, on the slow and on the fast path.
//!
//! The driver here is a small C library, built by the C compiler that Rust links with; the test runs itself again
//! with that library first on the loader's path.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#![allow(clippy::expect_used, clippy::print_stdout, reason = "tests")]

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use cuda_shim as _;

const SOURCE: &str = r"
#include <stddef.h>
#include <stdint.h>
int cuInit(unsigned flags) { return flags == 77 ? 1077 : 0; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned smem, void* stream, void** params, void** extra) {
    uintptr_t ok = (uintptr_t)f == 1 && gx == 2 && gy == 3 && gz == 4 && bx == 5 && by == 6 && bz == 7 && smem == 8
        && (uintptr_t)stream == 9 && (uintptr_t)params == 10 && (uintptr_t)extra == 11;
    return ok ? 1234 : 4321;
}
int cuTexRefSetMipmapLevelClamp(void* ref, float low, float high) { return low == 0.25f && high == 8.5f ? 55 : 66; }
";

unsafe extern "C" {
    fn cuInit(flags: u32) -> u32;
    #[allow(clippy::too_many_arguments)]
    fn cuLaunchKernel(
        f: *mut c_void,
        gx: u32,
        gy: u32,
        gz: u32,
        bx: u32,
        by: u32,
        bz: u32,
        smem: u32,
        stream: *mut c_void,
        params: *mut c_void,
        extra: *mut c_void,
    ) -> u32;
    fn cuTexRefSetMipmapLevelClamp(reference: *mut c_void, low: f32, high: f32) -> u32;
    fn cuCtxSynchronize() -> u32;
}

#[test]
fn calls_are_forwarded_to_a_driver() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-driver");
    let source = folder.join("fake.c");
    if std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&source, SOURCE)).is_err() {
        println!("skipped: {} is not writable here", folder.display());
        return;
    }
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"])
        .arg(folder.join("libcuda.so.1"))
        .arg(&source)
        .status();
    if !built.is_ok_and(|status| status.success()) {
        println!("skipped: no C compiler here");
        return;
    }
    let output = Command::new(std::env::current_exe().expect("the test has a path"))
        .args(["--exact", "child_with_fake_driver", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", &folder)
        .output()
        .expect("the test can run itself");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "run by calls_are_forwarded_to_a_driver with a fake driver on the path"]
fn child_with_fake_driver() {
    let pointer = |value: usize| std::ptr::without_provenance_mut::<c_void>(value);
    // SAFETY: the fake driver compares its arguments and dereferences none of them.
    unsafe {
        for _ in 0..2 {
            assert_eq!(cuInit(77), 1077);
            let code = cuLaunchKernel(pointer(1), 2, 3, 4, 5, 6, 7, 8, pointer(9), pointer(10), pointer(11));
            assert_eq!(code, 1234);
            assert_eq!(cuTexRefSetMipmapLevelClamp(pointer(1), 0.25, 8.5), 55);
            assert_eq!(cuCtxSynchronize(), 500, "a symbol that this driver lacks");
        }
    }
}
