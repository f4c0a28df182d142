//! `generate`, `accuracy`, `advise`, `agree`: commands of `examples/smollm2`, a package of its own so that nothing else waits for
//! its dependencies to compile.

use crate::workspace;
use anyhow::{Context, Result};
use std::process::Command;

/// Everything is handed on; `--help` shows the options.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// Options and arguments of the command; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<String>,
}

/// Builds the package if need be and runs one of its commands.
pub fn run(command: &str, args: &Args) -> Result<()> {
    let manifest = workspace::root().join("examples/smollm2/Cargo.toml");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["run", "--quiet", "--release", "--manifest-path"]).arg(manifest);
    if asks_for_cuda(&args.arguments) {
        cargo.args(["--features", "cuda"]);
    }
    cargo.arg("--").arg(command).args(&args.arguments);
    hand_over(cargo)
}

/// Becomes the command, so that Ctrl-C reaches it alone and it has the last word.
#[cfg(unix)]
fn hand_over(mut cargo: Command) -> Result<()> {
    use std::os::unix::process::CommandExt;
    Err(cargo.exec()).context("cannot start cargo")
}

#[cfg(not(unix))]
fn hand_over(mut cargo: Command) -> Result<()> {
    let status = cargo.status().context("cannot start cargo")?;
    // The command has said why.
    std::process::exit(status.code().unwrap_or(1))
}

fn asks_for_cuda(arguments: &[String]) -> bool {
    let pair = arguments.windows(2).any(|pair| pair == ["--backend", "cuda"]);
    pair || arguments.iter().any(|argument| argument == "--backend=cuda")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_named_cuda_backend_needs_the_feature() {
        let asks = |line: &str| asks_for_cuda(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert!(asks("hello --backend cuda") && asks("--backend=cuda hello"));
        assert!(!asks("cuda --backend cpu") && !asks("tell me of cuda"));
    }
}
