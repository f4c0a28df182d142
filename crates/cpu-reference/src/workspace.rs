//! Memory that a decode step needs, kept from step to step.

use crate::isa::Kernel;
use crate::{DotProduct, Error, Isa};
use attn_plan::WorkItem;

/// One cache line of f32, so that vectors never straddle lines.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; Line::LEN]);

impl Line {
    pub(crate) const LEN: usize = 16;
    pub(crate) const ZERO: Self = Self([0.0; Self::LEN]);
}

/// Scratch memory of [`crate::decode`] and the instruction set that it runs on. Memory grows to the largest step seen
/// and is reused from then on.
#[derive(Clone, Debug)]
pub struct Workspace {
    pub(crate) kernel: Result<Kernel, Error>,
    pub(crate) dot: DotProduct,
    /// q, `[batch, num_kv_heads, rows * padded_dim]` with `rows = q_len * gqa_group`, packed by [`crate::query`].
    pub(crate) q: Vec<Line>,
    /// Unnormalized outputs, `[num_items, num_kv_heads, rows, padded_dim]`.
    pub(crate) o: Vec<Line>,
    /// `(m, l)`, `[num_items, num_kv_heads, rows, 2]`.
    pub(crate) ml: Vec<f32>,
    /// First item of each request, and the end.
    pub(crate) request_items: Vec<usize>,
    /// The plan's, request by request in token order; a plan may have them in another.
    pub(crate) items: Vec<WorkItem>,
}

impl Default for Workspace {
    fn default() -> Self {
        Self::with_kernel(Isa::from_env().and_then(Kernel::new))
    }
}

impl Workspace {
    /// An empty workspace for the instruction set that [`crate::ISA_VARIABLE`] names, or the best that this machine has.
    /// A name that cannot be followed is an error of every [`crate::decode`] with this workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty workspace for one instruction set.
    ///
    /// # Errors
    /// [`Error::Isa`] if this machine cannot run it.
    pub fn for_isa(isa: Isa) -> Result<Self, Error> {
        Ok(Self::with_kernel(Ok(Kernel::new(isa)?)))
    }

    fn with_kernel(kernel: Result<Kernel, Error>) -> Self {
        let dot = DotProduct::default();
        Self {
            kernel,
            dot,
            q: Vec::new(),
            o: Vec::new(),
            ml: Vec::new(),
            request_items: Vec::new(),
            items: Vec::new(),
        }
    }

    /// The same, with q.k computed in another way than in f32. For `Int8` outputs are within
    /// [`crate::Arithmetic::host_int8`], not within [`crate::Arithmetic::host`].
    #[must_use]
    pub fn with_dot(self, dot: DotProduct) -> Self {
        Self { dot, ..self }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.q.capacity() + self.o.capacity()) * size_of::<Line>()
            + self.ml.capacity() * size_of::<f32>()
            + self.request_items.capacity() * size_of::<usize>()
            + self.items.capacity() * size_of::<WorkItem>()
    }
}
