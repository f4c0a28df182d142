//! The table of variants: what the gate holds the kernels to, and the Rust table that the host selects from.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::manifest::KernelRow;

/// Threads of a block; `kNumThreads` in `cuda/decode/traits.cuh`.
const BLOCK_THREADS: u32 = 128;
/// Of the kernels of shares and of items; `kWideWarps` in `cuda/decode/wide.cuh`.
const WIDE_THREADS: u32 = 256;
/// `min_ctas` is declared for this architecture.
const DECLARED_ARCH: &str = "sm_90";

/// `instances.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    #[serde(default, rename = "instance")]
    rows: Vec<Row>,
}

/// One variant. The words are explained at the top of the table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    kernel: String,
    head_dim: u32,
    groups: String,
    scales: String,
    row_tiles: u32,
    arithmetic: String,
    min_ctas: u32,
    max_heads: u32,
    stages: u32,
    shared_bytes: u32,
    archs: Vec<String>,
}

impl Row {
    /// The kernel's name in the image.
    pub fn symbol(&self) -> String {
        let Self { kernel, head_dim, groups, scales, row_tiles, arithmetic, .. } = self;
        let suffix = if arithmetic == "mma" { String::new() } else { format!("_{arithmetic}") };
        match kernel.as_str() {
            "reader" => format!("kv8_reader_d{head_dim}_{groups}_{scales}{suffix}"),
            stage1 => format!("kv8_{stage1}_d{head_dim}_{groups}_{scales}_n{row_tiles}{suffix}"),
        }
    }

    pub fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    pub fn min_ctas(&self) -> u32 {
        self.min_ctas
    }

    pub fn block_threads(&self) -> u32 {
        if ["shares", "items"].contains(&self.kernel.as_str()) { WIDE_THREADS } else { BLOCK_THREADS }
    }

    fn has_arch(&self, arch: &str) -> bool {
        self.archs.iter().any(|listed| listed.trim_end_matches('a') == arch.trim_end_matches('a'))
    }
}

impl Table {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("reading {}", path.display()))
    }

    pub fn row(&self, symbol: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.symbol() == symbol)
    }

    /// Whether a unit is built for an architecture: yes, unless it has rows and none of them lists it.
    pub fn wants(&self, unit: &Path, arch: &str) -> Result<bool> {
        let text = std::fs::read_to_string(unit).with_context(|| format!("reading {}", unit.display()))?;
        let mut rows =
            self.rows.iter().filter(|row| text.contains(&format!("({},", row.symbol()))).peekable();
        Ok(rows.peek().is_none() || rows.any(|row| row.has_arch(arch)))
    }

    /// What does not hold: spills, too few blocks at once, and, where all units were built, rows without a kernel.
    pub fn check(&self, kernels: &[KernelRow], is_whole: bool) -> Vec<String> {
        let mut problems = Vec::new();
        for kernel in kernels {
            let place = format!("{} for {}", kernel.name, kernel.arch);
            if kernel.spill_bytes > 0 {
                problems.push(format!("{place}: {} bytes spilled", kernel.spill_bytes));
            }
            let Some(row) = self.row(&kernel.name).filter(|row| row.has_arch(&kernel.arch)) else { continue };
            let least = if kernel.arch.trim_end_matches('a') == DECLARED_ARCH { row.min_ctas } else { 1 };
            if let Some(blocks) = kernel.blocks_per_sm
                && blocks < least
            {
                problems.push(format!(
                    "{place}: {blocks} blocks a multiprocessor, {least} declared ({} registers, {} bytes of shared memory)",
                    kernel.registers, kernel.shared_bytes
                ));
            }
        }
        let is_built = |row: &&Row| kernels.iter().any(|kernel| row.has_arch(&kernel.arch));
        for row in self.rows.iter().filter(|_| is_whole).filter(is_built) {
            if !kernels.iter().any(|kernel| kernel.name == row.symbol()) {
                problems.push(format!("{}: in instances.toml, but no unit defines it", row.symbol()));
            }
        }
        problems
    }

    /// Brings `src/instances.rs` up to the table. Answers whether it had to be written.
    pub fn write_rust(&self, crate_dir: &Path) -> Result<bool> {
        let path: PathBuf = crate_dir.join("src/instances.rs");
        let text = self.rust()?;
        if std::fs::read_to_string(&path).is_ok_and(|before| before == text) {
            return Ok(false);
        }
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(true)
    }

    /// The table as Rust, in the form that rustfmt leaves alone.
    fn rust(&self) -> Result<String> {
        let mut text = String::from(
            "//! The variants of `instances.toml`, in its order. Written by `cargo xtask kernels`; do not edit.\n\n\
             use crate::key::{Arithmetic, Groups, Instance, KernelKey, KernelKind, Scales};\n\n\
             /// Every variant of stage 1, of the copy-only reader, and of stage 1 in shares or by items alone.\n\
             #[rustfmt::skip]\n\
             pub const INSTANCES: &[Instance] = &[\n",
        );
        for row in &self.rows {
            let name = |names: &[(&str, &'static str)], asked: &str| -> Result<&'static str> {
                let found = names.iter().find(|(name, _)| *name == asked).map(|(_, rust)| *rust);
                found.with_context(|| format!("{}: \"{asked}\" is none of {names:?}", row.symbol()))
            };
            ensure!(row.row_tiles > 0 && row.head_dim > 0, "{}: a size is 0", row.symbol());
            let kinds =
                [("stage1", "Stage1"), ("reader", "Reader"), ("shares", "Shares"), ("items", "Items")];
            let kind = name(&kinds, &row.kernel)?;
            let groups = name(&[("g8", "G8"), ("g16", "G16"), ("gx", "Any"), ("gw", "Whole")], &row.groups)?;
            let scales =
                name(&[("sf16", "F16"), ("sbf16", "Bf16"), ("sf32", "F32"), ("sx", "Any")], &row.scales)?;
            let arithmetic = name(&[("mma", "Mma"), ("f32", "F32")], &row.arithmetic)?;
            let Row { head_dim, row_tiles, min_ctas, max_heads, stages, shared_bytes, archs, .. } = row;
            writeln!(
                text,
                "    Instance {{ key: KernelKey {{ kind: KernelKind::{kind}, head_dim: {head_dim}, groups: Groups::{groups}, \
                 scales: Scales::{scales}, row_tiles: {row_tiles}, arithmetic: Arithmetic::{arithmetic} }}, \
                 min_ctas: {min_ctas}, max_heads: {max_heads}, stages: {stages}, shared_bytes: {shared_bytes}, archs: &{archs:?} }},"
            )?;
        }
        text.push_str("];\n");
        Ok(text)
    }
}
