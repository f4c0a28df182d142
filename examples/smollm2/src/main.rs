//! Commands over SmolLM2-135M on the INT8 cache.
#![forbid(unsafe_code)]

use clap::Parser;
use smollm2::command;
use std::process::ExitCode;

/// A real language model whose attention runs on kv8.
#[derive(Parser)]
#[command(version)]
enum Command {
    Generate(command::generate::Args),
    Accuracy(command::accuracy::Args),
    Advise(command::advise::Args),
    Agree(command::agree::Args),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Generate(args) => command::generate::run(&args),
        Command::Accuracy(args) => command::accuracy::run(&args),
        Command::Advise(args) => command::advise::run(&args),
        Command::Agree(args) => command::agree::run(&args),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    // The chain of causes; a backtrace says nothing to who typed a command.
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("because: {cause}");
    }
    ExitCode::FAILURE
}
