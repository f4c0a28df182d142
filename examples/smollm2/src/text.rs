//! Real texts to measure on: from Debian packages, or any plain text file.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A text that a Debian package ships.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Short name.
    pub name: &'static str,
    /// How to get it.
    pub packages: &'static str,
    /// Its licence.
    pub licence: &'static str,
    read: fn(&Path) -> Result<String>,
}

/// The known texts.
pub const SOURCES: [Source; 3] = [
    Source { name: "gpl-3", packages: "base-files", licence: "verbatim copies allowed", read: gpl },
    Source { name: "kjv", packages: "bible-kjv bible-kjv-text", licence: "public domain", read: kjv },
    Source { name: "jargon", packages: "jargon-text", licence: "public domain", read: jargon },
];

fn read(path: PathBuf) -> Result<String> {
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn gpl(root: &Path) -> Result<String> {
    read(root.join("usr/share/common-licenses/GPL-3"))
}

fn output(command: &mut Command) -> Result<String> {
    let output =
        command.output().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}",
            command.get_program().display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Genesis, a verse a line, by the package's own reader: the text is compressed in a format of its own.
fn kjv(root: &Path) -> Result<String> {
    let data = root.join("usr/lib");
    let mut program = Command::new(root.join("usr/bin/bible"));
    // The reader appends file names to the folder as it is.
    output(program.arg("-p").arg(format!("{}/", data.display())).args(["-f", "gen1:1-gen50:26"]))
}

fn jargon(root: &Path) -> Result<String> {
    let path = root.join("usr/share/doc/jargon-text/jargon.txt.gz");
    anyhow::ensure!(path.exists(), "{} is not there", path.display());
    let text = output(Command::new("gzip").arg("-dc").arg(path))?;
    // Past the title and the table of contents.
    let start = text.find("Welcome to the Jargon File").map_or(0, |first| {
        text.get(first + 1..)
            .and_then(|rest| rest.find("Welcome to the Jargon File"))
            .map_or(0, |at| first + 1 + at)
    });
    Ok(text.get(start..).unwrap_or_default().to_owned())
}

/// A text in hand.
#[derive(Clone, Debug)]
pub struct Text {
    /// Its name in tables.
    pub name: String,
    /// All of it.
    pub content: String,
}

/// The texts that `names` ask for: `NAME` of [`SOURCES`] below one of `roots`, or `NAME=PATH`. What is missing is said in
/// the second list, with the way to get it.
pub fn find(names: &[String], roots: &[PathBuf]) -> (Vec<Text>, Vec<String>) {
    let (mut texts, mut missing) = (Vec::new(), Vec::new());
    for name in names {
        if let Some((name, path)) = name.split_once('=') {
            match read(path.into()) {
                Ok(content) => texts.push(Text { name: name.to_owned(), content }),
                Err(error) => missing.push(format!("{name}: {error:#}")),
            }
            continue;
        }
        let Some(source) = SOURCES.iter().find(|s| s.name == name) else {
            let known: Vec<_> = SOURCES.iter().map(|s| s.name).collect();
            missing.push(format!("{name}: unknown; known: {}, or NAME=PATH", known.join(", ")));
            continue;
        };
        match roots.iter().map(|root| (source.read)(root)).reduce(|found, next| found.or(next)) {
            Some(Ok(content)) => texts.push(Text { name: source.name.to_owned(), content }),
            Some(Err(error)) => missing.push(format!(
                "{name}: {error:#}\n  to get it: apt-get install {packages}\n  or, as any user: apt-get download {packages}, \
                 dpkg -x each .deb DIR, and --text-root DIR",
                packages = source.packages
            )),
            None => missing.push(format!("{name}: no folder to look in")),
        }
    }
    (texts, missing)
}
