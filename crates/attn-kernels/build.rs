//! Looks for the kernel image that `cargo xtask kernels` made, and tells the crate what was found.
//!
//! Never runs nvcc. Without an image the crate still builds; it then answers "not built" at run time, so that check,
//! clippy and the tests work in a fresh clone.

#[cfg(feature = "cuda")]
#[path = "build/source_hash.rs"]
mod source_hash;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(kv8_image)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=KV8_KERNELS_DIR");
    #[cfg(feature = "cuda")]
    image::embed();
}

#[cfg(feature = "cuda")]
mod image {
    use std::path::{Path, PathBuf};

    use serde_json::Value;

    use crate::source_hash;

    const FATBIN: &str = "kv8.fatbin";
    const MANIFEST: &str = "manifest.json";

    pub fn embed() {
        let crate_dir = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
        let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
        for folder in ["cuda", "build", "instances.toml"] {
            if crate_dir.join(folder).exists() {
                println!("cargo::rerun-if-changed={folder}");
            }
        }
        let sources = source_hash::source_hash(&crate_dir).unwrap_or_else(|error| {
            println!("cargo::error=cannot hash the kernel sources: {error}");
            String::new()
        });
        let mut facts = match folder_of_image(&crate_dir) {
            Some(folder) => describe(&sources, &folder).unwrap_or_else(|problem| {
                println!("cargo::warning=kernel image in {} ignored: {problem}", folder.display());
                NOT_BUILT.to_owned()
            }),
            None => NOT_BUILT.to_owned(),
        };
        facts += &format!("pub const SOURCES: &str = {sources:?};\n");
        if let Err(error) = std::fs::write(out_dir.join("image_facts.rs"), facts) {
            println!("cargo::error=cannot write image_facts.rs: {error}");
        }
    }

    const NOT_BUILT: &str = "pub const STALE: Option<(&str, &str)> = None;\n\
        pub const CUDA_VERSION: (u32, u32) = (0, 0);\n\
        pub const ARCHS: &[&str] = &[];\n\
        pub const UNITS: &[Unit] = &[];\n";

    /// `KV8_KERNELS_DIR`, else the folder that a packaged crate carries, else the workspace's `target/kernels`.
    fn folder_of_image(crate_dir: &Path) -> Option<PathBuf> {
        let asked = std::env::var_os("KV8_KERNELS_DIR").map(PathBuf::from);
        let workspace = crate_dir.ancestors().nth(2).filter(|root| root.join("xtask/Cargo.toml").is_file());
        let built = workspace.map(|root| root.join("target/kernels"));
        if let Some(folder) = &built {
            // Cargo reruns a script on every build when a watched path is missing; an empty folder can be watched.
            let _ = std::fs::create_dir_all(folder);
        }
        for folder in [asked, Some(crate_dir.join("prebuilt")), built].into_iter().flatten() {
            if folder.is_dir() {
                println!("cargo::rerun-if-changed={}", folder.display());
            }
            if folder.join(FATBIN).is_file() && folder.join(MANIFEST).is_file() {
                return Some(folder);
            }
        }
        None
    }

    fn describe(sources: &str, folder: &Path) -> Result<String, String> {
        let text = std::fs::read_to_string(folder.join(MANIFEST)).map_err(|error| error.to_string())?;
        let manifest: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let string = |key: &str| manifest[key].as_str().ok_or(format!("the manifest has no {key}"));
        let built_from = string("source_hash")?;
        let stale = (built_from != sources).then_some((built_from, sources));
        if stale.is_some() {
            println!("cargo::warning=the kernel image is older than its sources: run `cargo xtask kernels`");
        }
        let version = string("cuda_version")?;
        let number = |part: Option<&str>| part.and_then(|part| part.parse::<u32>().ok());
        let mut parts = version.split('.');
        let (Some(major), Some(minor)) = (number(parts.next()), number(parts.next())) else {
            return Err(format!("cuda_version is {version}"));
        };
        let archs: Vec<&str> =
            manifest["archs"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if archs.is_empty() {
            return Err("the manifest has no archs".to_owned());
        }
        let units = units(&manifest).ok_or("the manifest's units are not in order")?;
        println!("cargo::rustc-cfg=kv8_image");
        println!("cargo::rustc-env=KV8_FATBIN={}", folder.join(FATBIN).display());
        println!("cargo::rustc-env=KV8_MANIFEST={}", folder.join(MANIFEST).display());
        Ok(format!(
            "pub const STALE: Option<(&str, &str)> = {stale:?};\n\
             pub const CUDA_VERSION: (u32, u32) = ({major}, {minor});\n\
             pub const ARCHS: &[&str] = &{archs:?};\n\
             pub const UNITS: &[Unit] = &[{units}];\n"
        ))
    }

    fn units(manifest: &Value) -> Option<String> {
        let mut text = String::new();
        for unit in manifest["units"].as_array()? {
            let (name, offset, bytes) =
                (unit["name"].as_str()?, unit["offset"].as_u64()?, unit["bytes"].as_u64()?);
            let symbols: Vec<&str> = unit["symbols"].as_array()?.iter().filter_map(Value::as_str).collect();
            let range = format!("{offset}..{}", offset + bytes);
            text += &format!("\n    Unit {{ name: {name:?}, range: {range}, symbols: &{symbols:?} }},");
        }
        Some(text)
    }
}
