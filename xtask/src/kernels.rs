//! `cargo xtask kernels`: compiles the CUDA sources into one image with a manifest.
//!
//! Each file of `cuda/instances` is a unit. A unit is compiled for every architecture (a job each, in parallel, skipped
//! when nothing that it includes has changed), and its machine codes and PTX become one fatbin. The image is these
//! fatbins one after the other, so that a program loads only the units it uses.

pub mod compile;
mod manifest;
mod occupancy;
mod resources;
pub mod table;
pub mod toolchain;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::parallel;
use crate::source_hash::source_hash;
use crate::workspace;
use compile::{Job, Target};
use manifest::{KernelRow, Manifest, UnitRow};
use table::Table;
use toolchain::Toolchain;

#[derive(clap::Args)]
pub struct Args {
    /// The nvcc to use [default: on PATH, under CUDA_HOME, else the pip packages of NVIDIA in a cache folder]
    #[arg(long, value_name = "PATH")]
    nvcc: Option<PathBuf>,
    /// Jobs at a time [default: the number of processors]
    #[arg(short, long)]
    jobs: Option<usize>,
    /// Machine code to build, such as sm_90a; may be given several times [default: sm_80, sm_89, sm_90a and PTX]
    #[arg(long, value_name = "ARCH")]
    arch: Vec<String>,
    /// Preprocessor definition passed to nvcc; may be given several times
    #[arg(short = 'D', long, value_name = "NAME=VALUE")]
    define: Vec<String>,
    /// Keep source line numbers in the machine code, for profilers
    #[arg(long)]
    lineinfo: bool,
    /// Where the image and the manifest go [default: target/kernels]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Where pip packages of nvcc are kept [default: the user's cache folder; also KV8_CACHE_DIR]
    #[arg(long, value_name = "FOLDER")]
    cache_dir: Option<PathBuf>,
    /// Report spills and low occupancy without failing
    #[arg(long)]
    no_gate: bool,
    /// Build this file of cuda/instances alone (its name without .cu); may be given several times [default: all]
    #[arg(long, value_name = "NAME")]
    unit: Vec<String>,
}

impl Args {
    /// A part of the image, for sm_90a, as the mutants of the kernels are built.
    pub fn part(units: &[&str], define: String, out: PathBuf) -> Self {
        Self {
            nvcc: None,
            jobs: None,
            arch: vec!["sm_90a".to_owned()],
            define: vec![define],
            lineinfo: false,
            out: Some(out),
            cache_dir: None,
            no_gate: true,
            unit: units.iter().map(|unit| (*unit).to_owned()).collect(),
        }
    }
}

pub fn run(args: &Args) -> Result<()> {
    let begin = Instant::now();
    let crate_dir = workspace::kernels_crate();
    let out = args.out.clone().unwrap_or_else(workspace::kernels_output);
    let work = workspace::root().join("target/kernels-work");
    std::fs::create_dir_all(&out)?;
    std::fs::create_dir_all(&work)?;

    let toolchain = Toolchain::find(args.nvcc.as_deref(), args.cache_dir.as_deref())?;
    println!("nvcc {} ({})", toolchain.version, toolchain.origin);
    let table = Table::read(&crate_dir.join("instances.toml"))?;
    let mut units = units(&crate_dir)?;
    if !args.unit.is_empty() {
        let all: Vec<String> = units.iter().map(|unit| unit_name(unit)).collect();
        let unknown: Vec<&String> = args.unit.iter().filter(|unit| !all.contains(unit)).collect();
        ensure!(unknown.is_empty(), "no units {unknown:?}; there are {all:?}");
        units.retain(|unit| args.unit.contains(&unit_name(unit)));
    }
    let targets = Target::parse_all(&args.arch)?;
    let flags = flags(args);

    if table.write_rust(&crate_dir)? {
        println!("src/instances.rs brought up to instances.toml");
    }
    let mut jobs = Vec::new();
    for (unit_idx, unit) in units.iter().enumerate() {
        for target in &targets {
            if table.wants(unit, &target.arch())? {
                jobs.push(Job::new(unit_idx, unit, target, &flags, &toolchain, &work)?);
            }
        }
    }
    let built = compile::run_all(&jobs, &toolchain, parallel::num_threads(args.jobs))?;

    let mut image = Vec::new();
    let mut unit_rows = Vec::new();
    let mut kernels = Vec::new();
    for jobs in jobs.chunk_by(|a, b| a.unit_idx == b.unit_idx) {
        let Some(first) = jobs.first() else { continue };
        let name = unit_name(&first.unit);
        let fatbin = compile::bind(&name, jobs, &toolchain, &work)?;
        image.resize(image.len().next_multiple_of(64), 0);
        let symbols = resources::symbols(jobs)?;
        unit_rows.push(UnitRow { name: name.clone(), offset: image.len(), bytes: fatbin.len(), symbols });
        image.extend(fatbin);
        for job in jobs {
            for resources in job.resources()? {
                kernels.push(KernelRow::new(&name, resources, &table)?);
            }
        }
    }
    let problems = table.check(&kernels, args.unit.is_empty());
    let manifest = Manifest {
        source_hash: source_hash(&crate_dir).context("hashing the kernel sources")?,
        nvcc_version: toolchain.version.to_string(),
        cuda_version: toolchain.version.cuda(),
        nvcc_origin: toolchain.origin.to_owned(),
        flags,
        defines: args.define.clone(),
        archs: targets.iter().flat_map(Target::names).collect(),
        image_bytes: image.len(),
        num_compiled: built,
        build_seconds: begin.elapsed().as_secs_f64(),
        units: unit_rows,
        kernels,
    };
    if !problems.is_empty() {
        let text = problems.join("\n  ");
        if !args.no_gate {
            // A failed gate leaves no image behind that could be embedded by mistake.
            let _ = std::fs::remove_file(out.join(manifest::IMAGE));
            let _ = std::fs::remove_file(out.join(manifest::FILE));
            bail!("the kernels do not pass the gate:\n  {text}");
        }
        eprintln!("warning: {text}");
    }
    write(&out, &image, &manifest)?;
    println!(
        "{} units, {} kernels for {}; {} of {} jobs compiled, {:.1} MB in {:.0} s: {}",
        units.len(),
        manifest.num_symbols(),
        manifest.archs.join(", "),
        built,
        jobs.len(),
        image.len() as f64 / 1e6,
        begin.elapsed().as_secs_f64(),
        out.join(manifest::IMAGE).display(),
    );
    Ok(())
}

/// The same for every unit. IEEE division and no flush to zero are nvcc's defaults; they are spelt out because the
/// format's bits depend on them.
fn flags(args: &Args) -> Vec<String> {
    let fixed = ["-std=c++17", "-O3", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--fmad=true"];
    let mut flags: Vec<String> = fixed.iter().map(|flag| (*flag).to_owned()).collect();
    flags.extend(args.lineinfo.then(|| "-lineinfo".to_owned()));
    flags.extend(args.define.iter().map(|define| format!("-D{define}")));
    flags
}

pub fn units(crate_dir: &Path) -> Result<Vec<PathBuf>> {
    let folder = crate_dir.join("cuda/instances");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut units = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            units.push(path);
        }
    }
    units.sort();
    ensure!(!units.is_empty(), "no .cu files in {}", folder.display());
    Ok(units)
}

pub fn unit_name(unit: &Path) -> String {
    unit.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Image first, manifest last, each by renaming: a reader never sees half of one. Nothing is touched when only the
/// time of the build would change, so that Rust code that embeds the image is not built again.
fn write(out: &Path, image: &[u8], manifest: &Manifest) -> Result<()> {
    let (image_path, manifest_path) = (out.join(manifest::IMAGE), out.join(manifest::FILE));
    let same_image = std::fs::read(&image_path).is_ok_and(|before| before == image);
    let before = std::fs::read_to_string(&manifest_path).ok();
    if same_image && before.is_some_and(|before| manifest.same_content(&before)) {
        return Ok(());
    }
    let json = serde_json::to_string_pretty(manifest)?;
    for (path, bytes) in [(image_path, image), (manifest_path, json.as_bytes())] {
        let new = path.with_extension("new");
        std::fs::write(&new, bytes)
            .and_then(|()| std::fs::rename(&new, &path))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
