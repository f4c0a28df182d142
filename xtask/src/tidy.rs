//! `cargo xtask tidy`: the house rules that no compiler checks. The rules themselves are in `rules`, by kind of file.

mod cuda_rules;
mod doc_rules;
mod file;
mod manifest_rules;
mod rust_rules;
mod text_rules;

use crate::workspace;
use file::{File, Finding, Severity};
use std::path::Path;

/// Arguments of `cargo xtask tidy`.
#[derive(clap::Args)]
pub struct Args {
    /// Print the rules and what each is for, and check nothing.
    #[arg(long)]
    list: bool,
    /// Print the notes too, such as files above the soft budget.
    #[arg(long)]
    notes: bool,
}

/// One house rule.
struct Rule {
    /// Printed with each finding.
    name: &'static str,
    /// What it is for.
    why: &'static str,
    /// Findings in one file; the whole tree is given for rules about links.
    check: fn(&File, &Tree) -> Vec<Finding>,
}

/// All files of the tree, by path relative to the workspace root.
#[derive(Default)]
struct Tree {
    files: Vec<File>,
    /// Every path, files that are not text included.
    paths: std::collections::BTreeSet<String>,
}

impl Tree {
    /// Whether a file or folder of that relative path exists.
    fn contains(&self, path: &str) -> bool {
        let folder = format!("{path}/");
        path.is_empty() || self.paths.contains(path) || self.paths.iter().any(|p| p.starts_with(&folder))
    }
}

fn rules() -> Vec<Rule> {
    let mut rules = Vec::new();
    rules.extend(text_rules::RULES);
    rules.extend(rust_rules::RULES);
    rules.extend(cuda_rules::RULES);
    rules.extend(manifest_rules::RULES);
    rules.extend(doc_rules::RULES);
    rules
}

/// Checks the whole workspace; an error if any rule is broken.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.list {
        for rule in rules() {
            println!("{:16} {}", rule.name, rule.why);
        }
        return Ok(());
    }
    let tree = read(&workspace::root())?;
    let findings = check(&tree);
    let mut errors = 0;
    for (rule, finding) in &findings {
        let is_error = finding.severity == Severity::Error;
        errors += usize::from(is_error);
        if is_error || args.notes {
            let mark = if is_error { "error" } else { "note" };
            println!("{}:{}: {mark} [{rule}] {}", finding.path, finding.line, finding.message);
        }
    }
    let notes = findings.len() - errors;
    println!("tidy: {} files, {} rules, {errors} errors, {notes} notes", tree.files.len(), rules().len());
    anyhow::ensure!(errors == 0, "{errors} house rules are broken");
    Ok(())
}

fn check(tree: &Tree) -> Vec<(&'static str, Finding)> {
    let mut findings = Vec::new();
    for file in &tree.files {
        for rule in rules() {
            findings.extend((rule.check)(file, tree).into_iter().map(|finding| (rule.name, finding)));
        }
    }
    findings
}

/// Reads every file that is not ignored. The folders that the root `.gitignore` names with a leading slash are build
/// output; walking the tree needs no git, so that an exported archive can be checked too.
fn read(root: &Path) -> anyhow::Result<Tree> {
    let ignored: Vec<String> = std::fs::read_to_string(root.join(".gitignore"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.strip_prefix('/').map(|name| name.trim_end_matches('/').to_owned()))
        .chain([".git".to_owned()])
        .collect();
    let mut tree = Tree::default();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let relative = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
            if ignored.contains(&relative) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if let Ok(text) = String::from_utf8(std::fs::read(&path)?) {
                tree.files.push(File::new(&relative, &text));
            }
            tree.paths.insert(relative);
        }
    }
    tree.files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each rule must accept and must refuse: `(rule, path, good, bad)`.
    fn samples() -> Vec<(&'static str, &'static str, String, String)> {
        let mut samples = Vec::new();
        samples.extend(text_rules::samples());
        samples.extend(rust_rules::samples());
        samples.extend(cuda_rules::samples());
        samples.extend(manifest_rules::samples());
        samples.extend(doc_rules::samples());
        samples
    }

    fn findings_of(rule: &str, path: &str, text: &str) -> usize {
        let mut tree = Tree { files: vec![File::new(path, text)], paths: Default::default() };
        tree.paths.extend([path.to_owned(), "docs/int8-format.md".to_owned()]);
        check(&tree).iter().filter(|(name, _)| *name == rule).count()
    }

    #[test]
    fn each_rule_is_seen_to_pass_and_to_fail() {
        for (rule, path, good, bad) in samples() {
            assert!(rules().iter().any(|r| r.name == rule), "no rule is called {rule}");
            assert_eq!(findings_of(rule, path, &good), 0, "{rule} refuses\n{good}");
            assert!(findings_of(rule, path, &bad) > 0, "{rule} accepts\n{bad}");
        }
    }

    #[test]
    fn every_rule_has_a_sample() {
        // `leftover` looks at names alone and is tested beside its rule.
        for rule in rules().iter().filter(|rule| rule.name != "leftover") {
            assert!(samples().iter().any(|(name, ..)| *name == rule.name), "{} has no sample", rule.name);
        }
    }

    #[test]
    fn the_whole_tree_is_read_but_no_build_output() {
        let tree = read(&workspace::root()).unwrap();
        assert!(tree.contains("xtask/src/tidy.rs") && tree.contains("crates/kv-quant"));
        assert!(tree.paths.iter().all(|path| !path.starts_with("target/") && !path.starts_with(".git/")));
    }
}
