//! `cargo xtask mutants`: a small kernel image for each seeded bug of `crates/attn-kernels/cuda/mutants.md`, and one
//! without a bug. `cargo xtask bundle` takes them along; there, `./run.sh mutants` lets the suite judge each.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::kernels;
use crate::workspace;

#[derive(clap::Args)]
pub struct Args {
    /// Where the images go, a folder each [default: target/mutants]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// The smallest units that have every kernel of the data flow and every way to read scales.
const UNITS: [&str; 9] = [
    "common",
    "items_d64_g8",
    "shares_d64_g16",
    "shares_d64_g8",
    "shares_d64_gw",
    "stage1_d64_g16",
    "stage1_d64_g8",
    "stage1_d64_gw",
    "stage1_d64_gx",
];

/// Where `bundle` looks for the images.
pub fn output() -> PathBuf {
    workspace::root().join("target/mutants")
}

pub fn run(args: &Args) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(output);
    let table = workspace::kernels_crate().join("cuda/mutants.md");
    let text = std::fs::read_to_string(&table).with_context(|| format!("reading {}", table.display()))?;
    let number = |line: &str| line.strip_prefix("| ")?.split(' ').next()?.parse::<u32>().ok();
    let bugs: Vec<u32> = text.lines().filter_map(number).collect();
    ensure!(!bugs.is_empty(), "{} has no rows", table.display());
    if out.exists() {
        std::fs::remove_dir_all(&out).with_context(|| format!("removing {}", out.display()))?;
    }
    let mut without_bug = Vec::new();
    for bug in std::iter::once(0).chain(bugs.iter().copied()) {
        let folder = out.join(bug.to_string());
        kernels::run(&kernels::Args::part(&UNITS, format!("KV8_MUTANT={bug}"), folder.clone()))?;
        let image = std::fs::read(folder.join("kv8.fatbin"))?;
        if bug == 0 {
            without_bug = image;
        } else {
            ensure!(image != without_bug, "bug {bug} changes nothing in {UNITS:?}");
        }
    }
    println!("{} bugs, and the kernels without one: {}", bugs.len(), out.display());
    Ok(())
}
