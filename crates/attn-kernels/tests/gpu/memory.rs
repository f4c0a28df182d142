//! Memory, copies, streams, events and graphs.

use attn_kernels::device::{CudaDevice, DeviceError, Event, Graph, Stream};

use crate::device;

#[test]
fn bytes_come_back_as_they_went() {
    let Some(device) = device() else { return };
    let values: Vec<u32> = (0..10_000).collect();
    let buffer = device.upload(&values).unwrap();
    let mut back = vec![0_u32; values.len()];
    buffer.read(0, &mut back).unwrap();
    assert_eq!(values, back);
    let mut tail = [0_u32; 3];
    buffer.read(4 * 9_997, &mut tail).unwrap();
    assert_eq!(tail, [9_997, 9_998, 9_999]);
    let error = buffer.read(4 * 9_998, &mut tail).unwrap_err();
    assert!(
        matches!(error, DeviceError::OutOfBounds { offset: 39_992, len: 12, buffer_bytes: 40_000 }),
        "{error}"
    );
}

#[test]
fn copies_follow_their_stream() {
    let Some(device) = device() else { return };
    let stream = Stream::new(&device).unwrap();
    let mut pinned = device.alloc_pinned(1 << 20).unwrap();
    for (idx, byte) in pinned.bytes_mut().iter_mut().enumerate() {
        *byte = (idx % 251) as u8;
    }
    let mut back = device.alloc_pinned(1 << 20).unwrap();
    let buffer = device.alloc(1 << 20).unwrap();
    let (start, end) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
    start.record(&stream).unwrap();
    buffer.write_async(0, &pinned, 0, 1 << 20, &stream).unwrap();
    buffer.read_async(0, &mut back, 0, 1 << 20, &stream).unwrap();
    end.record(&stream).unwrap();
    end.synchronize().unwrap();
    assert_eq!(pinned.bytes(), back.bytes());
    assert!(end.microseconds_since(&start).unwrap() > 0.0);
}

#[test]
fn a_graph_replays_what_was_captured() {
    let Some(device) = device() else { return };
    let stream = Stream::new(&device).unwrap();
    let buffer = device.alloc_zeroed(64).unwrap();
    let graph = Graph::capture(&stream, |stream| buffer.fill(7, stream)).unwrap();
    let mut bytes = [1_u8; 64];
    buffer.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 64], "capturing runs nothing");
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    buffer.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 64]);
}

#[test]
fn too_much_memory_is_refused_with_numbers_and_the_device_goes_on() {
    let Some(device) = device() else { return };
    let total = usize::try_from(device.facts().memory_bytes).unwrap();
    match device.alloc(total + (1 << 30)).unwrap_err() {
        DeviceError::OutOfMemory { requested_bytes, free_bytes, total_bytes, .. } => {
            assert_eq!(requested_bytes, total + (1 << 30));
            assert!(free_bytes > 0 && free_bytes <= total_bytes);
        }
        other => panic!("{other}"),
    }
    assert!(device.poisoned().is_none());
    device.upload(&[1_u8, 2, 3]).unwrap();
}

#[test]
fn nothing_leaks_in_many_calls() {
    let Some(device) = device() else { return };
    let warm = |device: &CudaDevice| {
        let stream = Stream::new(device).unwrap();
        let buffer = device.alloc_zeroed(1 << 20).unwrap();
        Graph::capture(&stream, |stream| buffer.fill(1, stream)).unwrap().launch(&stream).unwrap();
        stream.synchronize().unwrap();
    };
    warm(&device);
    let (free, _) = device.memory_info().unwrap();
    for _ in 0..2_000 {
        warm(&device);
    }
    let (free_after, _) = device.memory_info().unwrap();
    assert!(free_after + (64 << 20) > free, "{free} bytes were free, now {free_after}");
}

#[test]
fn contexts_are_given_back_as_they_were() {
    let Some(device) = device() else { return };
    std::thread::spawn(move || {
        // A fresh thread has no current context; ours must not stay behind, and must be found again by itself.
        let buffer = device.upload(&[5_u8; 16]).unwrap();
        let mut bytes = [0_u8; 16];
        buffer.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [5; 16]);
        let again = CudaDevice::open(0).unwrap();
        assert_eq!(again.raw_context(), device.raw_context(), "the primary context is one");
    })
    .join()
    .unwrap();
}
