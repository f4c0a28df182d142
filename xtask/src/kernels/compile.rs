//! Jobs: one unit for one architecture, from source to PTX to machine code; run in parallel, skipped when unchanged.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::parallel;

use super::resources::{self, Resources};
use super::toolchain::Toolchain;
use super::unit_name;

/// One architecture: the machine code, and whether its PTX goes into the image too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// "80", "90a"...
    sm: String,
    with_ptx: bool,
}

impl Target {
    /// Code for A100, for Ada, for Hopper; PTX of the lowest for whatever comes.
    fn defaults() -> Vec<Self> {
        let target = |sm: &str, with_ptx| Self { sm: sm.to_owned(), with_ptx };
        vec![target("80", true), target("89", false), target("90a", false)]
    }

    /// From names such as `sm_90a`; none given means all.
    pub fn parse_all(names: &[String]) -> Result<Vec<Self>> {
        if names.is_empty() {
            return Ok(Self::defaults());
        }
        let mut targets = Vec::new();
        for name in names {
            let sm = name.strip_prefix("sm_").unwrap_or(name);
            let digits = sm.trim_end_matches(['a', 'f']);
            let number: u32 =
                digits.parse().with_context(|| format!("--arch {name}; valid: sm_80, sm_90a ..."))?;
            ensure!(number >= 80, "--arch {name}: the kernels start at sm_80");
            targets.push(Self { sm: sm.to_owned(), with_ptx: false });
        }
        Ok(targets)
    }

    pub fn arch(&self) -> String {
        format!("sm_{}", self.sm)
    }

    /// What the image holds of this target.
    pub fn names(&self) -> Vec<String> {
        let ptx = self.with_ptx.then(|| format!("compute_{}", self.sm));
        std::iter::once(self.arch()).chain(ptx).collect()
    }
}

/// One unit for one target.
pub struct Job {
    pub unit_idx: usize,
    pub unit: PathBuf,
    pub target: Target,
    flags: Vec<String>,
    /// Everything that decides the output has gone into this name.
    base: PathBuf,
}

impl Job {
    pub fn new(
        unit_idx: usize,
        unit: &Path,
        target: &Target,
        flags: &[String],
        toolchain: &Toolchain,
        work: &Path,
    ) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(toolchain.version.to_string().as_bytes());
        add(target.sm.as_bytes());
        flags.iter().for_each(|flag| add(flag.as_bytes()));
        for file in with_includes(unit)? {
            add(&std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?);
        }
        let hash = hasher.finalize().to_hex();
        let base = work.join(format!("{}.sm_{}.{}", unit_name(unit), target.sm, &hash.as_str()[..16]));
        Ok(Self { unit_idx, unit: unit.to_path_buf(), target: target.clone(), flags: flags.to_vec(), base })
    }

    fn file(&self, extension: &str) -> PathBuf {
        let mut name = self.base.clone().into_os_string();
        name.push(".");
        name.push(extension);
        name.into()
    }

    fn is_built(&self) -> bool {
        ["ptx", "cubin", "log"].iter().all(|extension| self.file(extension).is_file())
    }

    /// What ptxas said of each kernel of the unit.
    pub fn resources(&self) -> Result<Vec<Resources>> {
        let log = std::fs::read_to_string(self.file("log"))?;
        resources::parse(&log)
            .with_context(|| format!("{} for {}", unit_name(&self.unit), self.target.arch()))
    }

    fn build(&self, toolchain: &Toolchain) -> Result<()> {
        let (ptx, cubin) = (self.file("ptx"), self.file("cubin.new"));
        let nvcc = Command::new(&toolchain.nvcc)
            .arg("--ptx")
            .arg(format!("-arch=compute_{}", self.target.sm))
            .args(&self.flags)
            .arg(&self.unit)
            .arg("-o")
            .arg(&ptx)
            .output()
            .context("running nvcc")?;
        let told = String::from_utf8_lossy(&nvcc.stderr).into_owned();
        ensure!(nvcc.status.success(), "nvcc {}:\n{told}", self.unit.display());
        let mut ptxas = Command::new(&toolchain.ptxas);
        ptxas.arg(format!("-arch={}", self.target.arch())).args(["-m64", "-O3", "-v"]);
        if self.flags.iter().any(|flag| flag == "-lineinfo") {
            ptxas.arg("--generate-line-info");
        }
        let ptxas = ptxas.arg(&ptx).arg("-o").arg(&cubin).output().context("running ptxas")?;
        let log = String::from_utf8_lossy(&ptxas.stderr);
        ensure!(ptxas.status.success(), "ptxas {} for {}:\n{log}", self.unit.display(), self.target.arch());
        if !told.trim().is_empty() {
            eprintln!("{}", told.trim_end());
        }
        std::fs::rename(&cubin, self.file("cubin"))?;
        // Last, since it marks the job as done.
        std::fs::write(self.file("log"), log.as_bytes())?;
        Ok(())
    }
}

/// Runs the jobs that are not built yet, `num_threads` at a time. Answers how many there were.
pub fn run_all(jobs: &[Job], toolchain: &Toolchain, num_threads: usize) -> Result<usize> {
    let todo: Vec<&Job> = jobs.iter().filter(|job| !job.is_built()).collect();
    let name = |job: &&Job| format!("{} {}", unit_name(&job.unit), job.target.arch());
    parallel::run_all(&todo, num_threads, name, |job| job.build(toolchain))?;
    Ok(todo.len())
}

/// One unit's machine codes and PTX as one fatbin.
pub fn bind(unit: &str, jobs: &[Job], toolchain: &Toolchain, work: &Path) -> Result<Vec<u8>> {
    let path = work.join(format!("{unit}.fatbin"));
    let mut command = Command::new(&toolchain.fatbinary);
    command.args(["-64", "--compress-mode=size"]).arg(format!("--create={}", path.display()));
    for job in jobs {
        let sm = &job.target.sm;
        if job.target.with_ptx {
            command.arg(format!("--image3=kind=ptx,sm={sm},file={}", job.file("ptx").display()));
        }
        command.arg(format!("--image3=kind=elf,sm={sm},file={}", job.file("cubin").display()));
    }
    let output = command.output().context("running fatbinary")?;
    ensure!(output.status.success(), "fatbinary for {unit}:\n{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
}

/// A file and all that it includes in quotes, however deep. Includes in angle brackets are the toolkit's and covered by
/// its version.
pub fn with_includes(file: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut seen = BTreeSet::new();
    let mut todo = vec![file.canonicalize().with_context(|| format!("reading {}", file.display()))?];
    while let Some(file) = todo.pop() {
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        for line in text.lines() {
            let Some(rest) = line.trim_start().strip_prefix('#') else { continue };
            let Some(rest) = rest.trim_start().strip_prefix("include") else { continue };
            let Some(name) = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next())
            else {
                continue;
            };
            let path = file.with_file_name(name);
            let path =
                path.canonicalize().with_context(|| format!("{} includes \"{name}\"", file.display()))?;
            if !seen.contains(&path) {
                todo.push(path);
            }
        }
        seen.insert(file);
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::Target;

    #[test]
    fn targets_are_named_as_nvcc_names_them() {
        let names: Vec<String> = Target::parse_all(&[]).unwrap().iter().flat_map(Target::names).collect();
        assert_eq!(names, ["sm_80", "compute_80", "sm_89", "sm_90a"]);
        assert_eq!(Target::parse_all(&["sm_90a".to_owned()]).unwrap()[0].names(), ["sm_90a"]);
        assert!(Target::parse_all(&["sm_75".to_owned()]).is_err());
        assert!(Target::parse_all(&["hopper".to_owned()]).is_err());
    }
}
