//! The hash that ties a kernel image to the sources it was built from; shared by the build script and xtask.

use std::io;
use std::path::{Path, PathBuf};

/// Hash of every file under `cuda/` that a kernel is made from and of `instances.toml`, names and contents, in the order of their names.
pub fn source_hash(crate_dir: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for file in source_files(crate_dir)? {
        let name = file.strip_prefix(crate_dir).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        let bytes = std::fs::read(&file)?;
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The files that the hash covers, sorted. Documentation (`.md`), hidden files and the scripts in `cuda/dev` do not count.
pub fn source_files(crate_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let table = crate_dir.join("instances.toml");
    if table.is_file() {
        files.push(table);
    }
    let scripts = crate_dir.join("cuda/dev");
    let mut folders = vec![crate_dir.join("cuda")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name.starts_with('.') || name.ends_with(".md") {
                continue;
            }
            if path.is_dir() {
                if path != scripts {
                    folders.push(path);
                }
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}
