//! A captured sequence of launches, replayed with one call.

use super::context::CudaDevice;
use super::driver::{self, Handle};
use super::error::DeviceError;
use super::stream::Stream;

/// An executable graph. What it reads and writes must live as long as it is launched.
#[derive(Debug)]
pub struct Graph {
    device: CudaDevice,
    exec: Handle,
}

// SAFETY: the driver allows a graph to be launched from any thread, one at a time; `launch` takes it by reference and
// the driver orders launches of one graph itself.
unsafe impl Send for Graph {}

/// Only calls of the capturing thread are checked against the capture (`CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`).
const THREAD_LOCAL: u32 = 1;

impl Graph {
    /// Captures what `work` queues on `stream` (not the default stream) without running it.
    ///
    /// # Errors
    /// What `work` answers, or [`DeviceError::Driver`] if something in it cannot be captured.
    pub fn capture(
        stream: &Stream,
        work: impl FnOnce(&Stream) -> Result<(), DeviceError>,
    ) -> Result<Self, DeviceError> {
        let device = stream.device();
        let _current = device.enter()?;
        // SAFETY: the stream is alive.
        let code = unsafe { driver::cuStreamBeginCapture_v2(stream.handle(), THREAD_LOCAL) };
        device.check("cuStreamBeginCapture", code)?;
        let worked = work(stream);
        let mut graph = std::ptr::null_mut();
        // SAFETY: ends the capture begun above, also after a failure inside it; writes one handle, null on failure.
        let ended = device.check("cuStreamEndCapture", unsafe {
            driver::cuStreamEndCapture(stream.handle(), &raw mut graph)
        });
        let mut exec = std::ptr::null_mut();
        let made = worked.and(ended).and_then(|()| {
            // SAFETY: the capture has given a graph; writes one handle.
            let code = unsafe { driver::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) };
            device.check("cuGraphInstantiate", code)
        });
        if !graph.is_null() {
            // SAFETY: made by the capture, destroyed once; the executable graph does not need it.
            let _ = unsafe { driver::cuGraphDestroy(graph) };
        }
        made.map(|()| Self { device: device.clone(), exec })
    }

    /// Queues one replay.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn launch(&self, stream: &Stream) -> Result<(), DeviceError> {
        let _current = self.device.enter()?;
        // SAFETY: both are alive.
        self.device.check("cuGraphLaunch", unsafe { driver::cuGraphLaunch(self.exec, stream.handle()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(_current) = self.device.enter_to_free() {
            // SAFETY: instantiated by `capture` and destroyed once. A refusal cannot be reported here.
            let _ = unsafe { driver::cuGraphExecDestroy(self.exec) };
        }
    }
}
