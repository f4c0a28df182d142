//! Commands over SmolLM2-135M on the INT8 cache.
#![forbid(unsafe_code)]

use clap::Parser;
use smollm2::command;

/// A real language model whose attention runs on kv8.
#[derive(Parser)]
#[command(version)]
enum Command {
    Generate(command::generate::Args),
    Accuracy(command::accuracy::Args),
    Advise(command::advise::Args),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Generate(args) => command::generate::run(&args),
        Command::Accuracy(args) => command::accuracy::run(&args),
        Command::Advise(args) => command::advise::run(&args),
    }
}
