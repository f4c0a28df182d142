//! Workspace commands, one file per command; `cargo xtask --help` lists them.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a command line tool talks on stdout")]

mod ci;
mod demo;
mod tidy;
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
    /// Run every check that a change must pass: what .ci/run does.
    Ci(ci::Args),
    /// Decode real attention data through a session, and say what INT8 costs and saves.
    Demo(demo::Args),
    /// Check the house rules that no compiler checks.
    Tidy(tidy::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Ci(args) => ci::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Tidy(args) => tidy::run(&args),
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
