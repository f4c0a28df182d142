//! Rules about CUDA C++ files.

use super::file::{File, Finding, Kind, has_word};
use super::{Rule, Tree};

/// The one file of inline PTX.
const PTX_FILE: &str = "ptx.cuh";
/// How many lines above a kernel its comment may start.
const COMMENT_REACH: usize = 24;

pub const RULES: [Rule; 4] = [
    Rule {
        name: "cuda-doc",
        why: "the first line of a CUDA or C++ file says what it is for",
        check: cuda_doc,
    },
    Rule {
        name: "kernel-grid",
        why: "a kernel's comment says its grid and what one CTA does",
        check: kernel_grid,
    },
    Rule { name: "kernel-printf", why: "kernels do not print", check: kernel_printf },
    Rule { name: "cuda-asm", why: "inline PTX in one file, maths in the others", check: cuda_asm },
];

fn cuda_doc(file: &File, _: &Tree) -> Vec<Finding> {
    let starts = file.text.lines().next().is_some_and(|line| line.starts_with("// ") && line.len() > 8);
    if !matches!(file.kind, Kind::Cuda | Kind::Cpp) || starts {
        return Vec::new();
    }
    vec![file.error(1, "start the file with `// ` and what it is for")]
}

/// Whether a comment says what is asked of it.
fn names_grid(comment: &str) -> bool {
    let comment = comment.to_lowercase();
    has_word(&comment, "grid") && ["cta", "block", "threads"].iter().any(|word| has_word(&comment, word))
}

/// The comment that begins a file.
fn head(file: &File) -> String {
    file.text.lines().take_while(|line| line.starts_with("//")).map(|line| format!("{line}\n")).collect()
}

/// A kernel is explained just above its declaration (template heads, attributes and macro lines may stand between), where
/// its file begins, or, if it is the thin entry of a function in an included file, where that file begins.
fn kernel_grid(file: &File, tree: &Tree) -> Vec<Finding> {
    if file.kind != Kind::Cuda || names_grid(&head(file)) {
        return Vec::new();
    }
    let lines: Vec<&str> = file.text.lines().collect();
    let includes: Vec<String> = file
        .lines()
        .filter_map(|(_, line)| line.strip_prefix("#include \"")?.strip_suffix('"'))
        .map(|target| file.resolve(target))
        .collect();
    let mut findings = Vec::new();
    for (number, _) in file.code_lines().filter(|(_, line)| has_word(line, "__global__")) {
        let above = lines.get(number.saturating_sub(COMMENT_REACH + 1)..number - 1).unwrap_or_default();
        let above: String = above
            .iter()
            .rev()
            .take_while(|line| !line.starts_with('}'))
            .filter(|line| line.trim_start().starts_with("//"))
            .map(|line| format!("{line}\n"))
            .collect();
        let body = lines.iter().skip(number).take_while(|line| !line.trim_start().starts_with('}'));
        let called: Vec<&str> = body
            .flat_map(|line| line.split("::").skip(1))
            .filter_map(|after| after.split(|c: char| !c.is_alphanumeric() && c != '_').next())
            .filter(|name| !name.is_empty())
            .collect();
        let defines = |file: &File| called.iter().any(|name| has_word(&file.text, name));
        let mut bodies = tree.files.iter().filter(|other| includes.contains(&other.path) && defines(other));
        if !names_grid(&above) && !bodies.any(|other| names_grid(&head(other))) {
            findings.push(
                file.error(number, "say the kernel's grid and what one CTA does in a comment above it"),
            );
        }
    }
    findings
}

fn kernel_printf(file: &File, _: &Tree) -> Vec<Finding> {
    if file.kind != Kind::Cuda {
        return Vec::new();
    }
    let prints = |line: &str| has_word(line, "printf") || has_word(line, "cout");
    file.lines()
        .filter(|(_, line)| prints(line))
        .map(|(number, _)| file.error(number, "a kernel prints (or once did)"))
        .collect()
}

fn cuda_asm(file: &File, _: &Tree) -> Vec<Finding> {
    if file.kind != Kind::Cuda || file.name() == PTX_FILE {
        return Vec::new();
    }
    file.code_lines()
        .filter(|(_, line)| has_word(line, "asm") || has_word(line, "__asm__"))
        .map(|(number, _)| file.error(number, format!("inline PTX belongs in {PTX_FILE}")))
        .collect()
}

#[cfg(test)]
pub fn samples() -> Vec<(&'static str, &'static str, String, String)> {
    let text = |s: &str| s.to_owned();
    let kernel = "template <int D>\n__global__ void f(Params p) {}\n";
    vec![
        ("cuda-doc", "a.cuh", text("// What it is for.\n"), text("#pragma once\n")),
        (
            "kernel-grid",
            "a.cu",
            format!("// Grid: (items, heads). One CTA reads one item.\n{kernel}"),
            format!("// Reads items.\n{kernel}"),
        ),
        ("kernel-printf", "a.cuh", text("// fprintfs nothing\n"), text("    printf(\"%d\", i);\n")),
        ("cuda-asm", "a.cuh", text("// no asm here\n"), text("asm volatile(\"nop;\");\n")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_explained_where_its_body_is() {
        let entry =
            "// Entries.\n#include \"../a/body.cuh\"\n__global__ void f(P p) {\n    kv8::body(p);\n}\n";
        let body = "// Grid: (x). A CTA does a row.\nvoid body(P p);\n";
        let check = |body: &str| {
            let files = vec![File::new("cuda/a/body.cuh", body), File::new("cuda/b/entries.cu", entry)];
            let tree = Tree { files, paths: Default::default() };
            tree.files.iter().map(|file| kernel_grid(file, &tree).len()).sum::<usize>()
        };
        assert_eq!(check(body), 0);
        assert_eq!(check("// Does a row.\nvoid body(P p);\n"), 1);
    }

    #[test]
    fn ptx_is_at_home_in_its_file() {
        let text = "// PTX.\nasm volatile(\"nop;\");\n";
        assert!(cuda_asm(&File::new("cuda/common/ptx.cuh", text), &Tree::default()).is_empty());
        assert_eq!(cuda_asm(&File::new("cuda/common/warp.cuh", text), &Tree::default()).len(), 1);
    }
}
