//! Staging between host slices and the device: pinned memory, packed, one copy a call.

use attn_kernels::DeviceView;
use attn_kernels::device::{CudaDevice, DeviceBuffer, DeviceError, Event, PinnedBuffer, Stream};

/// Arrays start at multiples of this in a packed upload: the widest load of a kernel.
const ALIGN: usize = 16;
/// How many uploads can be on their way before the host waits for the oldest.
const RING: usize = 3;

/// Arrays on their way to the device.
pub(super) struct Upload {
    device: CudaDevice,
    target: DeviceBuffer,
    ring: Vec<Slot>,
    turn: usize,
    len: usize,
}

struct Slot {
    pinned: PinnedBuffer,
    copied: Event,
}

impl Upload {
    pub(super) fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        let slot = || Ok(Slot { pinned: device.alloc_pinned(0)?, copied: Event::new(device)? });
        let ring = (0..RING).map(|_| slot()).collect::<Result<_, DeviceError>>()?;
        Ok(Self { device: device.clone(), target: device.alloc(0)?, ring, turn: 0, len: 0 })
    }

    /// Starts a packed upload of arrays of these lengths in bytes. Waits only if the slot's earlier copy is under way.
    pub(super) fn begin(&mut self, lens: &[usize], stream: &Stream) -> Result<(), DeviceError> {
        let bytes: usize = lens.iter().map(|len| len.next_multiple_of(ALIGN)).sum();
        self.turn = (self.turn + 1) % RING;
        self.len = 0;
        if self.target.len_bytes() < bytes {
            stream.synchronize()?;
            self.target = self.device.alloc(bytes.next_power_of_two())?;
        }
        let Some(slot) = self.ring.get_mut(self.turn) else { return Ok(()) };
        slot.copied.synchronize()?;
        if slot.pinned.bytes().len() < bytes {
            slot.pinned = self.device.alloc_pinned(bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// Packs the next array and says where on the device it will be.
    pub(super) fn put(&mut self, bytes: &[u8]) -> DeviceView {
        self.put_with(bytes.len(), |to| to.copy_from_slice(bytes))
    }

    /// As [`Self::put`], for an array that is written in place.
    pub(super) fn put_with(&mut self, len: usize, write: impl FnOnce(&mut [u8])) -> DeviceView {
        let range = self.len..self.len + len;
        let view = self.target.view();
        let slot = self.ring.get_mut(self.turn);
        if let Some(to) = slot.and_then(|slot| slot.pinned.bytes_mut().get_mut(range.clone())) {
            write(to);
        }
        self.len = range.end.next_multiple_of(ALIGN);
        // `begin` made room for all arrays; a view that does not fit is empty and refused by the launch.
        view.slice(range.start as u64, len as u64).or_else(|| view.slice(0, 0)).unwrap_or(view)
    }

    /// Queues the copy.
    pub(super) fn send(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        let Some(slot) = self.ring.get(self.turn) else { return Ok(()) };
        self.target.write_async(0, &slot.pinned, 0, self.len.min(slot.pinned.bytes().len()), stream)?;
        slot.copied.record(stream)
    }
}

/// Device memory that only grows.
pub(super) struct Grow {
    device: CudaDevice,
    buffer: DeviceBuffer,
}

impl Grow {
    pub(super) fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        Ok(Self { device: device.clone(), buffer: device.alloc(0)? })
    }

    pub(super) fn at_least(&mut self, bytes: usize, stream: &Stream) -> Result<(), DeviceError> {
        if self.buffer.len_bytes() < bytes {
            stream.synchronize()?;
            self.buffer = self.device.alloc(bytes.next_power_of_two())?;
        }
        Ok(())
    }

    pub(super) fn view(&self) -> DeviceView {
        self.buffer.view()
    }
}

/// An output on its way to the host.
pub(super) struct Download {
    device: CudaDevice,
    source: DeviceBuffer,
    pinned: PinnedBuffer,
}

impl Download {
    pub(super) fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        Ok(Self { device: device.clone(), source: device.alloc(0)?, pinned: device.alloc_pinned(0)? })
    }

    /// Makes room; the kernel writes to the view.
    pub(super) fn begin(&mut self, bytes: usize, stream: &Stream) -> Result<DeviceView, DeviceError> {
        if self.source.len_bytes() < bytes {
            stream.synchronize()?;
            self.source = self.device.alloc(bytes.next_power_of_two())?;
            self.pinned = self.device.alloc_pinned(bytes.next_power_of_two())?;
        }
        Ok(self.source.view())
    }

    /// Queues the copy.
    pub(super) fn queue(&mut self, bytes: usize, stream: &Stream) -> Result<(), DeviceError> {
        self.source.read_async(0, &mut self.pinned, 0, bytes, stream)
    }

    /// The bytes, once the stream has been waited for.
    pub(super) fn bytes(&self, len: usize) -> &[u8] {
        self.pinned.bytes().get(..len).unwrap_or(&[])
    }
}
