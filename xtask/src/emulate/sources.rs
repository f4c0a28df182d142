//! The sources as the host's compiler gets them: the kernels' and the emulator's side by side in a folder of the build.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace;

/// How the kernels declare the dynamic shared memory of a block, and what stands there instead.
const SHARED: &str = "extern __shared__ __align__(128) uint8_t shared[];";
const SHARED_EMULATED: &str = "uint8_t* const shared = kv8::emulated::dynamic_shared();";

/// The kernels' sources and the emulator's side by side, as they are compiled: those that stand for hardware replaced.
pub fn copy(root: &Path, work: &Path) -> Result<PathBuf> {
    let sources = work.join("sources");
    let kernels = workspace::kernels_crate().join("cuda");
    for folder in ["append", "cache", "common", "decode", "instances", "params", "quant", "softmax"] {
        mirror(&kernels.join(folder), &sources.join("attn-kernels/cuda").join(folder))?;
    }
    for folder in ["checks", "device", "driver", "runtime"] {
        mirror(&root.join("emulator").join(folder), &sources.join("emulator").join(folder))?;
    }
    let ptx = std::fs::read_to_string(root.join("emulator/device/ptx.cuh"))?;
    write_if_new(&sources.join("attn-kernels/cuda/common/ptx.cuh"), &ptx)?;
    let macros = sources.join("attn-kernels/cuda/decode/kernels.cuh");
    let text = std::fs::read_to_string(kernels.join("decode/kernels.cuh"))?;
    ensure!(
        text.contains(SHARED),
        "decode/kernels.cuh declares its shared memory otherwise: bring emulate.rs up to it"
    );
    write_if_new(&macros, &text.replace(SHARED, SHARED_EMULATED))?;
    Ok(sources)
}

/// Files of a folder by their ending, sorted.
pub fn files(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == ending));
    files.sort();
    Ok(files)
}

/// Makes `to` hold the sources of `from` and no others.
fn mirror(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for ending in ["cu", "cuh", "h", "hpp", "cpp"] {
        for old in files(to, ending)? {
            if !from.join(old.file_name().unwrap_or_default()).is_file() {
                std::fs::remove_file(old)?;
            }
        }
        for file in files(from, ending)? {
            let text =
                std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            write_if_new(&to.join(file.file_name().unwrap_or_default()), &text)?;
        }
    }
    Ok(())
}

pub fn write_if_new(path: &Path, text: &str) -> Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_declare_shared_memory_as_expected() {
        let text =
            std::fs::read_to_string(workspace::kernels_crate().join("cuda/decode/kernels.cuh")).unwrap();
        assert_eq!(text.matches(SHARED).count(), text.matches("extern __shared__").count());
    }
}
