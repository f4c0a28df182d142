//! `cargo xtask tune`: measures which schedule is fastest for which step on this GPU, and keeps it as a profile.

#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "judges what a device gives"))]
mod check;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "drives a device"))]
mod drive;
#[cfg(feature = "cuda")]
mod explain;
mod fit;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "measured on a device"))]
mod grid;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "written while a device is measured"))]
mod journal;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "tried on a device"))]
mod pick;
mod report;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "searches on a device"))]
mod search;
mod share;
#[cfg(test)]
mod tests;

use anyhow::{Context, Result, ensure};
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
    /// Schedules tried for each step; 20 for the benchmark's steps and 8 for others if not given
    #[arg(long, value_name = "COUNT")]
    candidates: Option<usize>,
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
    /// Measure nothing; fit the cost model's constants to the times in journals of earlier runs
    #[arg(long, value_name = "FILE.journal", num_args = 1..)]
    fit: Vec<PathBuf>,
    /// Measure nothing; judge the cost model's constants by journals of earlier runs
    #[arg(long, value_name = "FILE.journal", num_args = 1..)]
    judge: Vec<PathBuf>,
    /// With --judge: also fit constants to one half of the keys, and judge them by the other; the same with the GPUs
    #[arg(long, requires = "judge")]
    cross: bool,
    /// With --judge: also judge each journal by constants that were fitted to all the others
    #[arg(long, requires = "judge")]
    held_out: bool,
    /// Measure nothing; make these profiles those that ship, and draw them
    #[arg(long, value_name = "FILE.toml", num_args = 1..)]
    ship: Vec<PathBuf>,
    /// Measure nothing; say how steps of these lengths are cut on this GPU, and why (for example 8x4096 or 100,2000,30000)
    #[arg(long, value_name = "LENGTHS")]
    explain: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if let (Some(svg), Some(profile)) = (&args.report, &args.profile) {
        let profile = read(profile)?;
        report::draw(&profile, svg)?;
        println!("wrote {}", svg.display());
        if let Some(share) = share::ModelShare::of(&profile) {
            println!("{}: {share}", profile.device);
        }
        return Ok(());
    }
    if !args.fit.is_empty() {
        return fit::run(&args.fit);
    }
    if !args.judge.is_empty() {
        return fit::judge(&args.judge, fit::Fits { cross: args.cross, held_out: args.held_out });
    }
    if !args.ship.is_empty() {
        return args.ship.iter().try_for_each(|file| ship(file));
    }
    #[cfg(feature = "cuda")]
    return if args.explain.is_empty() { gpu::run(args) } else { explain::run(args) };
    #[cfg(not(feature = "cuda"))]
    crate::workspace::rerun_with_feature("cuda")
}

/// Puts a profile, and its picture, where the crate and the docs have theirs.
fn ship(file: &Path) -> Result<()> {
    let profile = read(file)?;
    let root = crate::workspace::root();
    let to = profile.save(&root.join("crates/attn-tune/profiles"))?;
    let name = attn_tune::file_name(&profile.device);
    // "h200" of "nvidia-h200.toml".
    let short = name.trim_start_matches("nvidia-").split(['-', '.']).next().unwrap_or(&name);
    let svg = root.join("docs/img").join(format!("tuned-{short}.svg"));
    report::draw(&profile, &svg)?;
    println!("{}: {}", profile.device, profile.coverage);
    if let Some(share) = share::ModelShare::of(&profile) {
        println!("{share}");
    }
    println!("{}, {}", to.display(), svg.display());
    let is_listed = attn_tune::shipped().iter().any(|(known, _)| *known == name);
    ensure!(is_listed, "add {name} to SHIPPED in crates/attn-tune/src/store.rs");
    Ok(())
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
