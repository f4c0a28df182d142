//! The host's compiler: files to objects, skipped when nothing that they include has changed, and objects to a program.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::kernels::compile::with_includes;
use crate::kernels::unit_name;
use crate::parallel;

/// Products are rounded one by one: the contraction that nvcc does by default would be the host compiler's choice here.
const FLAGS: [&str; 6] =
    ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread"];
/// f16 conversions are an instruction from here on. An object file says nothing of the machine that it was made on.
const ARCH_FLAGS: &[&str] = if cfg!(target_arch = "x86_64") { &["-march=x86-64-v3"] } else { &[] };
/// The emulator's own files are held to more than the kernels, which are nvcc's.
pub const OWN_FLAGS: [&str; 3] = ["-Wall", "-Wextra", "-Werror"];
pub const KERNEL_FLAGS: [&str; 2] = ["-Wno-unknown-pragmas", "-Wno-attributes"];

/// One file for the host's compiler.
pub struct Job {
    source: PathBuf,
    flags: Vec<String>,
    /// Everything that decides the output has gone into this name.
    object: PathBuf,
}

impl Job {
    /// `besides`: files that the command line brings in.
    pub fn new(source: &Path, flags: Vec<String>, besides: &[PathBuf], work: &Path) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        for flag in FLAGS.iter().chain(ARCH_FLAGS).copied().chain(flags.iter().map(String::as_str)) {
            hasher.update(flag.as_bytes());
        }
        for file in besides.iter().map(PathBuf::as_path).chain([source]) {
            for file in with_includes(file)? {
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
        compiler
            .args(FLAGS)
            .args(&self.flags)
            .args(["-x", "c++", "-c"])
            .arg(&self.source)
            .arg("-o")
            .arg(&new);
        let output = compiler.output().context("running g++")?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "g++ {}:\n{told}", self.source.display());
        Ok(std::fs::rename(&new, &self.object)?)
    }
}

/// Compiles what is not compiled yet. Answers how many files that were.
pub fn compile(jobs: &[Job], num_threads: Option<usize>) -> Result<usize> {
    let todo: Vec<&Job> = jobs.iter().filter(|job| !job.object.is_file()).collect();
    let name = |job: &&Job| unit_name(&job.source);
    parallel::run_all(&todo, parallel::num_threads(num_threads), name, |job| job.build())?;
    Ok(todo.len())
}

/// Links the objects; `to` is replaced as a whole, since a program may have it open.
pub fn link(jobs: &[Job], options: &[&str], to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    let mut linker = Command::new("g++");
    linker.arg("-pthread").args(options).arg("-o").arg(&new).args(jobs.iter().map(|job| &job.object));
    ensure!(linker.status().context("running g++")?.success(), "linking {} failed", to.display());
    Ok(std::fs::rename(&new, to)?)
}
