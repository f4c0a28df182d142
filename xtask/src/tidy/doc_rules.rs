//! Rules about documents: what they point at exists.

use super::file::{File, Finding, Kind};
use super::{Rule, Tree};

pub const RULES: [Rule; 2] = [
    Rule { name: "link", why: "relative links of Markdown files lead somewhere", check: link },
    Rule { name: "doc-mention", why: "a `docs/...md` that a file names exists", check: doc_mention },
];

/// Targets of `[text](target)` in a line, code spans left out.
fn targets(line: &str) -> Vec<&str> {
    let mut targets = Vec::new();
    for (i, prose) in line.split('`').enumerate() {
        // `[`code`](target)` ends in the even piece after the code span, which begins with `](`.
        if i % 2 == 0 {
            let mut rest = prose;
            while let Some((_, after)) = rest.split_once("](") {
                let Some((target, after)) = after.split_once(')') else { break };
                targets.push(target.split_whitespace().next().unwrap_or(""));
                rest = after;
            }
        }
    }
    targets
}

fn link(file: &File, tree: &Tree) -> Vec<Finding> {
    if file.kind != Kind::Markdown {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let mut in_code = false;
    for (number, line) in file.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        for target in targets(line) {
            let path = target.split('#').next().unwrap_or("");
            let is_remote = target.contains("://") || target.starts_with("mailto:");
            if in_code || is_remote || path.is_empty() {
                continue;
            }
            let resolved = file.resolve(path);
            if !tree.contains(&resolved) {
                findings
                    .push(file.error(number, format!("{target} leads to {resolved}, which does not exist")));
            }
        }
    }
    findings
}

/// `docs/NAME.md` anywhere in a text means the file in the workspace's `docs` folder.
fn doc_mention(file: &File, tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    // The rules and their tests name files that are not meant to exist.
    if file.path.starts_with("xtask/src/tidy") {
        return findings;
    }
    for (number, line) in file.lines() {
        for (at, _) in line.match_indices("docs/") {
            let (before, mention) = line.split_at(at);
            let end =
                mention.find(|c: char| !c.is_alphanumeric() && !"/-_.".contains(c)).unwrap_or(mention.len());
            let name = mention.get(..end).unwrap_or("").trim_end_matches('.');
            let is_inner = before.ends_with(|c: char| c.is_alphanumeric() || c == '/' || c == '.');
            // Targets of Markdown links are the other rule's.
            let is_target = file.kind == Kind::Markdown && before.ends_with("](");
            if name.ends_with(".md") && !is_inner && !is_target && !tree.contains(name) {
                findings.push(file.error(number, format!("{name} does not exist")));
            }
        }
    }
    findings
}

#[cfg(test)]
pub fn samples() -> Vec<(&'static str, &'static str, String, String)> {
    let text = |s: &str| s.to_owned();
    vec![
        ("link", "README.md", text("[a](docs/int8-format.md#groups)\n"), text("[a](docs/nowhere.md)\n")),
        (
            "link",
            "docs/b.md",
            text("[`a`](int8-format.md) [b](../docs)\n"),
            text("[a](docs/int8-format.md)\n"),
        ),
        ("link", "README.md", text("`[a](b)` [c](https://d.e/f)\n"), text("`x` [a](b)\n")),
        (
            "doc-mention",
            "a.rs",
            text("//! See `docs/int8-format.md`.\n"),
            format!("//! See `{}/nowhere.md`.\n", "docs"),
        ),
    ]
}
