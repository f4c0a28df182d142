//! How much memory a plan's partial states take.

use crate::{DecodeSpec, Error, SplitPlan};

/// Elements of the two f32 arrays that stage 1 writes and stage 2 reads.
/// ```
/// use attn_plan::{DecodeSpec, WorkspaceSize};
/// let size = WorkspaceSize::for_partials(&DecodeSpec::new(32, 8, 128), 64)?;
/// assert_eq!(size.bytes(), 64 * 32 * (128 + 2) * 4);
/// # Ok::<(), attn_plan::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkspaceSize {
    /// `[num_partials, num_q_heads, q_len, head_dim]` f32: unnormalized outputs.
    pub o_elements: usize,
    /// `[num_partials, num_q_heads, q_len, 2]` f32: `(m, l)`.
    pub ml_elements: usize,
}

impl WorkspaceSize {
    /// For a plan.
    pub fn of(spec: &DecodeSpec, plan: &SplitPlan) -> Result<Self, Error> {
        Self::for_partials(spec, u64::from(plan.num_partials()))
    }

    /// For a number of partials, e.g. the most that any step of an engine will need.
    pub fn for_partials(spec: &DecodeSpec, num_partials: u64) -> Result<Self, Error> {
        let rows = num_partials
            .checked_mul(u64::from(spec.num_q_heads))
            .and_then(|rows| rows.checked_mul(u64::from(spec.q_len)));
        let elements = |per_row: u64| {
            rows.and_then(|rows| rows.checked_mul(per_row))
                .filter(|n| *n <= (isize::MAX as u64) / 4)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or(Error::WorkspaceOverflow)
        };
        Ok(Self { o_elements: elements(u64::from(spec.head_dim))?, ml_elements: elements(2)? })
    }

    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        (self.o_elements + self.ml_elements) * size_of::<f32>()
    }
}
