//! `cargo xtask emulate`: an emulated GPU, for tests of the CUDA path on a machine without one.
//!
//! The kernels' own sources are compiled by g++ with headers that say what CUDA adds to C++ (`emulator/device`), linked
//! with a runtime that runs each CUDA thread as a fiber (`emulator/runtime`) and with the functions of the driver that
//! kv8 calls (`emulator/driver`), into a `libcuda.so.1`. A program that finds it first runs on it.
//! What stands for hardware is replaced: the file `common/ptx.cuh`, and how `decode/kernels.cuh` declares shared memory.

mod host;
mod sources;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::kernels::table::Table;
use crate::kernels::toolchain::Toolchain;
use crate::kernels::{unit_name, units};
use crate::source_hash::source_hash;
use crate::workspace;
use host::{Job, KERNEL_FLAGS, OWN_FLAGS, compile, link};
use sources::{files, write_if_new};

#[derive(clap::Args)]
pub struct Args {
    /// Seeded bug of crates/attn-kernels/cuda/mutants.md to build in; 0: none
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    mutant: u32,
    /// Compute capability of the GPU that is emulated: 80 or 90
    #[arg(long, default_value_t = 90, value_name = "NUMBER")]
    sm: u32,
    /// Build this file of cuda/instances alone (its name without .cu); may be given several times [default: all]
    #[arg(long, value_name = "NAME")]
    unit: Vec<String>,
    /// Compilers at a time [default: the number of processors]
    #[arg(short, long)]
    jobs: Option<usize>,
    /// Hold the emulator itself to kernels with a mistake each, which it has to find, and build nothing else
    #[arg(long, conflicts_with_all = ["mutant", "sm", "unit", "command"])]
    checks: bool,
    /// Run this with the emulated GPU as its only one
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// How every fatbin begins: its mark, and version 1.
const FATBIN_HEAD: [u8; 8] = [0x50, 0xed, 0x55, 0xba, 1, 0, 0, 0];
const UNIT_BYTES: usize = 64;

pub fn run(args: &Args) -> Result<()> {
    ensure!([80, 90].contains(&args.sm), "--sm {}; valid: 80, 90", args.sm);
    if args.checks {
        return check(args);
    }
    let out = build(args)?;
    let Some((program, arguments)) = args.command.split_first() else { return Ok(()) };
    let path = std::env::var_os("LD_LIBRARY_PATH");
    let path = std::env::join_paths(
        std::iter::once(out.clone()).chain(path.iter().flat_map(std::env::split_paths)),
    )?;
    let status = Command::new(program)
        .args(arguments)
        .env("LD_LIBRARY_PATH", path)
        .env("KV8_IMAGE_DIR", &out)
        .env("KV8_EMULATED_SM", args.sm.to_string())
        .status()
        .with_context(|| format!("starting {program}"))?;
    ensure!(status.success(), "{} failed on the emulated GPU", args.command.join(" "));
    Ok(())
}

/// Builds the program of `emulator/checks` and runs it: it prints a line for each mistake.
fn check(args: &Args) -> Result<()> {
    let work = workspace::root().join("target/emulator");
    let emulator = sources::copy(&workspace::root(), &work)?.join("emulator");
    let mut jobs = Vec::new();
    for file in
        files(&emulator.join("runtime"), "cpp")?.into_iter().filter(|file| unit_name(file) != "registry")
    {
        jobs.push(Job::new(&file, own_flags(), &[], &work)?);
    }
    let include = format!("-I{}", emulator.join("device").display());
    let flags = own_flags().into_iter().chain([include]).collect();
    jobs.push(Job::new(&emulator.join("checks/main.cpp"), flags, &headers(&emulator), &work)?);
    compile(&jobs, args.jobs)?;
    let program = work.join("checks");
    link(&jobs, &[], &program)?;
    let status =
        Command::new(&program).status().with_context(|| format!("starting {}", program.display()))?;
    ensure!(status.success(), "the emulated GPU does not find every mistake");
    Ok(())
}

fn own_flags() -> Vec<String> {
    OWN_FLAGS.map(str::to_owned).to_vec()
}

/// What the kernels include in angle brackets, or are given without.
fn headers(emulator: &Path) -> [PathBuf; 5] {
    ["cuda.hpp", "cuda_bf16.h", "cuda_fp16.h", "math_constants.h", "warp_instructions.hpp"]
        .map(|header| emulator.join("device").join(header))
}

/// Builds what is not built yet. Answers the folder of the library and of the image that stands for it.
fn build(args: &Args) -> Result<PathBuf> {
    let root = workspace::root();
    let work = root.join("target/emulator");
    let out = work.join(format!("sm_{}-mutant_{}", args.sm, args.mutant));
    std::fs::create_dir_all(&out)?;
    let sources = sources::copy(&root, &work)?;
    let all = units(&sources.join("attn-kernels"))?;
    let wanted: Vec<PathBuf> =
        all.into_iter().filter(|unit| args.unit.is_empty() || args.unit.contains(&unit_name(unit))).collect();
    ensure!(args.unit.is_empty() || wanted.len() == args.unit.len(), "not all of {:?} are units", args.unit);

    let registry = out.join("kernels.inc");
    write_if_new(&registry, &registry_of(&wanted)?)?;
    let mut jobs = Vec::new();
    let emulator = sources.join("emulator");
    for unit in &wanted {
        let defines = [format!("-DKV8_MUTANT={}", args.mutant), format!("-D__CUDA_ARCH__={}0", args.sm)];
        let include = format!("-I{}", emulator.join("device").display());
        let flags = KERNEL_FLAGS.iter().map(|flag| (*flag).to_owned()).chain(defines);
        let flags = flags.chain([include, "-include".to_owned(), "cuda.hpp".to_owned()]).collect();
        jobs.push(Job::new(unit, flags, &headers(&emulator), &work)?);
    }
    let toolkit = Toolchain::find(None, None)?.headers()?;
    for file in
        files(&emulator.join("runtime"), "cpp")?.into_iter().chain(files(&emulator.join("driver"), "cpp")?)
    {
        // The driver's interface is declared in NVIDIA's header, whose warnings are not ours.
        let flags = own_flags().into_iter().chain(["-isystem".to_owned(), toolkit.display().to_string()]);
        let (include, besides) = if unit_name(&file) == "registry" {
            (vec![format!("-I{}", out.display())], vec![registry.clone()])
        } else {
            (Vec::new(), Vec::new())
        };
        jobs.push(Job::new(&file, flags.chain(include).collect(), &besides, &work)?);
    }
    let num_compiled = compile(&jobs, args.jobs)?;
    let library = out.join("libcuda.so.1");
    let exports = root.join("emulator/driver/exports.map");
    let exports = format!("-Wl,--version-script={}", exports.display());
    link(&jobs, &["-shared", "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs", &exports], &library)?;
    write_image(&out, &wanted, args)?;
    println!(
        "{} units, {} of {} files compiled: {}",
        wanted.len(),
        num_compiled,
        jobs.len(),
        library.display()
    );
    Ok(out)
}

/// The kernels of a unit. What its macros make is in the table of variants; `common` has the others.
fn symbols(unit: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(unit).with_context(|| format!("reading {}", unit.display()))?;
    let word =
        |text: &str| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().map(str::to_owned);
    let starts = text.match_indices("kv8_").map(|(at, _)| at);
    Ok(starts.filter_map(|at| word(&text[at..])).collect())
}

/// A line for each kernel: symbol, type of its parameters, threads and blocks of its launch bounds.
fn registry_of(units: &[PathBuf]) -> Result<String> {
    let table = Table::read(&workspace::kernels_crate().join("instances.toml"))?;
    let mut text = String::new();
    for unit in units {
        for symbol in symbols(unit)? {
            match table.row(&symbol) {
                Some(row) => writeln!(
                    text,
                    "KERNEL({symbol}, DecodeParams, {}, {})",
                    row.block_threads(),
                    row.min_ctas()
                )?,
                None => writeln!(text, "COMMON_KERNEL({symbol})")?,
            }
        }
    }
    Ok(text)
}

/// What stands for the kernel image: the units by name, and for each how a fatbin begins.
fn write_image(out: &Path, units: &[PathBuf], args: &Args) -> Result<()> {
    let mut image = Vec::new();
    let mut rows = Vec::new();
    for unit in units {
        rows.push(json!({
            "name": unit_name(unit), "offset": image.len(), "bytes": UNIT_BYTES, "symbols": symbols(unit)?,
        }));
        image.extend(FATBIN_HEAD);
        image.resize(image.len().next_multiple_of(UNIT_BYTES), 0);
    }
    let manifest = json!({
        "source_hash": source_hash(&workspace::kernels_crate()).context("hashing the kernel sources")?,
        "defines": [format!("KV8_MUTANT={}", args.mutant)],
        "units": rows,
    });
    std::fs::write(out.join("kv8.fatbin"), image)?;
    write_if_new(&out.join("manifest.json"), &serde_json::to_string_pretty(&manifest)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_registered_once_with_its_launch_bounds() {
        let crate_dir = workspace::kernels_crate();
        let table = std::fs::read_to_string(crate_dir.join("instances.toml")).unwrap();
        let registry = registry_of(&units(&crate_dir).unwrap()).unwrap();
        let mut symbols: Vec<&str> =
            registry.lines().filter_map(|line| line.split(['(', ',', ')']).nth(1)).collect();
        let num_common = registry.lines().filter(|line| line.starts_with("COMMON_")).count();
        assert_eq!(symbols.len(), table.matches("[[instance]]").count() + num_common);
        assert_eq!(num_common, 5, "append, dequantize, stage2, stream_read, stream_copy");
        symbols.sort_unstable();
        symbols.dedup();
        assert_eq!(symbols.len(), registry.lines().count());
        assert!(registry.contains("KERNEL(kv8_items_d128_g8_sf16_n1, DecodeParams, 256, "), "{registry}");
    }

    #[test]
    fn every_instruction_has_its_twin() {
        let names = |path: PathBuf| -> std::collections::BTreeSet<String> {
            let text = std::fs::read_to_string(path).unwrap();
            let (_, text) = text.split_once("namespace kv8::ptx").unwrap();
            let functions = text.lines().filter(|line| line.contains("inline") && !line.starts_with(' '));
            let name = |line: &str| line.split('(').next()?.split_whitespace().last().map(str::to_owned);
            functions.filter_map(name).collect()
        };
        let device = names(workspace::kernels_crate().join("cuda/common/ptx.cuh"));
        let emulated = names(workspace::root().join("emulator/device/ptx.cuh"));
        let missing: Vec<_> = device.difference(&emulated).collect();
        assert!(missing.is_empty() && device.len() > 30, "without a twin: {missing:?} of {}", device.len());
    }
}
