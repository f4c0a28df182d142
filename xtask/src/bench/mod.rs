//! `cargo xtask bench`: how fast, against what the machine can do and what the peers do.

#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "cases are run on a device"))]
pub mod case;
mod cpu;
#[cfg(feature = "cuda")]
pub mod gpu;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "cases are run on a device"))]
pub mod inputs;
mod record;
mod report;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "cases are run on a device"))]
pub mod suites;

use anyhow::Result;
use clap::Subcommand;

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The CPU backend, beside the read bandwidth of the same run
    Cpu(cpu::CpuArgs),
    /// The CUDA kernels, beside the copy-only reader and the plain streams of the same run
    Gpu(GpuArgs),
    /// A record of `bench gpu` as tables and pictures
    Report(report::ReportArgs),
    /// Which targets records of `bench gpu` reach
    Targets(report::TargetArgs),
}

/// Options of `bench gpu`.
#[derive(clap::Args, Clone, Debug)]
pub struct GpuArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Also write the JSON to this file
    #[arg(long, value_name = "FILE")]
    record: Option<std::path::PathBuf>,
    /// Cases to run; all of them if none is named
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    suite: Vec<String>,
    /// Timed replays of each case; at least 20 for figures that are quoted
    #[arg(long, default_value_t = 30)]
    samples: usize,
    /// Device
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// What a work item costs beside its tokens, in tiles of 64 tokens; the library's choice if not given
    #[arg(long)]
    item_overhead: Option<u32>,
    /// The fewest tiles of 64 tokens worth a split of their own; the library's choice if not given
    #[arg(long)]
    min_split_tiles: Option<u32>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Cpu(args) => cpu::run(args),
        What::Report(args) => report::run(args),
        What::Targets(args) => report::run_targets(args),
        #[cfg(feature = "cuda")]
        What::Gpu(args) => gpu::run(args),
        #[cfg(not(feature = "cuda"))]
        What::Gpu(_) => crate::workspace::rerun_with_feature("cuda"),
    }
}
