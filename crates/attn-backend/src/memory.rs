//! Where inputs, outputs and caches lie: in host slices, or on a backend's device.
//!
//! Device addresses are plain numbers here. This crate has no unsafe code and cannot vouch for one, so the types that hold
//! an address are made from [`DeviceView`]s only, whose constructor carries the promise.

use attn_kernels::DeviceView;
use kv_quant::{CacheView, CacheViewMut, FloatSlice, FloatSliceMut, FloatType};
use std::any::Any;
use std::sync::Arc;

/// Elements in device memory: a view and their type. Plain data that keeps nothing alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSlice {
    view: DeviceView,
    float_type: FloatType,
}

impl DeviceSlice {
    /// The elements that fit in the view.
    pub fn new(view: DeviceView, float_type: FloatType) -> Self {
        Self { view, float_type }
    }

    /// The bytes.
    pub fn view(&self) -> DeviceView {
        self.view
    }

    /// Device address of the first element.
    pub fn address(&self) -> u64 {
        self.view.address()
    }

    /// Number of elements.
    pub fn len(&self) -> u64 {
        self.view.len_bytes() / self.float_type.bytes() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn float_type(&self) -> FloatType {
        self.float_type
    }
}

/// An input array: q, k or v.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Host memory. The call returns when it has been read.
    Host(FloatSlice<'a>),
    /// Device memory of the session's device. The call queues its work and does not wait.
    Device(DeviceSlice),
}

impl Input<'_> {
    /// The device slice, if it is one.
    pub fn device(&self) -> Option<&DeviceSlice> {
        match self {
            Input::Host(_) => None,
            Input::Device(slice) => Some(slice),
        }
    }

    /// Element type.
    pub fn float_type(&self) -> FloatType {
        match self {
            Input::Host(slice) => slice.float_type(),
            Input::Device(slice) => slice.float_type(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> u64 {
        match self {
            Input::Host(slice) => slice.len() as u64,
            Input::Device(slice) => slice.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An output array: out or lse.
#[derive(Debug)]
pub enum Output<'a> {
    /// Host memory. The call returns when it has been written.
    Host(FloatSliceMut<'a>),
    /// Device memory of the session's device. The call queues its work and does not wait.
    Device(DeviceSlice),
}

impl Output<'_> {
    /// The device slice, if it is one.
    pub fn device(&self) -> Option<&DeviceSlice> {
        match self {
            Output::Host(_) => None,
            Output::Device(slice) => Some(slice),
        }
    }

    /// Element type.
    pub fn float_type(&self) -> FloatType {
        match self {
            Output::Host(slice) => slice.float_type(),
            Output::Device(slice) => slice.float_type(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> u64 {
        match self {
            Output::Host(slice) => slice.len() as u64,
            Output::Device(slice) => slice.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The memory of a session's cache.
///
/// Decode in place over buffers that another program part owns, here LightLLM's:
///
/// ```
/// use attn_backend::{Descriptor, Memory, MemoryKind, Registry, SelectOptions, Session, SessionOptions, select};
/// # use attn_plan::DecodeSpec;
/// # use kv_quant::{CacheFormat, CacheLayout, CacheViewMut, ScaleType};
/// # let format = CacheFormat::new(2, 64, 8, 8, ScaleType::F16)?;
/// let layout = CacheLayout::lightllm(format, 100)?;
/// let (mut codes, mut scales) = (vec![0u8; 100 * 4 * 64], vec![0u8; 100 * 4 * 8 * 2]);
/// let view = CacheViewMut::new(&layout, vec![&mut codes, &mut scales])?;
///
/// let descriptor = Descriptor::new(layout, DecodeSpec::new(6, 2, 64)).with_memory(MemoryKind::Host);
/// let selection = select(&Registry::builtin(), &descriptor, &SelectOptions::default())?;
/// let options = SessionOptions { memory: Memory::Host(view), ..SessionOptions::default() };
/// let session = Session::open(&selection, options)?;
/// assert_eq!(session.backend().as_str(), "cpu");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
#[non_exhaustive]
pub enum Memory<'a> {
    /// The backend allocates it on its device, zeroed, and frees it with the session.
    #[default]
    Owned,
    /// The caller's host buffers, decoded in place and appended to (host backends), e.g. LightLLM's.
    Host(CacheViewMut<'a>),
    /// The caller's host buffers, decoded in place; append is refused.
    HostReadOnly(CacheView<'a>),
    /// The caller's device buffers, one for each of the layout's, for device backends.
    Device(Vec<DeviceView>),
}

impl Memory<'_> {
    /// What a capability calls it.
    pub fn kind(&self) -> MemoryKind {
        match self {
            Memory::Owned => MemoryKind::Owned,
            Memory::Host(_) => MemoryKind::Host,
            Memory::HostReadOnly(_) => MemoryKind::HostReadOnly,
            Memory::Device(_) => MemoryKind::Device,
        }
    }
}

/// [`Memory`] without the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Allocated by the backend.
    Owned,
    /// The caller's host buffers.
    Host,
    /// The caller's host buffers, for reading.
    HostReadOnly,
    /// The caller's device buffers.
    Device,
}

impl std::fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            MemoryKind::Owned => "owned",
            MemoryKind::Host => "host",
            MemoryKind::HostReadOnly => "host read-only",
            MemoryKind::Device => "device",
        })
    }
}

/// A queue of the caller's (a CUDA stream) on which a session's work is put; the host backend has none.
#[derive(Clone, Debug)]
pub struct Stream {
    inner: Arc<dyn Any + Send + Sync>,
}

impl Stream {
    /// The device library's own stream object, e.g. an `attn_kernels::device::Stream`; kept alive by the session.
    pub fn new<T: Any + Send + Sync>(inner: Arc<T>) -> Self {
        Self { inner }
    }

    /// The object, for the backend that knows its type; `None` if it is of another type.
    pub fn downcast<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.inner).downcast().ok()
    }
}
