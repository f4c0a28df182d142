//! Where things are in this workspace.

use std::path::{Path, PathBuf};

/// The workspace's root folder.
pub fn root() -> PathBuf {
    // The folder of this package when it was built; its parent is the root.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The crate that owns the kernels.
pub fn kernels_crate() -> PathBuf {
    root().join("crates/attn-kernels")
}

/// Where `kernels` puts the image and its manifest, and the build script of `attn-kernels` looks for them.
pub fn kernels_output() -> PathBuf {
    root().join("target/kernels")
}
