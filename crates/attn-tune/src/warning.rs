//! Why a profile, or a part of one, is not used. Never fatal: the cost model serves instead.

use std::path::PathBuf;

/// A file and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("profile {}: {cause}", file.display())]
pub struct Warning {
    /// Where it stands; the bare name for a profile that ships with the crate.
    pub file: PathBuf,
    /// What is wrong.
    pub cause: Cause,
}

/// What is wrong with a profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The file could not be read.
    #[error("cannot be read: {reason}")]
    Unreadable {
        /// The system's words.
        reason: String,
    },
    /// Not the TOML that a profile is.
    #[error("is damaged: {reason}; delete it, or write it anew with `cargo xtask tune`")]
    Damaged {
        /// The parser's words.
        reason: String,
    },
    /// Written by a version with another file format.
    #[error(
        "has format {found}, this version reads {}; write it anew with `cargo xtask tune`",
        crate::VERSION
    )]
    Version {
        /// The file's.
        found: u32,
    },
    /// Measured on another GPU.
    #[error("was measured on {found}, this is {wanted}")]
    Foreign {
        /// The file's device.
        found: String,
        /// The device at hand.
        wanted: String,
    },
    /// Measured with other kernels.
    #[error("was measured with kernels {found}, these are {wanted}; write it anew with `cargo xtask tune`")]
    Stale {
        /// The file's build.
        found: String,
        /// The build at hand.
        wanted: String,
    },
    /// One entry makes no sense; the others are used.
    #[error("{at} is left out: {reason}")]
    BadEntry {
        /// Which one.
        at: String,
        /// Why.
        reason: String,
    },
}
