//! Numbered lessons; see the README.
