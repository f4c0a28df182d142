//! The device side on a real GPU. Without one each test prints why it is skipped; `KV8_REQUIRE_GPU=1` makes that a failure.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod append_decode;
mod memory;
mod poison;

use std::io::Write as _;

use attn_kernels::device::{CudaDevice, Kernels};

/// The first device, or `None` after saying why not.
pub fn device() -> Option<CudaDevice> {
    match CudaDevice::open(0) {
        Ok(device) => Some(device),
        Err(reason) => skip(&reason),
    }
}

/// The first device and the embedded kernels, or `None` after saying what is missing.
pub fn kernels() -> Option<Kernels> {
    match Kernels::embedded(&device()?) {
        Ok(kernels) => Some(kernels),
        Err(reason) => skip(&reason),
    }
}

fn skip<T>(reason: &dyn std::fmt::Display) -> Option<T> {
    let required = std::env::var("KV8_REQUIRE_GPU").is_ok_and(|value| value != "0" && !value.is_empty());
    assert!(!required, "KV8_REQUIRE_GPU is set, but: {reason}");
    // Straight to the stream: the harness keeps what passing tests print.
    let _ = std::io::stderr().write_all(format!("skipped: {reason}\n").as_bytes());
    None
}
