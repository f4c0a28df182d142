//! The CUDA backend on a driver that misbehaves: too old, without a device, out of memory at any call, failing at any
//! call, losing the context at any call. Typed errors, no panic, nothing left behind, and the next attempt succeeds.
//!
//! The driver is a C library of host memory (`driver.c`), built by the C compiler that Rust links with; the test runs
//! itself again with that library on the loader's path. Needs a kernel image, though nothing is computed.
#![cfg(all(feature = "cuda", target_os = "linux"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

mod scenario;

use std::path::PathBuf;
use std::process::{Command, Output};

const SOURCE: &str = include_str!("driver.c");

/// The folder of the fake driver; `None` after saying what is missing.
fn fake_driver() -> Option<PathBuf> {
    if let Err(reason) = attn_kernels::image::embedded() {
        println!("skipped: {reason}");
        return None;
    }
    // A folder a test: they run side by side.
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("test").replace("::", "-");
    let folder = std::env::temp_dir().join(format!("kv8-fake-driver-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let source = folder.join("driver.c");
    std::fs::write(&source, SOURCE).unwrap();
    let built = Command::new("cc")
        .args(["-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1", "-o"])
        .arg(folder.join("libcuda.so.1"))
        .arg(&source)
        .status();
    if built.is_ok_and(|status| status.success()) {
        return Some(folder);
    }
    println!("skipped: no C compiler here");
    None
}

/// Runs a test of `scenario` in a process of its own on the fake driver.
fn child(folder: &PathBuf, test: &str, settings: &[(&str, String)]) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", folder)
        .env("FAKE_TELL", "1")
        .env_remove("KV8_IMAGE_DIR")
        .envs(settings.iter().map(|(name, value)| (*name, value.as_str())))
        .output()
        .unwrap()
}

fn both(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The child passed, without a panic, and left nothing behind.
fn check(output: &Output, what: &str) -> String {
    let text = both(output);
    assert!(output.status.success() && text.contains("1 passed"), "{what}:\n{text}");
    assert!(!text.contains("panicked"), "{what}:\n{text}");
    let alive = "alive: 0 buffers, 0 bytes, 0 pinned, 0 streams, 0 events, 0 graphs, 0 modules, 0 contexts";
    assert!(text.contains(alive) || text.contains("answers 7"), "{what} leaks:\n{text}");
    text
}

/// Calls of the driver that one scenario makes.
fn num_calls(text: &str) -> u64 {
    let told = text.lines().find_map(|line| line.strip_prefix("fake driver: ")?.split_once(" calls"));
    told.and_then(|(number, _)| number.parse().ok()).expect("the driver tells on exit")
}

#[test]
fn every_call_may_fail() {
    let Some(folder) = fake_driver() else { return };
    let none = [("FAKE_FAIL_CALL", "0".to_owned())];
    let calls = num_calls(&check(&child(&folder, "scenario::once", &none), "no failure"));
    assert!(calls > 80, "{calls} calls");
    let mut met = std::collections::BTreeSet::new();
    for call in 1..=calls {
        for code in [1, 2, 719] {
            let settings = [("FAKE_FAIL_CALL", call.to_string()), ("FAKE_FAIL_CODE", code.to_string())];
            let test = if code == 719 { "scenario::until_lost" } else { "scenario::again_after_a_failure" };
            let text = check(&child(&folder, test, &settings), &format!("call {call} answers {code}"));
            let told =
                text.lines().find_map(|line| line.strip_prefix("fake driver: ")?.split_once(" answers"));
            met.extend(told.map(|(name, _)| name.to_owned()));
        }
    }
    println!("{calls} calls of {} symbols, each failed in three ways", met.len());
    let _ = std::fs::remove_dir_all(folder);
}

#[test]
fn a_machine_that_does_not_fit_is_named() {
    let Some(folder) = fake_driver() else { return };
    for (settings, expected) in [
        (vec![("FAKE_VERSION", "11020")], "driver too old: it supports CUDA 11.2, the kernels need 13.0"),
        (
            vec![("FAKE_SM", "75")],
            "unsupported architecture: the device is sm_75, the kernels are built for sm_80",
        ),
        (vec![("FAKE_COUNT", "0")], "no device (driver code 100 from cuDeviceGetCount)"),
        (
            vec![("FAKE_FAIL_NAME", "cuInit"), ("FAKE_FAIL_CODE", "803")],
            "no device (driver code 803 from cuInit)",
        ),
        // Found only when the image is loaded.
        (
            vec![("FAKE_FAIL_NAME", "cuModuleLoadDataEx"), ("FAKE_FAIL_CODE", "209")],
            "unsupported architecture",
        ),
        (vec![("FAKE_FAIL_NAME", "cuModuleLoadDataEx"), ("FAKE_FAIL_CODE", "222")], "driver too old"),
        (vec![("FAKE_FAIL_NAME", "cuModuleLoadDataEx"), ("FAKE_FAIL_CODE", "218")], "kernel image refused"),
        (
            vec![("FAKE_FAIL_NAME", "cuModuleLoadDataEx"), ("FAKE_FAIL_CODE", "2")],
            "bytes of device memory were asked for",
        ),
        (vec![("FAKE_BYTES", "10000")], "bytes of device memory were asked for"),
    ] {
        let settings: Vec<(&str, String)> =
            settings.into_iter().map(|(name, value)| (name, value.to_owned())).collect();
        let text = check(&child(&folder, "scenario::refused", &settings), &format!("{settings:?}"));
        let told = text.lines().find(|line| line.contains("refused: ")).unwrap_or_default();
        assert!(told.contains(expected), "{settings:?}: {told}");
    }
    let _ = std::fs::remove_dir_all(folder);
}

#[test]
fn nothing_is_left_of_100000_calls() {
    let Some(folder) = fake_driver() else { return };
    let text = check(&child(&folder, "scenario::many_calls", &[]), "100,000 calls");
    println!("{}", text.lines().filter(|line| line.contains("calls")).collect::<Vec<_>>().join("\n"));
    let _ = std::fs::remove_dir_all(folder);
}
