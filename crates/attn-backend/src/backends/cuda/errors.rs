//! What the device side answers, in this crate's words.

use crate::{BackendId, Error, Refusal};
use attn_kernels::abi::ErrorKind;
use attn_kernels::device::{DeviceError, DeviceReport, DriverError};
use kv_quant::{CacheLayout, Side};

/// The driver's code for memory that has run out.
const OUT_OF_MEMORY: u32 = 2;

/// The same errors for data as a host backend gives, and the driver's own words for the rest.
pub(super) fn of_device(error: DeviceError, layout: &CacheLayout) -> Error {
    let device = |what: String, is_lost| Error::Device { backend: BackendId::CUDA, what, is_lost };
    match error {
        DeviceError::OutOfMemory { kind: "device", requested_bytes, free_bytes, .. } => {
            Error::DeviceOutOfMemory { requested: requested_bytes as u64, free: free_bytes as u64 }
        }
        DeviceError::OutOfMemory { requested_bytes, .. } => {
            Error::OutOfMemory { what: "pinned staging", bytes: requested_bytes as u64 }
        }
        DeviceError::Unavailable(reason) => Error::Refused {
            backend: BackendId::CUDA,
            refusal: Refusal::Unavailable { reason: reason.to_string() },
        },
        DeviceError::Image(reason) => Error::Refused {
            backend: BackendId::CUDA,
            refusal: Refusal::Unavailable { reason: reason.to_string() },
        },
        DeviceError::Reported(report) => of_report(&report, layout),
        // Some calls need memory of their own; the driver does not say how much.
        DeviceError::Driver(DriverError { code: OUT_OF_MEMORY, .. }) => {
            Error::DeviceOutOfMemory { requested: 0, free: 0 }
        }
        DeviceError::ContextPoisoned { .. } => device(error.to_string(), true),
        DeviceError::Driver(ref driver) => device(error.to_string(), driver.is_sticky()),
        _ => device(error.to_string(), false),
    }
}

fn of_report(report: &DeviceReport, layout: &CacheLayout) -> Error {
    let record = report.record;
    let (token, head, channel) = (record.request_idx as usize, record.head_idx, record.channel);
    let side = if record.plane == 0 { Side::K } else { Side::V };
    match report.kind {
        Some(ErrorKind::NonFinite) => kv_quant::Error::NonFinite { side, token, head, channel }.into(),
        Some(ErrorKind::SlotOutOfRange) => {
            kv_quant::Error::SlotOutOfRange { token, slot: record.value, num_slots: layout.num_slots() }
                .into()
        }
        Some(ErrorKind::PageOutOfRange) => attn_plan::Error::PageOutOfRange {
            request: token,
            position: u64::from(channel / layout.page_len()),
            page: record.value as i32,
            num_pages: layout.num_pages(),
        }
        .into(),
        Some(ErrorKind::ScaleOverflow) => kv_quant::Error::ScaleOverflow {
            side,
            token,
            head,
            channel,
            // The device does not say how far beyond the type it was.
            scale: f32::INFINITY,
            scale_type: layout.format().scale_type(),
        }
        .into(),
        None => Error::Device { backend: BackendId::CUDA, what: report.to_string(), is_lost: false },
    }
}
