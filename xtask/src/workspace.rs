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

/// The commit of the workspace that a binary was made from; empty where git does not answer.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for records of benchmarks"))]
pub fn commit() -> String {
    // A binary that travels has no repository around it, or another one.
    if let Some(commit) = option_env!("KV8_COMMIT") {
        return commit.to_owned();
    }
    let git = std::process::Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .current_dir(root())
        .output();
    git.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// Runs this very command again through cargo, with a feature that this binary was built without.
#[cfg(not(feature = "cuda"))]
pub fn rerun_with_feature(feature: &str) -> anyhow::Result<()> {
    let status = std::process::Command::new("cargo")
        .args([
            "run",
            "--quiet",
            "--release",
            "--target-dir",
            "target/xtask",
            "-p",
            "xtask",
            "--features",
            feature,
            "--",
        ])
        .args(std::env::args().skip(1))
        .current_dir(root())
        .status()?;
    anyhow::ensure!(status.success(), "the command failed");
    Ok(())
}
