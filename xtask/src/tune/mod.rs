//! `cargo xtask tune`: measures which schedule is fastest for which step on this GPU, and keeps it as a profile.

#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod grid;
mod report;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "searches on a device"))]
mod search;

use anyhow::{Context, Result};
use attn_tune::Profile;
use std::path::{Path, PathBuf};

/// Options of `tune`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Device
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// One model's shape at a few sizes, in a few minutes
    #[arg(long)]
    quick: bool,
    /// Measure again what the profile holds already
    #[arg(long)]
    force: bool,
    /// Stop after this many minutes; what was measured is kept
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<f64>,
    /// Head dims, instead of those of the grid
    #[arg(long, value_delimiter = ',')]
    head_dim: Vec<u32>,
    /// Group lengths, instead of those of the grid
    #[arg(long, value_delimiter = ',')]
    group_len: Vec<u32>,
    /// Query heads of a kv head, instead of those of the grid
    #[arg(long, value_delimiter = ',')]
    gqa: Vec<u32>,
    /// Folder of the profile; the user's own (see docs/tuning.md) if not given
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Measure nothing; draw a profile, tuned against the cost model and the floor
    #[arg(long, value_name = "FILE.svg", requires = "profile")]
    report: Option<PathBuf>,
    /// The profile to draw
    #[arg(long, value_name = "FILE.toml")]
    profile: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if let (Some(svg), Some(profile)) = (&args.report, &args.profile) {
        let profile = read(profile)?;
        report::draw(&profile, svg)?;
        println!("wrote {}", svg.display());
        if let Some(share) = report::ModelShare::of(&profile) {
            println!("{}: {share}", profile.device);
        }
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    return gpu::run(args);
    #[cfg(not(feature = "cuda"))]
    crate::workspace::rerun_with_feature("cuda")
}

/// A profile that must be good, and what was left out of it.
fn read(path: &Path) -> Result<Profile> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (profile, left_out) = Profile::parse(&text).with_context(|| path.display().to_string())?;
    for cause in left_out {
        eprintln!("warning: {}: {cause}", path.display());
    }
    Ok(profile)
}
