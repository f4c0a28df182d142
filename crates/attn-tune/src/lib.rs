//! Which schedule a decode step runs by: measured profiles, and a cost model where nothing was measured.
//!
//! * A [`Profile`] is a file that `cargo xtask tune` wrote on one GPU: for a [`StaticKey`] (shapes, types, policy) a list
//!   of [`Point`]s, each a measured step ([`RunKey`]) and the [`Choice`] that was fastest there.
//! * A [`Tuner`] holds what applies to one [`Machine`]: the profiles that ship with this crate, the user's own before
//!   them. A file that is damaged, foreign or stale gives a [`Warning`] and is left out.
//! * A [`Chooser`] answers for one key, step by step: the nearest measured neighbour within [`MAX_DISTANCE`], else what
//!   the [`CostModel`] finds best. [`Chooser::choose`] is a pure function, does not allocate, and says [`Why`].
//!
//! A choice never changes what is computed, only when and where; under
//! [`SplitPolicy::BatchInvariant`](attn_plan::SplitPolicy) every part of it that could change bits is fixed.
#![forbid(unsafe_code)]

mod candidates;
mod choice;
mod chooser;
mod date;
mod deal;
mod expect;
mod key;
mod level;
mod model;
mod profile;
mod run;
mod store;
mod text;
mod tuner;
mod warning;

pub use candidates::Candidates;
pub use choice::{Choice, HEADS_PER_BLOCK, TILE_LEN};
pub use chooser::{Chooser, Decision, MAX_DISTANCE, SAME_STEP, Why};
pub use date::today;
pub use key::{LayoutClass, PolicyClass, StaticKey, StaticKeyError};
pub use level::{Level, LevelError, TUNE_VARIABLE};
pub use model::{CostModel, Machine, Shape, USUAL_WARPS};
pub use profile::{Point, Profile, Table, Timing, VERSION};
pub use run::RunKey;
pub use store::{PROFILE_DIR_VARIABLE, file_name, shipped, user_dir};
pub use tuner::{Source, Tuner};
pub use warning::{Cause, Warning};
