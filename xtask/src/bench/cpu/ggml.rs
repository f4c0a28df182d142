//! ggml's figures: those of a program that runs beside each case, or of another machine.

use super::Case;
use anyhow::{Context, ensure};
use std::path::Path;
use std::process::Command;

/// Types of cache, as the keys of `ratio_to` and as ggml names them.
pub const CACHES: [(&str, &str); 2] = [("ggml_q8_0", "q8_0"), ("ggml_f16", "f16")];

/// Whose figures [`Case::ggml`] are.
pub const TABLE: &str = "two cores of an AMD EPYC with AVX2 that read 23 to 28 GB/s, August 2026";

/// What a run of the program said: its version, and microseconds with each of [`CACHES`].
pub struct Figures {
    pub version: String,
    pub microseconds: [f64; 2],
}

/// Runs `benches/peers/ggml.c` for one case.
pub fn run(program: &Path, case: &Case, threads: usize, samples: usize) -> anyhow::Result<Figures> {
    let Case { num_kv_heads, gqa_group, head_dim, kv_len, .. } = *case;
    let shape = [num_kv_heads, gqa_group, head_dim, kv_len].map(|n| n.to_string());
    let options = ["--threads".to_owned(), threads.to_string(), "--samples".to_owned(), samples.to_string()];
    // Its threads stay on a core each, as ours do, where it was built with OpenMP.
    let output = Command::new(program).env("OMP_PROC_BIND", "true").args(options).args(&shape).output();
    let output = output.with_context(|| program.display().to_string())?;
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", program.display(), error.trim());
    parse(&said, &shape).with_context(|| format!("{}: {said}", program.display()))
}

/// `None` if a line is missing.
fn parse(said: &str, shape: &[String; 4]) -> Option<Figures> {
    let version = said.lines().find_map(|line| line.strip_prefix("# "))?.to_owned();
    let median = |cache: &str| {
        let prefix = format!("{} {cache} ", shape.join(" "));
        let times = said.lines().find_map(|line| line.strip_prefix(&prefix))?;
        times.split(' ').next()?.parse::<f64>().ok().filter(|us| *us > 0.0)
    };
    let [(_, q8_0), (_, f16)] = CACHES;
    Some(Figures { version, microseconds: [median(q8_0)?, median(f16)?] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_program() {
        let shape = ["8", "4", "128", "1024"].map(str::to_owned);
        let said = "# ggml 0.25.3 0c1e570, AVX2 FMA F16C\n8 4 128 1024 q8_0 605.304 579.035 5.3e-03\n\
                    8 4 128 1024 f16 502.504 487.700 3.3e-03\n";
        let figures = parse(said, &shape).unwrap();
        assert_eq!(figures.version, "ggml 0.25.3 0c1e570, AVX2 FMA F16C");
        assert_eq!(figures.microseconds, [605.304, 502.504]);
        for broken in [
            said.replace("f16 502", "f32 502"),
            said.replace("605.304", "-1"),
            said.replace("# ", ""),
            said.replace("8 4", "8 1"),
        ] {
            assert!(parse(&broken, &shape).is_none(), "{broken}");
        }
    }
}
