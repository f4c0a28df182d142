//! Rules about CUDA C++ files.

use super::file::{File, Finding, Kind, has_word};
use super::{Rule, Tree};

/// The one file of inline PTX.
const PTX_FILE: &str = "ptx.cuh";
/// How many lines above a kernel its comment may start.
const COMMENT_REACH: usize = 24;

pub const RULES: [Rule; 4] = [
    Rule { name: "cuda-doc", why: "the first line of a CUDA file says what it is for", check: cuda_doc },
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
    if file.kind != Kind::Cuda || starts {
        return Vec::new();
    }
    vec![file.error(1, "start the file with `// ` and what it is for")]
}

/// The comment of a kernel is the run of `//` lines that ends just above its declaration (template heads, attributes
/// and macro lines may stand between) or the one that begins the file.
fn kernel_grid(file: &File, _: &Tree) -> Vec<Finding> {
    if file.kind != Kind::Cuda {
        return Vec::new();
    }
    let lines: Vec<&str> = file.text.lines().collect();
    let mut findings = Vec::new();
    for (number, _) in file.code_lines().filter(|(_, line)| has_word(line, "__global__")) {
        let above = lines.get(number.saturating_sub(COMMENT_REACH + 1)..number).unwrap_or_default();
        let head = lines.iter().take_while(|line| line.starts_with("//"));
        let is_comment = |line: &&&str| line.trim_start().starts_with("//");
        let comment: String =
            above.iter().filter(is_comment).chain(head).map(|line| line.to_lowercase() + "\n").collect();
        if !(has_word(&comment, "grid") && has_word(&comment, "cta")) {
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
    fn ptx_is_at_home_in_its_file() {
        let text = "// PTX.\nasm volatile(\"nop;\");\n";
        assert!(cuda_asm(&File::new("cuda/common/ptx.cuh", text), &Tree::default()).is_empty());
        assert_eq!(cuda_asm(&File::new("cuda/common/warp.cuh", text), &Tree::default()).len(), 1);
    }
}
