//! A text file with what the rules ask of it, and what a rule reports.

/// What language a file is in, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `.rs`.
    Rust,
    /// `.cu`, `.cuh`, `.h`.
    Cuda,
    /// `.cpp`, `.hpp`.
    Cpp,
    /// `.md`.
    Markdown,
    /// `Cargo.toml`.
    Manifest,
    /// Any other text.
    Other,
}

/// A text file of the workspace.
pub struct File {
    /// Relative to the workspace root, with forward slashes.
    pub path: String,
    /// Its content.
    pub text: String,
    /// Its language.
    pub kind: Kind,
}

/// Whether a finding fails the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Worth a look.
    Note,
    /// Fails the run.
    Error,
}

/// A place where a rule is broken.
#[derive(Debug)]
pub struct Finding {
    /// Of the file.
    pub path: String,
    /// Counted from 1.
    pub line: usize,
    /// Whether it fails the run.
    pub severity: Severity,
    /// What is wrong and what would be right.
    pub message: String,
}

impl File {
    /// A file with its kind found from its name.
    pub fn new(path: &str, text: &str) -> Self {
        let extension = path.rsplit_once('.').map_or("", |(_, extension)| extension);
        let kind = match extension {
            "rs" => Kind::Rust,
            "cu" | "cuh" | "h" => Kind::Cuda,
            "cpp" | "hpp" => Kind::Cpp,
            "md" => Kind::Markdown,
            "toml" if path.ends_with("Cargo.toml") => Kind::Manifest,
            _ => Kind::Other,
        };
        Self { path: path.to_owned(), text: text.to_owned(), kind }
    }

    /// File name without folders.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// A path that this file names relative to its own folder, as a path from the root, `.` and `..` resolved.
    pub fn resolve(&self, target: &str) -> String {
        let folder = self.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
        for part in target.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                part => parts.push(part),
            }
        }
        parts.join("/")
    }

    /// An error at a line (counted from 1).
    pub fn error(&self, line: usize, message: impl Into<String>) -> Finding {
        Finding { path: self.path.clone(), line, severity: Severity::Error, message: message.into() }
    }

    /// A note at a line (counted from 1).
    pub fn note(&self, line: usize, message: impl Into<String>) -> Finding {
        Finding { severity: Severity::Note, ..self.error(line, message) }
    }

    /// Lines with their numbers, from 1.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(i, line)| (i + 1, line))
    }

    /// Lines with their numbers and without their `//` comments. Block comments are rare here and are not looked for.
    pub fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines().map(|(number, line)| (number, line.split("//").next().unwrap_or(line)))
    }
}

/// Whether `word` stands in `line` by itself: no letter, digit or underscore beside it.
pub fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = line.split_at(at);
        !is_part(before.chars().next_back()) && !is_part(after.chars().nth(word.chars().count()))
    })
}
