//! Workspace commands, one file per command; `cargo xtask --help` lists them.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a command line tool talks on stdout")]

mod bench;
mod bundle;
mod ci;
mod demo;
mod emulate;
mod kernels;
mod mutants;
mod package;
mod parallel;
mod smollm2;
#[path = "../../crates/attn-kernels/build/source_hash.rs"]
mod source_hash;
mod tidy;
mod tune;
mod workspace;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Workspace commands of kv8.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what the INT8 cache costs a language model: perplexity, KL divergence, needle retrieval
    Accuracy(smollm2::Args),
    /// Recommend group lengths, and layers to leave unquantized, from a model's K and V
    Advise(smollm2::Args),
    /// Hold backends and instruction sets to the bound on the steps of a language model's decode
    Agree(smollm2::Args),
    /// Measure the kernels against the machine and the peers
    Bench(bench::Args),
    /// Collect tests and tools built with feature cuda into a folder for a GPU machine
    Bundle(bundle::Args),
    /// Run every check that a change must pass: what .ci/run does
    Ci(ci::Args),
    /// Decode real attention data through a session, and say what INT8 costs and saves
    Demo(demo::Args),
    /// Build an emulated GPU from the kernels' sources (needs g++ alone), and run a command that finds it as its CUDA driver
    Emulate(emulate::Args),
    /// Generate text with a language model on the INT8 cache
    Generate(smollm2::Args),
    /// Build the CUDA kernels into target/kernels (needs no GPU; finds or installs nvcc)
    Kernels(kernels::Args),
    /// Build the kernels with each seeded bug, for `run.sh mutants` of a bundle
    Mutants(mutants::Args),
    /// Pack the crates with the kernel image inside, so that dependents need no nvcc
    Package(package::Args),
    /// Measure which schedule is fastest for which step on this GPU, and keep it as a profile
    Tune(tune::Args),
    /// Check the house rules that no compiler checks
    Tidy(tidy::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Accuracy(args) => smollm2::run("accuracy", &args),
        Command::Advise(args) => smollm2::run("advise", &args),
        Command::Agree(args) => smollm2::run("agree", &args),
        Command::Bench(args) => bench::run(&args),
        Command::Bundle(args) => bundle::run(&args),
        Command::Ci(args) => ci::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Emulate(args) => emulate::run(&args),
        Command::Generate(args) => smollm2::run("generate", &args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Mutants(args) => mutants::run(&args),
        Command::Package(args) => package::run(&args),
        Command::Tidy(args) => tidy::run(&args),
        Command::Tune(args) => tune::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain of causes; a backtrace says nothing to who typed a command.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
