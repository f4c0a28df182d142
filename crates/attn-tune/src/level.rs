//! How much tuning a user wants.

use std::fmt;
use std::str::FromStr;

/// The environment variable that names a [`Level`] where no argument does.
pub const TUNE_VARIABLE: &str = "KV8_TUNE";

/// How much tuning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Level {
    /// No profile is read; the cost model decides.
    Off,
    /// Shipped and user profiles decide, the cost model where they say nothing. Nothing is measured.
    #[default]
    Profiles,
    /// As `Profiles`; what they lack is measured at warm-up and kept in the user's profile.
    Missing,
    /// Everything is measured anew at warm-up.
    Force,
}

impl Level {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Off, "off"),
        (Self::Profiles, "profiles"),
        (Self::Missing, "missing"),
        (Self::Force, "force"),
    ];

    /// Whether anything is measured at warm-up.
    pub fn measures(self) -> bool {
        matches!(self, Self::Missing | Self::Force)
    }

    /// The level that [`TUNE_VARIABLE`] names, the default if it is not set.
    ///
    /// # Errors
    /// A name that is no level.
    pub fn from_env() -> Result<Self, LevelError> {
        std::env::var(TUNE_VARIABLE).map_or(Ok(Self::default()), |name| name.parse())
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(level, _)| level == self).map_or("", |(_, name)| *name))
    }
}

/// A name that is no level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no tuning level {name:?}; valid: off, profiles, missing, force")]
pub struct LevelError {
    /// What was given.
    pub name: String,
}

impl FromStr for Level {
    type Err = LevelError;

    fn from_str(name: &str) -> Result<Self, LevelError> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name);
        found.map(|(level, _)| *level).ok_or_else(|| LevelError { name: name.to_owned() })
    }
}
