//! `cargo xtask emulate`: an emulated GPU, for tests of the CUDA path on a machine without one.
//!
//! The kernels' own sources are compiled by g++ with headers that say what CUDA adds to C++ (`emulator/device`), linked
//! with a runtime that runs each CUDA thread as a fiber (`emulator/runtime`) and with the functions of the driver that
//! kv8 calls (`emulator/driver`), into a `libcuda.so.1`. A program that finds it first runs on it.
//! One file of the kernels stands for hardware and is replaced: `common/ptx.cuh`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::kernels::{compile, unit_name, units};
use crate::kernels::table::Table;
use crate::kernels::toolchain::Toolchain;
use crate::source_hash::source_hash;
use crate::{parallel, workspace};

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
    /// Run this with the emulated GPU as its only one
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Products are rounded one by one: the contraction that nvcc does by default would be the host compiler's choice here.
const FLAGS: [&str; 7] =
    ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread"];
/// The emulator's own files are held to more than the kernels, which are nvcc's.
const OWN_FLAGS: [&str; 3] = ["-Wall", "-Wextra", "-Werror"];
const KERNEL_FLAGS: [&str; 2] = ["-Wno-unknown-pragmas", "-Wno-attributes"];

/// How the kernels declare the dynamic shared memory of a block, and what stands there instead.
const SHARED: &str = "extern __shared__ __align__(128) uint8_t shared[];";
const SHARED_EMULATED: &str = "uint8_t* const shared = kv8::emulated::dynamic_shared();";

/// How every fatbin begins: its mark, and version 1.
const FATBIN_HEAD: [u8; 8] = [0x50, 0xed, 0x55, 0xba, 1, 0, 0, 0];
const UNIT_BYTES: usize = 64;

pub fn run(args: &Args) -> Result<()> {
    ensure!([80, 90].contains(&args.sm), "--sm {}; valid: 80, 90", args.sm);
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

/// Builds what is not built yet. Answers the folder of the library and of the image that stands for it.
fn build(args: &Args) -> Result<PathBuf> {
    let root = workspace::root();
    let work = root.join("target/emulator");
    let out = work.join(format!("sm_{}-mutant_{}", args.sm, args.mutant));
    std::fs::create_dir_all(&out)?;
    let sources = copy_sources(&root, &work)?;
    let all = units(&sources.join("attn-kernels"))?;
    let wanted: Vec<PathBuf> =
        all.into_iter().filter(|unit| args.unit.is_empty() || args.unit.contains(&unit_name(unit))).collect();
    ensure!(args.unit.is_empty() || wanted.len() == args.unit.len(), "not all of {:?} are units", args.unit);

    let registry = out.join("kernels.inc");
    write_if_new(&registry, &registry_of(&wanted)?)?;
    let mut jobs = Vec::new();
    let emulator = sources.join("emulator");
    let headers = ["cuda.hpp", "cuda_bf16.h", "cuda_fp16.h", "math_constants.h", "warp_instructions.hpp"]
        .map(|header| emulator.join("device").join(header));
    for unit in &wanted {
        let defines = [format!("-DKV8_MUTANT={}", args.mutant), format!("-D__CUDA_ARCH__={}0", args.sm)];
        let include = format!("-I{}", emulator.join("device").display());
        let flags = KERNEL_FLAGS.iter().map(|flag| (*flag).to_owned()).chain(defines);
        let flags = flags.chain([include, "-include".to_owned(), "cuda.hpp".to_owned()]).collect();
        jobs.push(Job::new(unit, flags, &headers, &work)?);
    }
    let toolkit = Toolchain::find(None, None)?.headers()?;
    for file in files(&emulator.join("runtime"), "cpp")?.into_iter().chain(files(&emulator.join("driver"), "cpp")?) {
        // The driver's interface is declared in NVIDIA's header, whose warnings are not ours.
        let flags = OWN_FLAGS.iter().map(|flag| (*flag).to_owned());
        let flags = flags.chain(["-isystem".to_owned(), toolkit.display().to_string()]);
        let (include, besides) = if unit_name(&file) == "registry" {
            (vec![format!("-I{}", out.display())], vec![registry.clone()])
        } else {
            (Vec::new(), Vec::new())
        };
        jobs.push(Job::new(&file, flags.chain(include).collect(), &besides, &work)?);
    }
    let todo: Vec<&Job> = jobs.iter().filter(|job| !job.object.is_file()).collect();
    let name = |job: &&Job| unit_name(&job.source);
    parallel::run_all(&todo, parallel::num_threads(args.jobs), name, |job| job.build())?;

    let library = out.join("libcuda.so.1");
    let new = out.join("libcuda.so.new");
    let mut link = Command::new("g++");
    link.args(["-shared", "-pthread", "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs"]);
    link.arg(format!("-Wl,--version-script={}", root.join("emulator/driver/exports.map").display()));
    link.arg("-o").arg(&new);
    link.args(jobs.iter().map(|job| &job.object));
    ensure!(link.status().context("running g++")?.success(), "linking {} failed", library.display());
    std::fs::rename(&new, &library)?;
    write_image(&out, &wanted, args)?;
    println!("{} units, {} of {} files compiled: {}", wanted.len(), todo.len(), jobs.len(), library.display());
    Ok(out)
}

/// One file for the host's compiler.
struct Job {
    source: PathBuf,
    flags: Vec<String>,
    /// Everything that decides the output has gone into this name.
    object: PathBuf,
}

impl Job {
    /// `besides`: files that the command line brings in.
    fn new(source: &Path, flags: Vec<String>, besides: &[PathBuf], work: &Path) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        for flag in FLAGS.iter().copied().chain(flags.iter().map(String::as_str)) {
            hasher.update(flag.as_bytes());
        }
        for file in besides.iter().map(PathBuf::as_path).chain([source]) {
            for file in compile::with_includes(file)? {
                hasher.update(&std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?);
            }
        }
        let hash = hasher.finalize().to_hex();
        let object = work.join(format!("objects/{}.{}.o", unit_name(source), &hash.as_str()[..16]));
        Ok(Self { source: source.to_owned(), flags, object })
    }

    fn build(&self) -> Result<()> {
        let new = self.object.with_extension("new");
        if let Some(folder) = new.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut compiler = Command::new("g++");
        compiler.args(FLAGS).args(&self.flags).args(["-x", "c++", "-c"]).arg(&self.source).arg("-o").arg(&new);
        let output = compiler.output().context("running g++")?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "g++ {}:\n{told}", self.source.display());
        Ok(std::fs::rename(&new, &self.object)?)
    }
}

/// The kernels' sources and the emulator's side by side, as they are compiled: those that stand for hardware replaced.
fn copy_sources(root: &Path, work: &Path) -> Result<PathBuf> {
    let sources = work.join("sources");
    let kernels = workspace::kernels_crate().join("cuda");
    for folder in ["append", "cache", "common", "decode", "instances", "params", "quant", "softmax"] {
        copy(&kernels.join(folder), &sources.join("attn-kernels/cuda").join(folder))?;
    }
    for folder in ["device", "runtime", "driver"] {
        copy(&root.join("emulator").join(folder), &sources.join("emulator").join(folder))?;
    }
    let ptx = std::fs::read_to_string(root.join("emulator/device/ptx.cuh"))?;
    write_if_new(&sources.join("attn-kernels/cuda/common/ptx.cuh"), &ptx)?;
    let macros = sources.join("attn-kernels/cuda/decode/kernels.cuh");
    let text = std::fs::read_to_string(kernels.join("decode/kernels.cuh"))?;
    ensure!(text.contains(SHARED), "decode/kernels.cuh declares its shared memory otherwise: bring emulate.rs up to it");
    write_if_new(&macros, &text.replace(SHARED, SHARED_EMULATED))?;
    Ok(sources)
}

/// Files of a folder by their ending, sorted.
fn files(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == ending));
    files.sort();
    Ok(files)
}

/// Makes `to` hold the sources of `from` and no others.
fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for ending in ["cu", "cuh", "h", "hpp", "cpp"] {
        for old in files(to, ending)? {
            if !from.join(old.file_name().unwrap_or_default()).is_file() {
                std::fs::remove_file(old)?;
            }
        }
        for file in files(from, ending)? {
            let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            write_if_new(&to.join(file.file_name().unwrap_or_default()), &text)?;
        }
    }
    Ok(())
}

fn write_if_new(path: &Path, text: &str) -> Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// The kernels of a unit. What its macros make is in the table of variants; `common` has the others.
fn symbols(unit: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(unit).with_context(|| format!("reading {}", unit.display()))?;
    let word = |text: &str| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().map(str::to_owned);
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
