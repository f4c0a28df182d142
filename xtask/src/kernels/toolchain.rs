//! Finding nvcc: the option, PATH, CUDA_HOME, else NVIDIA's pip packages in a cache folder.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use etcetera::BaseStrategy;

/// What a compiler from pip consists of: 104 MB to download, 271 MB installed. The versions belong together.
const PIP_PACKAGES: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];
const PIP_FOLDER: &str = "nvcc-13.0.88";
/// Where these packages put the toolkit, below the folder they are installed to.
const PIP_TOOLKIT: &str = "nvidia/cu13";

/// `nvcc`'s own version, such as 13.0.88.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// The first nvcc whose options and architectures are all used here.
    const LOWEST: Self = Self { major: 12, minor: 4, patch: 0 };

    /// The CUDA version, which is what drivers are compared with.
    pub fn cuda(self) -> String {
        format!("{}.{}", self.major, self.minor)
    }

    /// From `nvcc --version`, whose line "Cuda compilation tools, release 13.0, V13.0.88" ends with it.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(", V").nth(1)?.split_whitespace().next()?.split('.').map(str::parse);
        let mut next = || parts.next()?.ok();
        Some(Self { major: next()?, minor: next()?, patch: next()? })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A compiler with its companions, which lie beside it.
pub struct Toolchain {
    pub nvcc: PathBuf,
    pub ptxas: PathBuf,
    pub fatbinary: PathBuf,
    pub version: Version,
    /// Which rule found it.
    pub origin: &'static str,
}

impl Toolchain {
    pub fn find(asked: Option<&Path>, cache_dir: Option<&Path>) -> Result<Self> {
        if let Some(nvcc) = asked {
            return Self::at(nvcc, "--nvcc").with_context(|| format!("--nvcc {}", nvcc.display()));
        }
        check_host_compiler()?;
        let mut refused = Vec::new();
        for (nvcc, origin) in candidates() {
            match Self::at(&nvcc, origin) {
                Ok(toolchain) => return Ok(toolchain),
                Err(error) => refused.push(format!("{} ({origin}): {error:#}", nvcc.display())),
            }
        }
        for refusal in &refused {
            println!("not used: {refusal}");
        }
        let nvcc = pip_nvcc(cache_dir)?;
        Self::at(&nvcc, "pip packages").with_context(|| nvcc.display().to_string())
    }

    fn at(nvcc: &Path, origin: &'static str) -> Result<Self> {
        let output = Command::new(nvcc).arg("--version").output().context("nvcc does not run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version =
            Version::parse(&text).with_context(|| format!("nvcc --version says: {}", text.trim()))?;
        ensure!(version >= Version::LOWEST, "nvcc {version} is older than {}", Version::LOWEST);
        // A link on PATH may stand for the real one; the companions are beside that.
        let real = nvcc.canonicalize().unwrap_or_else(|_| nvcc.to_path_buf());
        let beside = |name: &str| -> Result<PathBuf> {
            let path = real.with_file_name(name);
            ensure!(path.is_file(), "no {name} beside {}", real.display());
            Ok(path)
        };
        let (ptxas, fatbinary) = (beside("ptxas")?, beside("fatbinary")?);
        Ok(Self { nvcc: real, ptxas, fatbinary, version, origin })
    }

    /// The folder of CUDA's headers.
    pub fn headers(&self) -> Result<PathBuf> {
        let toolkit = self.nvcc.ancestors().nth(2).unwrap_or(Path::new("/"));
        let folder = toolkit.join("include");
        ensure!(folder.join("cuda.h").is_file(), "no cuda.h in {}", folder.display());
        Ok(folder)
    }
}

/// nvcc preprocesses with the host's compiler, also where nothing is compiled for the host.
fn check_host_compiler() -> Result<()> {
    let found = Command::new("g++").arg("--version").output().is_ok_and(|output| output.status.success());
    ensure!(found, "nvcc needs g++ on PATH (on Debian and Ubuntu: apt-get install g++)");
    Ok(())
}

fn candidates() -> Vec<(PathBuf, &'static str)> {
    let mut candidates = Vec::new();
    if let Some(path) = std::env::var_os("PATH") {
        let on_path =
            std::env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
        candidates.extend(on_path.map(|nvcc| (nvcc, "PATH")));
    }
    for (variable, origin) in [("CUDA_HOME", "CUDA_HOME"), ("CUDA_PATH", "CUDA_PATH")] {
        let home = std::env::var_os(variable).map(PathBuf::from);
        let nvcc = home.map(|home| home.join("bin/nvcc")).filter(|nvcc| nvcc.is_file());
        candidates.extend(nvcc.map(|nvcc| (nvcc, origin)));
    }
    candidates
}

/// The nvcc of the pip packages, installed first if it is not there yet.
fn pip_nvcc(cache_dir: Option<&Path>) -> Result<PathBuf> {
    let folder = cache_folder(cache_dir)?.join(PIP_FOLDER);
    let nvcc = folder.join(PIP_TOOLKIT).join("bin/nvcc");
    if nvcc.is_file() {
        return Ok(nvcc);
    }
    println!("no nvcc here: installing NVIDIA's pip packages (104 MB to download) into {}", folder.display());
    let python = python_with_pip()?;
    // Installed beside, then renamed: an interrupted download leaves nothing that looks complete.
    let new = folder.with_extension(format!("new-{}", std::process::id()));
    std::fs::create_dir_all(&new).with_context(|| format!("creating {}", new.display()))?;
    let status = Command::new(python)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"])
        .args(["--only-binary=:all:", "--target"])
        .arg(&new)
        .args(PIP_PACKAGES)
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .status()
        .context("running pip")?;
    if !status.success() {
        let _ = std::fs::remove_dir_all(&new);
        bail!("pip could not install {}; give an nvcc with --nvcc instead", PIP_PACKAGES.join(" "));
    }
    if let Err(error) = std::fs::rename(&new, &folder) {
        // Somebody else may have been faster.
        let _ = std::fs::remove_dir_all(&new);
        ensure!(nvcc.is_file(), "moving the packages to {}: {error}", folder.display());
    }
    ensure!(nvcc.is_file(), "the pip packages brought no nvcc to {}", nvcc.display());
    Ok(nvcc)
}

fn cache_folder(asked: Option<&Path>) -> Result<PathBuf> {
    if let Some(folder) = asked {
        return Ok(folder.to_path_buf());
    }
    if let Some(folder) = std::env::var_os("KV8_CACHE_DIR") {
        return Ok(PathBuf::from(folder));
    }
    let strategy = etcetera::choose_base_strategy().context("no home folder; give --cache-dir")?;
    Ok(strategy.cache_dir().join("kv8"))
}

fn python_with_pip() -> Result<&'static str> {
    for python in ["python3", "python"] {
        let answer = Command::new(python).args(["-m", "pip", "--version"]).output();
        if answer.is_ok_and(|output| output.status.success()) {
            return Ok(python);
        }
    }
    bail!("no nvcc and no Python with pip to get one: give an nvcc with --nvcc, or install python3-pip")
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn versions_are_read_from_the_last_line() {
        let text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\nBuild x\n";
        let version = Version::parse(text).unwrap();
        assert_eq!((version.to_string(), version.cuda()), ("13.0.88".to_owned(), "13.0".to_owned()));
        assert!(version > Version::LOWEST);
        assert_eq!(Version::parse("clang version 17"), None);
    }
}
