//! The probe says what is missing, as a type; nothing panics on a machine without CUDA.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use attn_kernels::probe::{Unavailable, num_devices, probe};

#[test]
#[cfg(not(feature = "cuda"))]
fn without_the_feature_the_reason_is_the_build() {
    assert_eq!(probe(0), Err(Unavailable::NotCompiled));
    assert_eq!(num_devices(), Err(Unavailable::NotCompiled));
}

#[test]
#[cfg(feature = "cuda")]
fn the_probe_answers_facts_or_a_reason() {
    match probe(0) {
        Ok(facts) => {
            println!("{facts:?}");
            assert!(facts.sm >= 80 && facts.num_sms > 0 && facts.memory_bytes > 0);
            let count = num_devices().unwrap();
            assert_eq!(probe(count), Err(Unavailable::NoSuchDevice { ordinal: count, count }));
        }
        Err(Unavailable::NoDriver { reason }) => {
            assert!(reason.contains("libcuda"), "{reason}");
            let text = Unavailable::NoDriver { reason }.to_string();
            assert!(text.starts_with("no driver: "), "{text}");
            assert!(num_devices().is_err());
        }
        Err(other) => println!("{other}"),
    }
}

#[test]
#[cfg(feature = "cuda")]
fn opening_without_a_driver_is_the_same_reason() {
    use attn_kernels::device::{CudaDevice, DeviceError};

    if let Err(reason) = probe(0) {
        let error = CudaDevice::open(0).map(drop).unwrap_err();
        assert!(matches!(&error, DeviceError::Unavailable(found) if *found == reason), "{error}");
    }
}

#[test]
#[cfg(feature = "cuda")]
fn a_missing_image_names_the_command() {
    use attn_kernels::image::embedded;

    match embedded() {
        Ok(image) => assert!(!image.units.is_empty() && image.manifest.contains("source_hash")),
        Err(error) => assert!(error.to_string().contains("cargo xtask kernels"), "{error}"),
    }
}
