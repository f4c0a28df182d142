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
    step("example-01", "cargo run --quiet -p attn-examples --example 01_quantize_a_page"),
    step("example-02", "cargo run --quiet -p attn-examples --example 02_decode_on_cpu"),
    step("example-03", "cargo run --quiet -p attn-examples --example 03_inspect_a_plan"),
    step("example-04", "cargo run --quiet -p attn-examples --example 04_select_a_backend"),
    step("example-05", "cargo run --quiet -p attn-examples --example 05_share_a_prefix"),
    // Needs no GPU; says so before it installs nvcc into a cache folder.
    step("kernels", "cargo xtask kernels"),
    // What is published builds in a program of its own, with the image inside.
    step("package", "cargo xtask package --check"),
    // The CUDA backend on a driver of host memory that fails at every call; wants the image that was just built.
    step("fake-driver", "cargo test -p attn-backend --features cuda --test fake_driver"),
    step("emulate-checks", "cargo xtask emulate --checks"),
    // The kernels' own sources on an emulated GPU: every kernel once, then the suite of all backends.
    step(
        "emulate",
        "cargo xtask emulate cargo test -p attn-tests --features cuda --test it -- gpu::every_kernel",
    ),
    Step {
        name: "emulate-suite",
        // Left out are a million tokens, and the suite that decodes each batch in many orders.
        command: "cargo xtask emulate cargo test -p attn-tests --features cuda --test it -- conformance::cuda:: \
                  --skip cuda::long --skip cuda::invariance",
        env: &[("KV8_CASES", "400"), ("KV8_REQUIRE_GPU", "1")],
    },
    // Fails if any output element is beyond the bound of the backend's arithmetic.
    step("demo", "cargo xtask demo --json"),
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
        let mut words = self.command.split_whitespace();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_a_step_and_short() {
        let folder = workspace::root().join("examples/examples");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            assert!(STEPS.iter().any(|step| step.command.ends_with(&name)), "{name} is not run");
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            assert!(lines < 80, "{name} has {lines} lines; a lesson has fewer than 80");
            count += 1;
        }
        assert!(count >= 5);
    }
}
