//! One stretch of device memory with every array of a call in it, and canaries before and after each. Where
//! `KV8_ALLOCATE_APART=1`, each array has memory of its own, exactly as long, and nothing is written to those that kernels
//! are to write: a sanitizer then sees every byte that is read past an end or before it was written.

use attn_kernels::DeviceView;
use attn_kernels::device::{CudaDevice, DeviceBuffer, DeviceError, PinnedBuffer, Stream};
use std::ops::Range;

/// Bytes of a canary.
const CANARY: usize = 1024;
/// What the kernels ask of the addresses of arrays; they get no more than that.
const ALIGN: usize = 16;
/// What memory holds that nobody may read before it is written: NaN in every float type, -1 in every integer.
pub const POISON: u8 = 0xff;

/// Who may write an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Nobody: it must come back as it went.
    Input,
    /// The kernels, over what it holds.
    Contents,
    /// The kernels, all of it.
    Output,
    /// The kernels, as much as they like.
    Scratch,
}

/// Where an array lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(Range<usize>);

/// Arrays between canaries. They are collected on the host, sent in one copy, and fetched in one copy.
pub struct Arena {
    device: CudaDevice,
    there: DeviceBuffer,
    /// One for each array, if they are apart.
    apart: Option<Vec<DeviceBuffer>>,
    up: PinnedBuffer,
    down: PinnedBuffer,
    parts: Vec<(&'static str, Range<usize>, Part)>,
    len: usize,
}

/// The byte of a canary at a place: a canary that moved is found too.
fn canary(at: usize) -> u8 {
    (at as u8).wrapping_mul(167) ^ 0x5a
}

impl Arena {
    /// An empty one.
    pub fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        Ok(Self {
            device: device.clone(),
            there: device.alloc(0)?,
            apart: std::env::var("KV8_ALLOCATE_APART").is_ok_and(|value| value == "1").then(Vec::new),
            up: device.alloc_pinned(0)?,
            down: device.alloc_pinned(0)?,
            parts: Vec::new(),
            len: 0,
        })
    }

    /// Forgets all arrays and makes room for others of so many bytes together.
    pub fn clear(&mut self, sizes: impl IntoIterator<Item = usize>) -> Result<(), DeviceError> {
        let bytes: usize =
            sizes.into_iter().map(|size| size + CANARY + 4 * ALIGN).sum::<usize>() + CANARY + 4 * ALIGN;
        if self.there.len_bytes() < bytes {
            let bytes = bytes.next_power_of_two();
            self.there = self.device.alloc(bytes)?;
            self.up = self.device.alloc_pinned(bytes)?;
            self.down = self.device.alloc_pinned(bytes)?;
        }
        self.parts.clear();
        self.apart.iter_mut().for_each(Vec::clear);
        self.len = 0;
        self.guard();
        Ok(())
    }

    /// A canary of at least [`CANARY`] bytes, up to an odd multiple of [`ALIGN`].
    fn guard(&mut self) {
        let end = (self.len + CANARY).next_multiple_of(2 * ALIGN) + ALIGN;
        let bytes = &mut self.up.bytes_mut()[self.len..end];
        bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = canary(self.len + i));
        self.len = end;
    }

    fn place(&mut self, name: &'static str, len: usize, part: Part) -> (Place, &mut [u8]) {
        let range = self.len..self.len + len;
        self.parts.push((name, range.clone(), part));
        self.len = range.end;
        self.guard();
        (Place(range.clone()), &mut self.up.bytes_mut()[range])
    }

    /// An array that nobody may write.
    pub fn input(&mut self, name: &'static str, bytes: &[u8]) -> Place {
        let (place, to) = self.place(name, bytes.len(), Part::Input);
        to.copy_from_slice(bytes);
        place
    }

    /// An array that is to be written in parts; its bytes are [`Self::collected`] before it is sent.
    pub fn contents(&mut self, name: &'static str, len: usize) -> Place {
        self.place(name, len, Part::Contents).0
    }

    /// An array that is to be written, full of poison.
    pub fn output(&mut self, name: &'static str, len: usize) -> Place {
        let (place, to) = self.place(name, len, Part::Output);
        to.fill(POISON);
        place
    }

    /// Workspace, full of poison; it is not fetched where arrays are apart.
    pub fn scratch(&mut self, name: &'static str, len: usize) -> Place {
        let (place, to) = self.place(name, len, Part::Scratch);
        to.fill(POISON);
        place
    }

    /// What was collected of an array, for changing it before it is sent.
    pub fn collected(&mut self, place: &Place) -> &mut [u8] {
        &mut self.up.bytes_mut()[place.0.clone()]
    }

    /// Queues the copy of all arrays and canaries.
    pub fn send(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        if let Some(apart) = &mut self.apart {
            for (index, (_, range, part)) in self.parts.iter().enumerate() {
                if apart.len() == index {
                    apart.push(self.device.alloc(range.len())?);
                }
                if matches!(part, Part::Input | Part::Contents) {
                    apart[index].write_async(0, &self.up, range.start, range.len(), stream)?;
                }
            }
            return Ok(());
        }
        self.there.write_async(0, &self.up, 0, self.len, stream)
    }

    /// Where an array is on the device.
    pub fn view(&self, place: &Place) -> DeviceView {
        if let Some(apart) = &self.apart {
            let index = self.parts.iter().position(|(_, range, _)| *range == place.0);
            return apart[index.expect("the arena's own place")].view();
        }
        let view = self.there.view();
        view.slice(place.0.start as u64, place.0.len() as u64).expect("places lie in the arena")
    }

    /// Waits for the stream, fetches everything and looks at the canaries and at the arrays that nobody may write.
    ///
    /// # Errors
    /// The driver's, in words, or which byte was written.
    pub fn fetch(&mut self, stream: &Stream) -> Result<(), String> {
        if let Some(apart) = &self.apart {
            for (buffer, (_, range, _)) in apart
                .iter()
                .zip(&self.parts)
                .filter(|(_, (_, _, part))| matches!(part, Part::Contents | Part::Output))
            {
                buffer
                    .read_async(0, &mut self.down, range.start, range.len(), stream)
                    .map_err(|error| error.to_string())?;
            }
            return stream.synchronize().map_err(|error| error.to_string());
        }
        self.there.read_async(0, &mut self.down, 0, self.len, stream).map_err(|error| error.to_string())?;
        stream.synchronize().map_err(|error| error.to_string())?;
        let (sent, got) = (&self.up.bytes()[..self.len], &self.down.bytes()[..self.len]);
        let mut before = 0;
        let same = |what: &str, range: Range<usize>| {
            if sent[range.clone()] == got[range.clone()] {
                return Ok(());
            }
            let at = range.clone().find(|&at| sent[at] != got[at]).unwrap_or(range.start);
            Err(format!(
                "byte {} of {what} was written: {:#04x}, was {:#04x}",
                at - range.start,
                got[at],
                sent[at]
            ))
        };
        for (name, range, part) in &self.parts {
            same(&format!("the canary before {name}"), before..range.start)?;
            if *part == Part::Input {
                same(name, range.clone())?;
            }
            before = range.end;
        }
        same("the last canary", before..self.len)
    }

    /// An array as it was last fetched.
    pub fn fetched(&self, place: &Place) -> &[u8] {
        &self.down.bytes()[place.0.clone()]
    }

    /// Takes what was fetched of arrays with contents as what they hold from now on.
    pub fn keep(&mut self) {
        for (_, range, part) in &self.parts {
            if *part == Part::Contents {
                self.up.bytes_mut()[range.clone()].copy_from_slice(&self.down.bytes()[range.clone()]);
            }
        }
    }
}
