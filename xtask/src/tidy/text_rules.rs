//! Rules about any text file: budgets, leftovers, forbidden words.

use super::file::{File, Finding, Kind, has_word};
use super::{Rule, Tree};

/// Above this many lines a source file is noted.
const SOFT_BUDGET: usize = 300;
/// Above this many lines a source file is refused, unless listed in [`LONG_FILES`].
const HARD_BUDGET: usize = 600;

/// Files above the hard budget, each with its reason. An entry that is no longer needed is an error.
const LONG_FILES: &[(&str, &str)] = &[];

/// Marks of unfinished work, in two halves so that this file does not break its own rule.
const UNFINISHED: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];

/// Folders of somebody's machine: nothing committed may depend on them.
const MACHINE_PATHS: [&str; 5] = [
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/tm", "p/"),
    concat!("/ho", "me/"),
    concat!("/Us", "ers/"),
];

pub const RULES: [Rule; 6] = [
    Rule {
        name: "budget",
        why: "a source file above 300 lines is noted, above 600 refused: split it by subject",
        check: budget,
    },
    Rule { name: "leftover", why: "no backup files: git remembers", check: leftover },
    Rule {
        name: "unfinished",
        why: "unfinished work is written in an issue, not in the code",
        check: unfinished,
    },
    Rule { name: "machine-path", why: "no path of somebody's machine", check: machine_path },
    Rule { name: "whitespace", why: "no trailing blanks, one newline at the end", check: whitespace },
    Rule { name: "commented-code", why: "no code in comments: git remembers", check: commented_code },
];

fn budget(file: &File, _: &Tree) -> Vec<Finding> {
    if !matches!(file.kind, Kind::Rust | Kind::Cuda | Kind::Cpp) {
        return Vec::new();
    }
    let lines = file.text.lines().count();
    let excuse = LONG_FILES.iter().find(|(path, _)| *path == file.path);
    match excuse {
        Some(_) if lines > HARD_BUDGET => Vec::new(),
        Some(_) => vec![file.error(1, format!("{lines} lines: take it off tidy's list of long files"))],
        None if lines > HARD_BUDGET => {
            vec![file.error(1, format!("{lines} lines; at most {HARD_BUDGET}: split it by subject"))]
        }
        None if lines > SOFT_BUDGET => {
            vec![file.note(1, format!("{lines} lines; better below {SOFT_BUDGET}"))]
        }
        None => Vec::new(),
    }
}

fn leftover(file: &File, _: &Tree) -> Vec<Finding> {
    let is_leftover = [".bak", ".orig", ".rej", ".swp", "~"].iter().any(|end| file.path.ends_with(end));
    if is_leftover { vec![file.error(1, "a leftover: remove it")] } else { Vec::new() }
}

fn unfinished(file: &File, _: &Tree) -> Vec<Finding> {
    let found = |line: &str| UNFINISHED.iter().any(|word| has_word(line, word));
    file.lines()
        .filter(|(_, line)| found(line))
        .map(|(number, _)| file.error(number, "unfinished work: finish it or open an issue"))
        .collect()
}

fn machine_path(file: &File, _: &Tree) -> Vec<Finding> {
    // A folder of that name inside another path (`target/x`, `https://host/x`) is no machine path.
    let is_start = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && !"._-}~".contains(c));
    let found = |line: &str| {
        MACHINE_PATHS.iter().any(|path| {
            line.match_indices(path).any(|(at, _)| is_start(line.split_at(at).0.chars().next_back()))
        })
    };
    file.lines()
        .filter(|(_, line)| found(line))
        .map(|(number, _)| file.error(number, "a path of somebody's machine"))
        .collect()
}

fn whitespace(file: &File, _: &Tree) -> Vec<Finding> {
    let mut findings: Vec<_> = file
        .lines()
        .filter(|(_, line)| line.ends_with([' ', '\t', '\r']))
        .map(|(number, _)| file.error(number, "trailing blanks"))
        .collect();
    if !file.text.is_empty() && (!file.text.ends_with('\n') || file.text.ends_with("\n\n")) {
        findings.push(file.error(file.text.lines().count(), "end the file with one newline"));
    }
    findings
}

/// A comment line that starts as a statement and ends as one. Prose that does both is rare enough to be reworded.
fn commented_code(file: &File, _: &Tree) -> Vec<Finding> {
    const STARTS: [&str; 12] = [
        "let ", "if (", "for (", "while (", "return ", "fn ", "pub fn ", "use ", "#include", "println!",
        "printf(", "auto ",
    ];
    if !matches!(file.kind, Kind::Rust | Kind::Cuda | Kind::Cpp) {
        return Vec::new();
    }
    let is_code = |line: &str| {
        let Some(text) = line.trim_start().strip_prefix("//") else { return false };
        // Doc comments hold examples.
        if text.starts_with(['/', '!']) {
            return false;
        }
        let text = text.trim();
        STARTS.iter().any(|start| text.starts_with(start))
            && (text.ends_with(';') || text.ends_with('{') || text.starts_with("#include"))
            && text.contains(['(', '=', ':', '"', '<'])
    };
    file.lines()
        .filter(|(_, line)| is_code(line))
        .map(|(number, _)| file.error(number, "code in a comment: remove it"))
        .collect()
}

#[cfg(test)]
pub fn samples() -> Vec<(&'static str, &'static str, String, String)> {
    let lines = |n: usize| "//! A file.\n".repeat(n);
    let text = |s: &str| s.to_owned();
    vec![
        ("budget", "crates/a/src/b.rs", lines(SOFT_BUDGET), lines(HARD_BUDGET + 1)),
        ("budget", "crates/a/src/b.rs", lines(SOFT_BUDGET), lines(SOFT_BUDGET + 1)),
        ("unfinished", "a.rs", text("//! A method.\n"), format!("//! {}: more.\n", UNFINISHED[0])),
        ("machine-path", "a.md", text("https://a.b/c/d\n"), format!("cd {}x\n", MACHINE_PATHS[0])),
        ("machine-path", "a.md", format!("x{}y\n", MACHINE_PATHS[2]), format!("`{}x`\n", MACHINE_PATHS[2])),
        ("whitespace", "a.md", text("a\n"), text("a \n")),
        ("whitespace", "a.md", text("a\n"), text("a")),
        ("commented-code", "a.rs", text("// let the caller decide;\n"), text("    // let x = f();\n")),
        (
            "commented-code",
            "a.cu",
            text("// for all rows (see above)\n"),
            text("// for (int i = 0; i < n; ++i) {\n"),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backup_files_are_leftovers() {
        for path in ["a.rs.bak", "b.cu~", "c.orig"] {
            assert_eq!(leftover(&File::new(path, "x\n"), &Tree::default()).len(), 1, "{path}");
        }
        assert!(leftover(&File::new("bakery.rs", "x\n"), &Tree::default()).is_empty());
    }
}
