//! `cargo xtask package`: the crates as they are published, with the kernel image in `attn-kernels`, so that who depends on
//! them needs neither nvcc nor Python.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::source_hash::source_hash;
use crate::workspace;

#[derive(clap::Args)]
pub struct Args {
    /// Where the crates go; replaced if it is there [default: target/package]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Build a small program that depends on the result, outside this workspace, and run it
    #[arg(long)]
    check: bool,
}

/// The crate that the others are packed for: it depends on all that is published.
const TOP: &str = "attn-backend";
/// The crate that carries the image.
const CARRIER: &str = "attn-kernels";
/// What a published image has to hold.
const ARCHS: [&str; 4] = ["sm_80", "compute_80", "sm_89", "sm_90a"];
const FILES: [&str; 2] = ["kv8.fatbin", "manifest.json"];
/// A file by which the output is known, so that nothing else is ever removed.
const MARK: &str = "README.md";
const MARK_LINE: &str = "# Crates of kv8 with their kernel image";

pub fn run(args: &Args) -> Result<()> {
    let root = workspace::root();
    let out = args.out.clone().unwrap_or_else(|| root.join("target/package"));
    let before = fs::read_to_string(out.join(MARK)).unwrap_or_default();
    let empty = fs::read_dir(&out).map_or(true, |mut entries| entries.next().is_none());
    ensure!(
        empty || before.starts_with(MARK_LINE),
        "{} holds something else; it is left alone",
        out.display()
    );
    let version = check_image()?;
    let crates = published(&root)?;

    let build = root.join("target/package-build");
    {
        let _prebuilt = Prebuilt::place(&workspace::kernels_crate().join("prebuilt"))?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["package", "--no-verify", "--allow-dirty", "--quiet", "--target-dir"])
            .arg(&build)
            .args(crates.iter().flat_map(|name| ["-p", name.as_str()]))
            .current_dir(&root)
            .status()
            .context("running cargo")?;
        ensure!(status.success(), "cargo package failed");
    }
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("removing {}", out.display()))?;
    }
    fs::create_dir_all(&out)?;
    let mut folders = Vec::new();
    for name in &crates {
        folders.push((name.as_str(), unpack(&build.join("package"), name, &out)?));
    }
    let carrier = folders.iter().find(|(name, _)| *name == CARRIER).map(|(_, folder)| folder);
    let image = carrier.map(|folder| out.join(folder).join("prebuilt").join(FILES[0]));
    ensure!(image.is_some_and(|image| image.is_file()), "the image did not get into {CARRIER}");
    let link = out.join("cuda-link/lib64");
    fs::create_dir_all(&link)?;
    fs::copy(root.join("cuda-link/lib64/libcuda.a"), link.join("libcuda.a"))?;
    fs::write(out.join(MARK), readme(&folders))?;
    println!("{} crates, image of nvcc {version}: {}", crates.len(), out.display());
    if args.check {
        check(&out, &folders)?;
    }
    Ok(())
}

/// The names of [`TOP`] and of every crate of this workspace that it needs, in the order of their dependencies.
fn published(root: &Path) -> Result<Vec<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("running cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let mut order = Vec::new();
    push_after_needs(packages, TOP, &mut order);
    Ok(order)
}

/// Appends `name` behind what it needs, each once.
fn push_after_needs(packages: &[Value], name: &str, order: &mut Vec<String>) {
    let Some(package) = packages.iter().find(|package| package["name"] == name) else { return };
    if order.iter().any(|known| known == name) {
        return;
    }
    let needs = package["dependencies"].as_array().into_iter().flatten();
    for need in needs.filter(|need| need["kind"] != "dev" && need["path"].is_string()) {
        push_after_needs(packages, need["name"].as_str().unwrap_or_default(), order);
    }
    order.push(name.to_owned());
}

/// The image is there, whole, and of these sources. Answers the version of nvcc.
fn check_image() -> Result<String> {
    let path = workspace::kernels_output().join(FILES[1]);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("reading {}: run `cargo xtask kernels` first", path.display()))?;
    let manifest: Value = serde_json::from_str(&text)?;
    let hash = source_hash(&workspace::kernels_crate())?;
    ensure!(manifest["source_hash"] == hash.as_str(), "the kernel image is stale: run `cargo xtask kernels`");
    let archs: Vec<&str> =
        manifest["archs"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let missing: Vec<&str> = ARCHS.into_iter().filter(|arch| !archs.contains(arch)).collect();
    ensure!(missing.is_empty(), "the kernel image lacks {}: run `cargo xtask kernels`", missing.join(", "));
    let no_defines = manifest["defines"].as_array().is_none_or(Vec::is_empty);
    ensure!(no_defines, "the kernel image was built with definitions: run `cargo xtask kernels`");
    Ok(manifest["nvcc_version"].as_str().unwrap_or("?").to_owned())
}

/// The image inside the crate while it is packed. It must not stay: the build script would prefer it.
struct Prebuilt(PathBuf);

impl Prebuilt {
    fn place(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let placed = Self(folder.to_path_buf());
        for file in FILES {
            fs::copy(workspace::kernels_output().join(file), folder.join(file))
                .with_context(|| format!("copying {file}"))?;
        }
        Ok(placed)
    }
}

impl Drop for Prebuilt {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Unpacks `name-VERSION.crate`; answers its folder's name.
fn unpack(packed: &Path, name: &str, out: &Path) -> Result<String> {
    let folder = format!("{name}-{}", env!("CARGO_PKG_VERSION"));
    let file = packed.join(format!("{folder}.crate"));
    let status =
        Command::new("tar").arg("-xzf").arg(&file).arg("-C").arg(out).status().context("running tar")?;
    ensure!(status.success(), "tar could not unpack {}", file.display());
    Ok(folder)
}

fn patches(folders: &[(&str, String)], prefix: &str) -> String {
    let lines = folders.iter().map(|(name, folder)| format!("{name} = {{ path = \"{prefix}{folder}\" }}\n"));
    format!("[patch.crates-io]\n{}", lines.collect::<String>())
}

fn readme(folders: &[(&str, String)]) -> String {
    format!(
        "{MARK_LINE}\n\n\
         Written by `cargo xtask package`. Each folder is a crate as it is published; `attn-kernels` carries the CUDA\n\
         kernels as machine code and PTX, so that nothing here needs nvcc, Python or a toolkit.\n\n\
         In the Cargo.toml of a workspace:\n\n\
         ```toml\n[dependencies]\nattn-backend = {{ version = \"{}\", features = [\"cuda\"] }}\n\n{}```\n\n\
         In its `.cargo/config.toml`, on machines without a CUDA toolkit (the build script of `cust` wants a folder):\n\n\
         ```toml\n[env]\nCUDA_LIBRARY_PATH = \"/path/to/this/folder/cuda-link\"\n```\n",
        env!("CARGO_PKG_VERSION"),
        patches(folders, "/path/to/this/folder/"),
    )
}

/// Builds and runs a dependent in a folder of its own, far from this workspace's settings.
fn check(out: &Path, folders: &[(&str, String)]) -> Result<()> {
    let out = out.canonicalize()?;
    let project = std::env::temp_dir().join(format!("kv8-package-check-{}", std::process::id()));
    fs::create_dir_all(project.join("src"))?;
    let manifest = format!(
        "[package]\nname = \"package-check\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
         attn-backend = {{ version = \"{version}\", features = [\"cuda\"] }}\n\
         attn-kernels = {{ version = \"{version}\", features = [\"cuda\"] }}\n\n{}",
        patches(folders, &format!("{}/", out.display())),
        version = env!("CARGO_PKG_VERSION"),
    );
    fs::write(project.join("Cargo.toml"), manifest)?;
    fs::write(
        project.join("src/main.rs"),
        "use attn_backend as _;\n\
         fn main() -> Result<(), attn_kernels::image::ImageError> {\n    \
             let image = attn_kernels::image::embedded()?;\n    \
             println!(\"image: {} bytes, {} units; device: {:?}\", image.bytes.len(), image.units.len(), \
             attn_kernels::probe::probe(0).map(|facts| facts.name));\n    \
             Ok(())\n}\n",
    )?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["run", "--quiet"])
        .current_dir(&project)
        .env("CUDA_LIBRARY_PATH", out.join("cuda-link"))
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("KV8_KERNELS_DIR")
        .status()
        .context("running cargo")?;
    let _ = fs::remove_dir_all(&project);
    ensure!(status.success(), "a dependent of the packaged crates does not build or run");
    println!("a dependent builds and runs");
    Ok(())
}
