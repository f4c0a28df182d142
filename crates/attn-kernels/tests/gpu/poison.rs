//! A lost context: later calls fail fast with a typed error, and nothing panics. It is lost for the process, so a child
//! process does the damage.

use std::process::Command;

use attn_kernels::abi::StreamParams;
use attn_kernels::device::{DeviceError, LaunchShape, Order, Stream};

use crate::{device, kernels};

#[test]
fn a_lost_context_fails_fast() {
    if kernels().is_none() {
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "poison::child_loses_its_context", "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
}

#[test]
#[ignore = "run by a_lost_context_fails_fast in a process of its own"]
fn child_loses_its_context() {
    let kernels = kernels().unwrap();
    let device = device().unwrap();
    let stream = Stream::new(&device).unwrap();
    let buffer = device.alloc_zeroed(64).unwrap();
    let copy = kernels.get("kv8_stream_copy").unwrap();
    // An address that nobody has.
    let params = StreamParams { src: 1 << 50, dst: 1 << 51, num_vectors: 1 << 20 };
    let shape =
        LaunchShape { grid: [1, 1, 1], block: [512, 1], shared_bytes: 0, cluster: 1, balances: false };
    // SAFETY: not at all, which is the point; the fault stays on the device, and this process ends.
    unsafe { copy.launch(shape, &params, Order::AfterPrevious, &stream) }.unwrap();
    let first = stream.synchronize().unwrap_err();
    assert!(matches!(first, DeviceError::Driver(error) if error.is_sticky()), "{first}");
    for error in [
        stream.synchronize().unwrap_err(),
        device.alloc(64).unwrap_err(),
        buffer.write(0, &[1_u8]).unwrap_err(),
        attn_kernels::device::CudaDevice::open(0).map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, DeviceError::ContextPoisoned { .. }), "{error}");
    }
    assert!(device.poisoned().is_some());
}
