//! The workspace as the commands see it: where its root is.

use std::path::{Path, PathBuf};

/// The workspace root: the parent of this package's folder.
///
/// A binary that was moved to another machine has no such folder any more; it works in the current one.
pub fn root() -> PathBuf {
    match Path::new(env!("CARGO_MANIFEST_DIR")).parent() {
        Some(root) if root.join("Cargo.toml").is_file() => root.to_owned(),
        _ => PathBuf::from("."),
    }
}
