//! `cargo xtask ci`: every check that a change must pass. `.ci/run` installs what is missing and calls it.

use crate::workspace;
use anyhow::Context;
use std::process::Command;
use std::time::Instant;

/// Arguments of `cargo xtask ci`.
#[derive(clap::Args)]
pub struct Args {
    /// Leave out steps by name; --list shows the names.
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    skip: Vec<String>,
    /// Print the steps, and run none.
    #[arg(long)]
    list: bool,
}

/// One command line, and what it is for.
struct Step {
    name: &'static str,
    command: &'static str,
    /// Added to the environment.
    env: &'static [(&'static str, &'static str)],
}

const STEPS: &[Step] = &[
    step("test", "cargo test --workspace"),
    step("fmt", "cargo fmt --all -- --check"),
    step("clippy", "cargo clippy --workspace --all-targets -- -D warnings"),
    step("clippy-cuda", "cargo clippy --workspace --all-targets --features cuda -- -D warnings"),
    Step {
        name: "doc",
        command: "cargo doc --workspace --no-deps --all-features",
        env: &[("RUSTDOCFLAGS", "-D warnings")],
    },
    step("tidy", "cargo xtask tidy"),
];

const fn step(name: &'static str, command: &'static str) -> Step {
    Step { name, command, env: &[] }
}

/// Runs the steps in order and stops at the first that fails.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let names: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
    if let Some(unknown) = args.skip.iter().find(|name| !names.contains(&name.as_str())) {
        anyhow::bail!("no step is called {unknown}; valid: {}", names.join(", "));
    }
    for step in STEPS.iter().filter(|step| !args.skip.iter().any(|name| name == step.name)) {
        println!("==> {:12} {}", step.name, step.command);
        if !args.list {
            let start = Instant::now();
            step.run()?;
            println!("    {:12} ok after {:.0} s", step.name, start.elapsed().as_secs_f32());
        }
    }
    Ok(())
}

impl Step {
    fn run(&self) -> anyhow::Result<()> {
        let mut words = self.command.split(' ');
        let status = Command::new(words.next().unwrap_or("cargo"))
            .args(words)
            .envs(self.env.iter().copied())
            .current_dir(workspace::root())
            .status()
            .with_context(|| format!("cannot start: {}", self.command))?;
        anyhow::ensure!(status.success(), "{} failed: {}", self.name, self.command);
        Ok(())
    }
}
