//! What a decode attention step computes and how it is cut: pure functions from facts to printable values.
//!
//! [`DecodeSpec`] and [`DecodeRequest`] say everything that a step can ask, [`SplitPlan`] cuts the batch's tokens into
//! work items, [`Partial`] is the algebra by which partial results are merged. Nothing here computes attention.
//!
//! The maths is in `docs/merge-math.md`, the schedule in `docs/split-schedule.md`.
#![forbid(unsafe_code)]

mod error;
mod partial;
mod plan;
mod request;
mod schedule;
mod spec;
mod split;
mod workspace;

pub use error::Error;
pub use partial::{Partial, SoftmaxState};
pub use plan::{MAX_ITEMS, NO_PARTIAL, SplitPlan, WorkItem};
pub use request::{DecodeRequest, PageRows, PageTable};
pub use spec::{DecodeSpec, MAX_Q_HEADS, MAX_Q_LEN};
pub use split::{MAX_OWN_ITEMS, MAX_SHARES, SplitConfig, SplitPolicy};
pub use workspace::WorkspaceSize;
