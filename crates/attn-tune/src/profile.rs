//! A profile: what was measured on one GPU with one build of the kernels.

use crate::{Cause, Choice, RunKey, StaticKey};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The file format that this version writes and reads.
pub const VERSION: u32 = 1;

/// What was measured on one GPU. Reads and writes TOML; sorted, so that a new measurement is a small diff.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// The device's name, e.g. "NVIDIA H200".
    pub device: String,
    /// Its architecture, e.g. "sm_90".
    pub arch: String,
    /// The kernels' source hash, shortened.
    pub build: String,
    /// The driver's version.
    pub driver: String,
    /// The day of the latest measurement, e.g. "2026-11-22".
    pub date: String,
    /// Streaming read bandwidth, measured in the same run.
    pub read_gb_per_s: f64,
    /// What of the grid was measured, and what is left to neighbours and to the cost model; empty if nobody has counted.
    pub coverage: String,
    /// Measured points by key.
    pub tables: BTreeMap<StaticKey, Table>,
}

/// The points of one key, by step.
pub type Table = BTreeMap<RunKey, Point>;

/// The best choice for one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// What was fastest.
    pub choice: Choice,
    /// How fast.
    pub timing: Timing,
}

/// Microseconds of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Median with the choice.
    pub us: f64,
    /// A tenth of the samples were faster.
    pub p10_us: f64,
    /// A tenth of the samples were slower.
    pub p90_us: f64,
    /// Median with what the cost model would have chosen.
    pub model_us: f64,
    /// Median of a kernel that only reads the same rows.
    pub floor_us: f64,
}

#[derive(Deserialize)]
struct RawVersion {
    version: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProfile {
    #[serde(rename = "version")]
    _version: u32,
    device: String,
    arch: String,
    build: String,
    driver: String,
    date: String,
    read_gb_per_s: f64,
    #[serde(default)]
    coverage: String,
    #[serde(default)]
    table: Vec<RawTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTable {
    key: String,
    points: Vec<toml::Value>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPoint {
    batch: u32,
    kv_heads: u32,
    tokens: u64,
    longest: u32,
    blocks: u32,
    heads: u32,
    min_tiles: u32,
    overhead: u32,
    #[serde(default)]
    shares: u32,
    #[serde(default)]
    item_tiles: u32,
    us: f64,
    p10: f64,
    p90: f64,
    model: f64,
    floor: f64,
}

impl RawPoint {
    fn check(self) -> Result<(RunKey, Point), &'static str> {
        let Self {
            batch,
            kv_heads,
            tokens,
            longest,
            blocks,
            heads,
            min_tiles,
            overhead,
            shares,
            item_tiles,
            ..
        } = self;
        let run = RunKey { batch, num_kv_heads: kv_heads, kv_tokens: tokens, longest };
        let choice = Choice {
            num_blocks: blocks,
            heads_per_block: heads,
            min_split_tiles: min_tiles,
            item_overhead: overhead,
            num_shares: shares,
            item_tiles,
        };
        let Self { us, p10, p90, model, floor, .. } = self;
        let timing = Timing { us, p10_us: p10, p90_us: p90, model_us: model, floor_us: floor };
        if batch == 0 || kv_heads == 0 {
            return Err("batch and kv_heads must be at least 1");
        }
        if u64::from(longest) > tokens || tokens > u64::from(longest) * u64::from(batch) {
            return Err("tokens must be between longest and longest * batch");
        }
        if [us, p10, p90, model, floor].iter().any(|us| !us.is_finite() || *us <= 0.0) {
            return Err("times must be positive");
        }
        choice.fault(kv_heads).map_or(Ok((run, Point { choice, timing })), Err)
    }
}

impl Profile {
    /// Reads a file's text, and says which entries were left out.
    ///
    /// # Errors
    /// [`Cause::Damaged`], [`Cause::Version`].
    pub fn parse(text: &str) -> Result<(Self, Vec<Cause>), Cause> {
        let damaged = |error: toml::de::Error| Cause::Damaged {
            reason: error.to_string().trim_end().replace('\n', "; "),
        };
        // The version first: another format may have other fields.
        let RawVersion { version: found } = toml::from_str(text).map_err(damaged)?;
        if found != VERSION {
            return Err(Cause::Version { found });
        }
        let raw: RawProfile = toml::from_str(text).map_err(damaged)?;
        let RawProfile { _version, device, arch, build, driver, date, read_gb_per_s, coverage, table } = raw;
        if !read_gb_per_s.is_finite() || read_gb_per_s <= 0.0 {
            return Err(Cause::Damaged { reason: "read_gb_per_s must be positive".to_owned() });
        }
        let tables = BTreeMap::new();
        let mut profile = Self { device, arch, build, driver, date, read_gb_per_s, coverage, tables };
        let mut left_out = Vec::new();
        for RawTable { key: name, points } in table {
            let mut leave_out = |at: String, reason: String| left_out.push(Cause::BadEntry { at, reason });
            let key: StaticKey = match name.parse() {
                Ok(key) => key,
                Err(error) => {
                    leave_out(format!("table {name:?}"), format!("{error}"));
                    continue;
                }
            };
            let table = profile.tables.entry(key).or_default();
            for (index, point) in points.into_iter().enumerate() {
                let parsed = point.try_into::<RawPoint>().map_err(|error| error.message().to_owned());
                match parsed.and_then(|raw| raw.check().map_err(str::to_owned)) {
                    Ok((run, point)) if !table.contains_key(&run) => {
                        table.insert(run, point);
                    }
                    Ok((run, _)) => {
                        leave_out(format!("point {index} of {key}"), format!("{run} stands there twice"))
                    }
                    Err(reason) => leave_out(format!("point {index} of {key}"), reason),
                }
            }
        }
        profile.tables.retain(|_, table| !table.is_empty());
        Ok((profile, left_out))
    }
}
