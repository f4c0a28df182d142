//! What a run of `tune` has found so far, line by line: a crash loses the step at hand and nothing else.

use anyhow::{Context, Result};
use attn_tune::{Choice, Machine, Point, Profile, RunKey, Shape, StaticKey, Timing};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub machine: Machine,
    pub driver: String,
    pub date: String,
}

impl Header {
    /// Whether two runs measured the same kernels on the same GPU.
    pub fn is_of(&self, machine: &Machine) -> bool {
        let Machine { device, arch, build, .. } = &self.machine;
        (device, arch, build) == (&machine.device, &machine.arch, &machine.build)
    }

    /// A profile without points.
    pub fn profile(&self) -> Profile {
        let Machine { device, arch, build, read_gb_per_s, .. } = self.machine.clone();
        let (driver, date) = (self.driver.clone(), self.date.clone());
        Profile { device, arch, build, driver, date, read_gb_per_s, ..Profile::default() }
    }
}

/// A step: what was tried and what was best.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// A [`StaticKey`] by name.
    pub key: String,
    pub run: RunKey,
    pub shape: Shape,
    pub choice: Choice,
    pub timing: Timing,
    /// Median microseconds of each candidate that was timed.
    pub times: Vec<(Choice, f64)>,
    /// Candidates that gave wrong results, and how.
    pub wrong: Vec<(Choice, String)>,
}

impl Entry {
    /// The key.
    pub fn key(&self) -> Result<StaticKey> {
        Ok(self.key.parse()?)
    }

    /// Puts the step into a profile.
    pub fn enter(&self, profile: &mut Profile) -> Result<()> {
        let point = Point { choice: self.choice, timing: self.timing };
        profile.tables.entry(self.key()?).or_default().insert(self.run, point);
        Ok(())
    }
}

/// A journal that is open for more.
#[derive(Debug)]
pub struct Journal {
    file: File,
}

/// A journal's contents.
#[derive(Clone, Debug)]
pub struct Contents {
    pub header: Header,
    pub entries: Vec<Entry>,
    /// Lines that could not be read: the last one of a run that was killed, or lines that were edited.
    pub num_damaged: usize,
}

/// Where the journal of a profile stands.
pub fn path_of(profile: &Path) -> PathBuf {
    profile.with_extension("journal")
}

/// Reads a journal.
///
/// # Errors
/// Those of the file system; no header.
pub fn read(path: &Path) -> Result<Contents> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| format!("{} is no journal of `tune`", path.display()))
}

fn parse(text: &str) -> Option<Contents> {
    let mut lines = text.lines();
    let header = serde_json::from_str(lines.next()?).ok()?;
    let mut contents = Contents { header, entries: Vec::new(), num_damaged: 0 };
    for line in lines {
        match serde_json::from_str::<Entry>(line) {
            Ok(entry) if entry.key().is_ok() => contents.entries.push(entry),
            _ => contents.num_damaged += 1,
        }
    }
    Some(contents)
}

impl Journal {
    /// Goes on with the journal at `path` if it is of this GPU and these kernels, else begins it anew; and what it holds.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path, header: &Header, anew: bool) -> Result<(Self, Contents)> {
        let context = || format!("cannot write to {}", path.display());
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(context)?;
        }
        // Half a character at the end is no reason to give up the rest.
        let bytes = std::fs::read(path).unwrap_or_default();
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let text = String::from_utf8_lossy(bytes.get(..whole).unwrap_or_default());
        let old = parse(&text).filter(|old| !anew && old.header.is_of(&header.machine));
        let begins = old.is_none();
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(context)?;
        // A line that was being written when the run was killed would run into the next one.
        file.set_len(if begins { 0 } else { whole as u64 }).with_context(context)?;
        let mut journal = Self { file };
        let cut_off = usize::from(!begins && whole < bytes.len());
        let mut contents =
            old.unwrap_or_else(|| Contents { header: header.clone(), entries: Vec::new(), num_damaged: 0 });
        contents.num_damaged += cut_off;
        if begins {
            journal.line(header).with_context(context)?;
        }
        Ok((journal, contents))
    }

    /// Adds a step; it is in the file on return.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn add(&mut self, entry: &Entry) -> Result<()> {
        self.line(entry)
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(value)?;
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        Ok(())
    }
}
