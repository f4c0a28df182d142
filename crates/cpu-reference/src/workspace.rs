//! Memory that a decode step needs, kept from step to step.

/// Scratch memory of [`crate::decode`]: grows to the largest step seen and is reused from then on.
#[derive(Clone, Debug, Default)]
pub struct Workspace {
    /// q in f32, `[batch, num_kv_heads, rows, head_dim]` with `rows = q_len * gqa_group`.
    pub(crate) q: Vec<f32>,
    /// Unnormalized outputs, `[num_items, num_kv_heads, rows, head_dim]`.
    pub(crate) o: Vec<f32>,
    /// `(m, l)`, `[num_items, num_kv_heads, rows, 2]`.
    pub(crate) ml: Vec<f32>,
    /// First item of each request, and the end.
    pub(crate) request_items: Vec<usize>,
}

impl Workspace {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.q.capacity() + self.o.capacity() + self.ml.capacity()) * size_of::<f32>()
            + self.request_items.capacity() * size_of::<usize>()
    }
}
