//! Rules about `Cargo.toml` of the packages.

use super::file::{File, Finding, Kind};
use super::{Rule, Tree};

/// Keys that every package inherits from the workspace.
const INHERITED: [&str; 4] = [
    "version.workspace = true",
    "edition.workspace = true",
    "rust-version.workspace = true",
    "license.workspace = true",
];

pub const RULES: [Rule; 2] = [
    Rule {
        name: "inherits",
        why: "version, edition, MSRV, licence and lints stand in one place",
        check: inherits,
    },
    Rule { name: "description", why: "every package says what it is in one line", check: description },
];

fn is_package(file: &File) -> bool {
    file.kind == Kind::Manifest && file.text.lines().any(|line| line == "[package]")
}

fn inherits(file: &File, _: &Tree) -> Vec<Finding> {
    if !is_package(file) {
        return Vec::new();
    }
    let has = |want: &str| file.text.lines().any(|line| line.trim() == want);
    let mut findings: Vec<_> = INHERITED
        .iter()
        .filter(|want| !has(want))
        .map(|want| file.error(1, format!("add `{want}`")))
        .collect();
    if !file.text.contains("[lints]\nworkspace = true") {
        findings.push(file.error(1, "add `[lints]` with `workspace = true`"));
    }
    findings
}

fn description(file: &File, _: &Tree) -> Vec<Finding> {
    let described = file.text.lines().any(|line| line.starts_with("description = \""));
    if !is_package(file) || described { Vec::new() } else { vec![file.error(1, "add a description")] }
}

#[cfg(test)]
pub fn samples() -> Vec<(&'static str, &'static str, String, String)> {
    let good = format!(
        "[package]\nname = \"a\"\ndescription = \"A.\"\n{}\n\n[lints]\nworkspace = true\n",
        INHERITED.join("\n")
    );
    let path = "crates/a/Cargo.toml";
    vec![
        ("inherits", path, good.clone(), good.replace("edition.workspace = true", "edition = \"2021\"")),
        ("inherits", path, good.clone(), good.replace("[lints]\nworkspace = true\n", "")),
        ("description", path, good.clone(), good.replace("description = \"A.\"\n", "")),
    ]
}
