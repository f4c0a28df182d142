//! Rules about Rust files.

use super::file::{File, Finding, Kind, has_word};
use super::{Rule, Tree};

/// Packages that hold unsafe code, each with its reason. Every other crate root says `forbid(unsafe_code)`.
const UNSAFE_PACKAGES: &[(&str, &str)] = &[
    ("crates/attn-kernels/", "launches kernels and reads device memory"),
    ("crates/cuda-shim/", "stands in for the driver's symbols"),
    ("crates/cpu-reference/", "SIMD intrinsics"),
];

/// The driver shim, and instruction sets whose intrinsics are not stable.
const ASM_FOLDERS: [&str; 2] = ["crates/cuda-shim/", "crates/cpu-reference/src/arch/"];

pub const RULES: [Rule; 4] = [
    Rule { name: "module-doc", why: "the first line of a Rust file says what it is for", check: module_doc },
    Rule {
        name: "forbid-unsafe",
        why: "a crate without unsafe code says so in its root",
        check: forbid_unsafe,
    },
    Rule {
        name: "rust-asm",
        why: "inline assembly lives in the driver shim and beside intrinsics alone",
        check: rust_asm,
    },
    Rule {
        name: "process-exit",
        why: "libraries return errors; only a binary's main may exit",
        check: process_exit,
    },
];

fn module_doc(file: &File, _: &Tree) -> Vec<Finding> {
    let starts = file.text.lines().next().is_some_and(|line| line.starts_with("//! ") && line.len() > 8);
    if file.kind != Kind::Rust || starts {
        return Vec::new();
    }
    vec![file.error(1, "start the file with `//! ` and what it is for")]
}

fn forbid_unsafe(file: &File, _: &Tree) -> Vec<Finding> {
    let is_root = file.path.ends_with("src/lib.rs") || file.path.ends_with("src/main.rs");
    let excused = UNSAFE_PACKAGES.iter().any(|(folder, _)| file.path.starts_with(folder));
    if !is_root || excused || file.text.contains("#![forbid(unsafe_code)]") {
        return Vec::new();
    }
    vec![file.error(1, "add `#![forbid(unsafe_code)]`, or the package and a reason to tidy's list")]
}

fn rust_asm(file: &File, _: &Tree) -> Vec<Finding> {
    if file.kind != Kind::Rust || ASM_FOLDERS.iter().any(|folder| file.path.starts_with(folder)) {
        return Vec::new();
    }
    let is_asm = |line: &str| {
        [concat!("a", "sm!("), concat!("global_a", "sm!("), concat!("naked_a", "sm!(")]
            .iter()
            .any(|call| line.contains(call))
    };
    file.code_lines()
        .filter(|(_, line)| is_asm(line))
        .map(|(number, _)| {
            file.error(number, "inline assembly outside the driver shim and the instruction sets")
        })
        .collect()
}

fn process_exit(file: &File, _: &Tree) -> Vec<Finding> {
    let is_library = file.path.starts_with("crates/") && file.path.contains("/src/");
    if file.kind != Kind::Rust || !is_library || file.path.contains("/src/bin/") {
        return Vec::new();
    }
    file.code_lines()
        .filter(|(_, line)| has_word(line, "process::exit") || has_word(line, "process::abort"))
        .map(|(number, _)| file.error(number, "a library returns an error instead of ending the process"))
        .collect()
}

#[cfg(test)]
pub fn samples() -> Vec<(&'static str, &'static str, String, String)> {
    let text = |s: &str| s.to_owned();
    vec![
        ("module-doc", "a.rs", text("//! What it is for.\n"), text("use a::b;\n")),
        ("module-doc", "a.rs", text("//! What it is for.\n"), text("//!\nuse a::b;\n")),
        (
            "forbid-unsafe",
            "crates/a/src/lib.rs",
            text("//! A crate.\n#![forbid(unsafe_code)]\n"),
            text("//! A crate.\n"),
        ),
        ("rust-asm", "crates/a/src/b.rs", text("fn f() {}\n"), format!("core::arch::{}sm!(\"nop\");\n", "a")),
        (
            "process-exit",
            "crates/a/src/b.rs",
            text("// unlike process::exit\nreturn Err(e);\n"),
            text("std::process::exit(1);\n"),
        ),
    ]
}
