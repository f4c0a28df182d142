//! Where things are in this workspace.

use std::path::{Path, PathBuf};

/// The workspace's root folder: the parent of this package's.
///
/// A binary that was moved to another machine has no such folder any more; it works in the current one.
pub fn root() -> PathBuf {
    match Path::new(env!("CARGO_MANIFEST_DIR")).parent() {
        Some(root) if root.join("Cargo.toml").is_file() => root.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The crate that owns the kernels.
pub fn kernels_crate() -> PathBuf {
    root().join("crates/attn-kernels")
}

/// Where `kernels` puts the image and its manifest, and the build script of `attn-kernels` looks for them.
pub fn kernels_output() -> PathBuf {
    root().join("target/kernels")
}
