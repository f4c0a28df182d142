//! The contract of a backend: what it says of itself, and the object that it opens.

use crate::{
    BackendId, Capability, Descriptor, Error, Expect, Input, Memory, Missing, Output, Refusal, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, SplitConfig, SplitPlan};
use attn_tune::Level;
use cpu_reference::Arithmetic;
use kv_quant::PageCopy;

/// What a backend runs on. A trial's verdict holds for one device, driver and build.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// The device, e.g. "NVIDIA H100 80GB HBM3" or "x86_64 avx2, 16 threads".
    pub name: String,
    /// Version of the driver; empty for a host backend.
    pub driver: String,
    /// Version or hash of the code that runs.
    pub build: String,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        if !self.driver.is_empty() {
            write!(f, ", driver {}", self.driver)?;
        }
        write!(f, ", build {}", self.build)
    }
}

/// Where a trial of a backend should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Isolation {
    /// A thread: catches panics, wrong numbers and hangs (a hung thread stays behind).
    Thread,
    /// A child process: also survives crashes and a device context that a bad kernel has poisoned.
    Process,
}

/// A way to compute decode attention. Cheap to hold; nothing is allocated on the device before [`Self::open`].
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// Its name.
    fn id(&self) -> BackendId;

    /// Whether it can run on this machine, and on what.
    ///
    /// # Errors
    /// [`Refusal::Unavailable`] with the thing that is missing.
    fn probe(&self) -> Result<Device, Refusal>;

    /// What it can do.
    fn capability(&self) -> Capability;

    /// Every part of a descriptor that it cannot do; empty if it can do all.
    fn missing(&self, descriptor: &Descriptor) -> Vec<Missing> {
        self.capability().missing(descriptor)
    }

    /// Larger is preferred among those that can do the descriptor.
    fn rank(&self, descriptor: &Descriptor) -> u32;

    /// How a step is best cut on this backend's device: a pure function of the device and the descriptor.
    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig;

    /// The error model of its arithmetic for a step: what its results are judged by.
    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic;

    /// The code that would run the descriptor's first spec, where there are several: a kernel's symbol, say. For reports.
    fn variant(&self, descriptor: &Descriptor) -> Option<String> {
        let _ = descriptor;
        None
    }

    /// Where its trial should run by default.
    fn isolation(&self) -> Isolation {
        Isolation::Thread
    }

    /// Allocates the cache (or takes the caller's) and the workspace.
    ///
    /// The caller has checked the descriptor and that the capability covers it and the memory kind.
    ///
    /// # Errors
    /// Out of memory, a device that failed.
    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        memory: Memory<'a>,
        stream: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error>;
}

/// Arguments of one ordinary decode step, all checked.
#[derive(Debug)]
pub struct NormalDecode<'a> {
    /// Shapes, lengths, page table: the same as in the latest [`Executor::plan`].
    pub request: DecodeRequest<'a>,
    /// The schedule: the same as in the latest [`Executor::plan`].
    pub plan: &'a SplitPlan,
    /// `[batch, q_len, num_q_heads, head_dim]` of the spec's q type.
    pub q: Input<'a>,
    /// As q, of the spec's out type.
    pub out: Output<'a>,
    /// `[batch, q_len, num_q_heads]` f32, natural log, if the spec wants it.
    pub lse: Option<Output<'a>>,
}

/// An opened backend: cache memory and workspace on one device.
///
/// Who validates: [`crate::Session`] has checked everything before a method is called. An implementation returns errors
/// that nobody can foresee (memory, driver, non-finite data found while appending) and treats the rest as bugs.
/// After warm-up (a call of each kind with the largest sizes) no method allocates.
pub trait Executor: Send {
    /// Quantizes `k` and `v`, `[slots.len(), num_kv_heads, head_dim]`, into the cache; slot -1 skips.
    ///
    /// # Errors
    /// [`kv_quant::Error::NonFinite`] and [`kv_quant::Error::ScaleOverflow`], from a device possibly at a later
    /// synchronizing call.
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error>;

    /// Takes over a new step: sizes the workspace, uploads lengths, pages and schedule to a device.
    ///
    /// # Errors
    /// Out of memory, a device that failed.
    fn plan(&mut self, request: &DecodeRequest<'_>, plan: &SplitPlan) -> Result<(), Error>;

    /// Says how schedules are to be chosen from now on, and measures what the level asks for: the step that `expect`
    /// describes. For a backend whose schedules nothing could improve there is nothing to do.
    ///
    /// # Errors
    /// Out of memory, a device that failed. A profile that cannot be used is logged, not an error.
    fn tune(&mut self, level: Level, expect: Option<&Expect>) -> Result<(), Error> {
        let _ = (level, expect);
        Ok(())
    }

    /// What [`SessionOptions::history_ready`](crate::SessionOptions) promises: cached tokens but the newest may be read while
    /// the work queued before a decode still runs. For a backend that reads nothing early there is nothing to do.
    fn promise_history(&mut self) {}

    /// How this step is best cut, if the backend knows better than [`Backend::split_config`], which knows no lengths. A
    /// pure function of what was opened, what [`Self::tune`] loaded, and the step.
    fn split_config(&mut self, spec: &DecodeSpec, kv_lens: &[u32]) -> Option<SplitConfig> {
        let _ = (spec, kv_lens);
        None
    }

    /// Why [`Self::split_config`] cuts this step as it does, in words for people. Allocates.
    fn explain_split(&mut self, spec: &DecodeSpec, kv_lens: &[u32]) -> Option<String> {
        let _ = (spec, kv_lens);
        None
    }

    /// Runs the planned step. With device arrays the work is queued; with host arrays it is done on return.
    ///
    /// # Errors
    /// A device that failed; errors of earlier queued work.
    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error>;

    /// Copies whole pages, codes and scales of K and V together.
    ///
    /// # Errors
    /// A device that failed.
    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error>;

    /// Reads raw bytes of a cache buffer; waits for queued work first.
    ///
    /// # Errors
    /// A device that failed; errors of earlier queued work.
    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error>;

    /// Overwrites raw bytes of a cache buffer.
    ///
    /// # Errors
    /// A device that failed.
    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Makes room for steps up to `expect`, so that none of them allocates.
    ///
    /// # Errors
    /// Out of memory.
    fn reserve(&mut self, spec: &DecodeSpec, expect: &Expect) -> Result<(), Error> {
        let _ = (spec, expect);
        Ok(())
    }

    /// Waits for queued work.
    ///
    /// # Errors
    /// Errors of that work.
    fn synchronize(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
