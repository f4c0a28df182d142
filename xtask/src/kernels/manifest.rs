//! `manifest.json`: what the image holds and what it was built from.

use std::collections::BTreeSet;

use anyhow::Result;
use serde::Serialize;

use super::occupancy;
use super::resources::Resources;
use super::table::{Row, Table};

/// Names of the two files of the output.
pub const IMAGE: &str = "kv8.fatbin";
pub const FILE: &str = "manifest.json";

#[derive(Debug, Serialize)]
pub struct Manifest {
    pub source_hash: String,
    pub nvcc_version: String,
    pub cuda_version: String,
    pub nvcc_origin: String,
    pub flags: Vec<String>,
    pub defines: Vec<String>,
    pub archs: Vec<String>,
    pub image_bytes: usize,
    pub num_compiled: usize,
    pub build_seconds: f64,
    pub units: Vec<UnitRow>,
    pub kernels: Vec<KernelRow>,
}

impl Manifest {
    /// Whether a manifest written earlier says the same of the image; how and when it was built does not count.
    pub fn same_content(&self, before: &str) -> bool {
        let strip = |mut value: serde_json::Value| {
            if let Some(fields) = value.as_object_mut() {
                for field in ["num_compiled", "build_seconds", "nvcc_origin"] {
                    fields.remove(field);
                }
            }
            value
        };
        let now = serde_json::to_value(self).ok().map(strip);
        now.is_some() && now == serde_json::from_str(before).ok().map(strip)
    }

    pub fn num_symbols(&self) -> usize {
        self.kernels.iter().map(|kernel| &kernel.name).collect::<BTreeSet<_>>().len()
    }
}

/// One fatbin of the image.
#[derive(Debug, Serialize)]
pub struct UnitRow {
    pub name: String,
    /// First byte in the image.
    pub offset: usize,
    pub bytes: usize,
    pub symbols: Vec<String>,
}

/// One kernel for one architecture.
#[derive(Debug, Serialize)]
pub struct KernelRow {
    pub name: String,
    pub unit: String,
    pub arch: String,
    pub registers: u32,
    /// Stores and loads together.
    pub spill_bytes: u32,
    pub stack_bytes: u32,
    /// All shared memory of a block: declared by the code and asked for by the launch.
    pub shared_bytes: u32,
    pub static_shared_bytes: u32,
    pub dynamic_shared_bytes: u32,
    /// Threads of a block, where the table says.
    pub block_threads: Option<u32>,
    /// Blocks at once on one multiprocessor, by the architecture's limits.
    pub blocks_per_sm: Option<u32>,
}

impl KernelRow {
    pub fn new(unit: &str, resources: Resources, table: &Table) -> Result<Self> {
        let row = table.row(&resources.name);
        let dynamic_shared_bytes = row.map_or(0, Row::shared_bytes);
        let shared_bytes = resources.static_shared_bytes + dynamic_shared_bytes;
        let block_threads = row.map(Row::block_threads);
        let blocks_per_sm = block_threads.and_then(|threads| {
            occupancy::blocks_per_sm(&resources.arch, resources.registers, threads, shared_bytes)
        });
        Ok(Self {
            unit: unit.to_owned(),
            registers: resources.registers,
            spill_bytes: resources.spill_store_bytes + resources.spill_load_bytes,
            stack_bytes: resources.stack_bytes,
            shared_bytes,
            static_shared_bytes: resources.static_shared_bytes,
            dynamic_shared_bytes,
            block_threads,
            blocks_per_sm,
            name: resources.name,
            arch: resources.arch,
        })
    }
}
