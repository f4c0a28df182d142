//! Workspace commands; one file per command. `cargo xtask --help` lists them.

#![allow(clippy::print_stdout, reason = "a command line tool talks")]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod kernels;
#[path = "../../crates/attn-kernels/build/source_hash.rs"]
mod source_hash;
mod workspace;

#[derive(Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", about = "Commands of this workspace")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the CUDA kernels into target/kernels (needs no GPU; finds or installs nvcc)
    Kernels(kernels::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Kernels(args) => kernels::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
