//! The algorithm, over any instruction set's vectors.

pub(crate) mod append;
mod math;
mod rows;
mod side;
mod simd;
mod softmax;
mod stage1;
mod tile;

#[cfg(test)]
mod tests;

pub(crate) use rows::{Bytes, SidePlanes};
pub(crate) use simd::{Loop, Simd};
pub(crate) use softmax::{BlockMask, LogitRule};
pub(crate) use stage1::attend;
pub(crate) use tile::INT_WORDS;
