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

/// Today in UTC, as "2026-11-22".
#[cfg(feature = "cuda")]
pub fn today() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    civil((since.as_secs() / 86_400) as i64)
}

/// The date of a day counted from 1970-01-01 (Hinnant, "chrono-Compatible Low-Level Date Algorithms").
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for files written on a device's machine"))]
fn civil(days: i64) -> String {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months from March.
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", year_of_era + era * 400 + next)
}

#[cfg(test)]
mod tests {
    #[test]
    fn days_have_dates() {
        let dates = [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (20_779, "2026-11-22")];
        for (days, date) in dates {
            assert_eq!(super::civil(days), date);
        }
    }
}
