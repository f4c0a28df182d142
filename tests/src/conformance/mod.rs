//! One suite for every backend. Nothing here knows which backend it judges.

mod fuzz;
pub mod judge;

pub use fuzz::fuzz;
pub use judge::{Verdict, judge};
