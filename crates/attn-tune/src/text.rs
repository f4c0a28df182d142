//! A profile as text: one line a point, so that a diff shows what moved.

use crate::{Point, Profile, RunKey, Timing, VERSION};
use std::fmt;

/// A TOML string: what `Debug` escapes is escaped alike there, but for characters that no device name has.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", toml::Value::String(self.0.to_owned()))
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, arch, build, driver, date, read_gb_per_s, coverage, tables } = self;
        writeln!(
            f,
            "# Measured by `cargo xtask tune`; docs/tuning.md says what the columns mean. Times in microseconds."
        )?;
        writeln!(f, "version = {VERSION}")?;
        for (name, value) in
            [("device", device), ("arch", arch), ("build", build), ("driver", driver), ("date", date)]
        {
            writeln!(f, "{name} = {}", Quoted(value))?;
        }
        writeln!(f, "read_gb_per_s = {read_gb_per_s:.1}")?;
        if !coverage.is_empty() {
            writeln!(f, "coverage = {}", Quoted(coverage))?;
        }
        for (key, table) in tables {
            writeln!(f, "\n[[table]]\nkey = \"{key}\"\npoints = [")?;
            for (run, point) in table {
                writeln!(f, "    {},", Line(run, point))?;
            }
            writeln!(f, "]")?;
        }
        Ok(())
    }
}

struct Line<'a>(&'a RunKey, &'a Point);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(run, Point { choice, timing }) = self;
        let RunKey { batch, num_kv_heads, kv_tokens, longest } = run;
        let Timing { us, p10_us, p90_us, model_us, floor_us } = timing;
        write!(
            f,
            "{{ batch = {batch}, kv_heads = {num_kv_heads}, tokens = {kv_tokens}, longest = {longest}"
        )?;
        write!(f, ", blocks = {}, heads = {}", choice.num_blocks, choice.heads_per_block)?;
        write!(f, ", min_tiles = {}, overhead = {}", choice.min_split_tiles, choice.item_overhead)?;
        if choice.num_shares > 0 {
            write!(f, ", shares = {}", choice.num_shares)?;
        }
        if choice.item_tiles > 0 {
            write!(f, ", item_tiles = {}", choice.item_tiles)?;
        }
        write!(f, ", us = {us:.2}, p10 = {p10_us:.2}, p90 = {p90_us:.2}")?;
        write!(f, ", model = {model_us:.2}, floor = {floor_us:.2} }}")
    }
}
