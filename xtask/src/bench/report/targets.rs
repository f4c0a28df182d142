//! What decode attention at the floor of memory bandwidth comes to, case by case, and which of it a record reaches.

use crate::bench::record::{Record, Row};
use std::fmt::Write as _;

/// What a record shows of a target.
struct Shown {
    text: String,
    is_met: bool,
}

/// A goal for Hopper's two sizes of memory.
struct Target {
    case: &'static str,
    goal: &'static str,
    /// Nothing if the record lacks the rows.
    show: fn(&Rows<'_>) -> Option<Shown>,
}

/// The rows of one record, and which of the two goals counts for its GPU.
struct Rows<'a> {
    record: &'a Record,
    is_h200: bool,
}

const TARGETS: [Target; 21] = [
    Target {
        case: "native, 128 x 8192",
        goal: "94 % / 92 % of read",
        show: |r| r.read_share("native", 16, 128, 8192, 0.94, 0.92),
    },
    Target {
        case: "hnd, 128 x 8192",
        goal: "94 % / 92 %",
        show: |r| r.read_share("hnd", 16, 128, 8192, 0.94, 0.92),
    },
    Target {
        case: "native, 64 x 8192 (1.3 GB)",
        goal: "94 % / 92 %",
        show: |r| r.read_share("native", 16, 64, 8192, 0.94, 0.92),
    },
    Target {
        case: "native, 32 x 8192 (671 MB)",
        goal: "94 % / 92 %",
        show: |r| r.read_share("native", 16, 32, 8192, 0.94, 0.92),
    },
    Target {
        case: "native, shuffled slots, 128 x 8192",
        goal: "90 %",
        show: |r| r.read_share("native", 1, 128, 8192, 0.9, 0.9),
    },
    Target {
        case: "LightLLM's buffers, 128 x 8192",
        goal: "88 %",
        show: |r| r.read_share("lightllm", 1, 128, 8192, 0.88, 0.88),
    },
    Target { case: "1 x 1024", goal: "5.4 / 5.2 us", show: |r| r.time(1, 1024, 5.4, 5.2) },
    Target { case: "1 x 8192", goal: "12 / 10 us", show: |r| r.time(1, 8192, 12.0, 10.0) },
    Target { case: "8 x 2048", goal: "19.5 / 15 us", show: |r| r.time(8, 2048, 19.5, 15.0) },
    Target { case: "1 x 131072", goal: "122 / 90 us", show: |r| r.time(1, 131_072, 122.0, 90.0) },
    Target {
        case: "every uniform case of 150 MB and more",
        goal: "copy-only / 0.95 + 2 us",
        show: near_copy_only,
    },
    Target {
        case: "against the Triton kernel, both tables",
        goal: "1.4x / 1.9x at least, 2.0x / 2.5x in the mean",
        show: triton,
    },
    Target { case: "groups of 128 against XQA fp8", goal: "0.98x at every point", show: xqa },
    Target {
        case: "groups of 8 against FlashInfer bf16",
        goal: "faster; 1.5x from 600 MB on",
        show: flashinfer,
    },
    Target {
        case: "other heads, groups, q_len, masks",
        goal: "within 7 points of the base case's share of copy-only",
        show: variants,
    },
    Target { case: "ragged batches", goal: "85 % of read", show: ragged },
    Target { case: "batch-invariant schedule, from 150 MB on", goal: "at most 8 % behind", show: invariant },
    Target { case: "append, 128 tokens; 8192", goal: "4.5 us; 80 % of copy", show: |r| append(r, false) },
    Target {
        case: "append, native slots one by one",
        goal: "4.5 us; 80 % of copy",
        show: |r| append(r, true),
    },
    Target { case: "relative error of a bf16 output", goal: "2e-3", show: |r| r.error(false, 2e-3) },
    Target { case: "relative error of an f16 output", goal: "6e-4", show: |r| r.error(true, 6e-4) },
];

impl<'a> Rows<'a> {
    fn of(record: &'a Record) -> Self {
        Self { record, is_h200: record.gpu.contains("H200") }
    }

    fn suites(&self, suites: &'static [&str]) -> impl Iterator<Item = &'a Row> {
        self.record.rows.iter().filter(|row| suites.contains(&row.suite.as_str()))
    }

    fn of_table(&self, layout: &str, page_len: u32, batch: usize, kv_len: u32) -> Option<&'a Row> {
        self.suites(&["table"]).find(|row| {
            row.layout == layout && row.page_len == page_len && row.batch == batch && row.kv_len == kv_len
        })
    }

    fn pick<T>(&self, h100: T, h200: T) -> T {
        if self.is_h200 { h200 } else { h100 }
    }

    fn read_share(
        &self,
        layout: &str,
        page_len: u32,
        batch: usize,
        kv_len: u32,
        h100: f64,
        h200: f64,
    ) -> Option<Shown> {
        let share = self.of_table(layout, page_len, batch, kv_len)?.share_of_read;
        Some(Shown { text: percent(share), is_met: share >= self.pick(h100, h200) })
    }

    fn time(&self, batch: usize, kv_len: u32, h100: f64, h200: f64) -> Option<Shown> {
        let us = self.of_table("native", 16, batch, kv_len)?.microseconds;
        Some(Shown { text: format!("{us:.1} us"), is_met: us <= self.pick(h100, h200) })
    }

    /// The largest of the checked cases.
    fn error(&self, is_f16: bool, goal: f64) -> Option<Shown> {
        let rows = self.record.rows.iter().filter(|row| row.case.ends_with("f16 out") == is_f16);
        let most = rows.filter_map(|row| row.relative_error).max_by(f64::total_cmp)?;
        Some(Shown { text: format!("{most:.1e}"), is_met: most <= goal })
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// The smallest ratio to a system whose name begins so.
fn ratio(row: &Row, system: &str) -> Option<f64> {
    let ratios = row.ratio_to.iter().filter(|(name, _)| name.starts_with(system));
    ratios.map(|(_, ratio)| *ratio).min_by(f64::total_cmp)
}

fn least(values: &[f64]) -> Option<f64> {
    values.iter().copied().min_by(f64::total_cmp)
}

fn near_copy_only(rows: &Rows<'_>) -> Option<Shown> {
    let cases: Vec<(f64, f64)> = rows
        .suites(&["table", "group128", "grid", "lightllm"])
        .filter(|row| row.megabytes >= 150.0)
        .filter_map(|row| Some((row.microseconds, row.copy_only_microseconds?)))
        .collect();
    let near = cases.iter().filter(|(us, copy_only)| *us <= copy_only / 0.95 + 2.0).count();
    (!cases.is_empty())
        .then(|| Shown { text: format!("{near} of {} cases", cases.len()), is_met: near == cases.len() })
}

fn triton(rows: &Rows<'_>) -> Option<Shown> {
    let cases = rows.suites(&["grid", "table", "lightllm"]).filter(|row| row.layout == "lightllm");
    let ratios: Vec<f64> = cases.filter_map(|row| ratio(row, "LightLLM")).collect();
    let least = least(&ratios)?;
    let mean = (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp();
    let is_met = least >= rows.pick(1.4, 1.9) && mean >= rows.pick(2.0, 2.5);
    Some(Shown { text: format!("{least:.2}x, {mean:.2}x"), is_met })
}

fn xqa(rows: &Rows<'_>) -> Option<Shown> {
    let ratios: Vec<f64> = rows.suites(&["group128"]).filter_map(|row| ratio(row, "XQA fp8")).collect();
    let least = least(&ratios)?;
    let most = ratios.iter().copied().fold(0.0, f64::max);
    Some(Shown { text: format!("{least:.2}x to {most:.2}x"), is_met: least >= 0.98 })
}

fn flashinfer(rows: &Rows<'_>) -> Option<Shown> {
    let native = rows.suites(&["table"]).filter(|row| row.layout == "native" && row.page_len == 16);
    let ratios: Vec<(f64, f64)> =
        native.filter_map(|row| Some((row.megabytes, ratio(row, "FlashInfer bf16")?))).collect();
    let all = least(&ratios.iter().map(|(_, ratio)| *ratio).collect::<Vec<_>>())?;
    let large: Vec<f64> = ratios.iter().filter(|(mb, _)| *mb >= 600.0).map(|(_, ratio)| *ratio).collect();
    let large = least(&large)?;
    Some(Shown { text: format!("{all:.2}x at least; {large:.2}x"), is_met: all > 1.0 && large >= 1.5 })
}

fn variants(rows: &Rows<'_>) -> Option<Shown> {
    let base = rows.suites(&["variants"]).next()?.share_of_copy_only?;
    let shares: Vec<(&str, f64)> = rows
        .suites(&["variants"])
        .filter_map(|row| Some((row.case.as_str(), row.share_of_copy_only?)))
        .collect();
    let behind: Vec<&str> =
        shares.iter().filter(|(_, share)| *share < base - 0.07).map(|(case, _)| *case).collect();
    let mut text = format!("{} of {}", shares.len() - behind.len(), shares.len());
    if !behind.is_empty() {
        let _ = write!(text, "; not {}", behind.join(", "));
    }
    Some(Shown { text, is_met: behind.is_empty() })
}

fn ragged(rows: &Rows<'_>) -> Option<Shown> {
    let shares: Vec<f64> = rows.suites(&["ragged"]).map(|row| row.share_of_read).collect();
    let text: Vec<String> = rows
        .suites(&["ragged"])
        .map(|row| format!("{} {:.0} %", row.layout, 100.0 * row.share_of_read))
        .collect();
    Some(Shown { is_met: least(&shares)? >= 0.85, text: text.join(", ") })
}

/// Of each length of split, the worst case.
fn invariant(rows: &Rows<'_>) -> Option<Shown> {
    let all: Vec<&Row> = rows.suites(&["invariant"]).collect();
    let mut worst: Vec<(&str, f64)> = Vec::new();
    for row in &all {
        let Some((_, split)) = row.case.split_once("invariant ") else { continue };
        let base = all.iter().find(|base| {
            base.case.ends_with("throughput") && base.batch == row.batch && base.kv_len == row.kv_len
        })?;
        let behind = row.microseconds / base.microseconds - 1.0;
        match worst.iter_mut().find(|(name, _)| *name == split) {
            Some((_, most)) => *most = most.max(behind),
            None => worst.push((split, behind)),
        }
    }
    let least = least(&worst.iter().map(|(_, behind)| *behind).collect::<Vec<_>>())?;
    let text: Vec<String> =
        worst.iter().map(|(split, behind)| format!("{:.0} % at {split}", 100.0 * behind)).collect();
    Some(Shown { text: format!("worst {}", text.join(", ")), is_met: least <= 0.08 })
}

/// LightLLM's buffers and whole pages, or single slots of the native layout.
fn append(rows: &Rows<'_>, single_slots: bool) -> Option<Shown> {
    let of = |tokens: &'static str| {
        rows.suites(&["append"]).filter(move |row| {
            let is_single = row.layout == "native" && row.page_len == 1;
            row.case.contains(tokens) && is_single == single_slots
        })
    };
    let few = of("128 tok").map(|row| row.microseconds).max_by(f64::total_cmp)?;
    let many: Vec<f64> = of("8192 tok").filter_map(|row| row.share_of_copy_only).collect();
    let many = least(&many)?;
    Some(Shown { text: format!("{few:.1} us; {:.0} %", 100.0 * many), is_met: few <= 4.5 && many >= 0.8 })
}

/// The targets against these records, a column each. Goals with a slash are for an H100 and an H200.
pub fn markdown(records: &[Record]) -> String {
    let mut text = "| case | goal (H100 / H200) |".to_owned();
    for record in records {
        let _ = write!(text, " {} |", record.gpu);
    }
    let _ = writeln!(text, "\n|---|---|{}", "---|".repeat(records.len()));
    for target in &TARGETS {
        let _ = write!(text, "| {} | {} |", target.case, target.goal);
        for record in records {
            let _ = match (target.show)(&Rows::of(record)) {
                Some(shown) => {
                    write!(text, " {}, {} |", if shown.is_met { "met" } else { "missed" }, shown.text)
                }
                None => write!(text, " not measured |"),
            };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::record;

    #[test]
    fn a_target_is_met_or_missed_by_its_own_gpu() {
        let mut records = [record(), record()];
        records[1].gpu = "NVIDIA H200".to_owned();
        for record in &mut records {
            record.rows[0].microseconds = 5.3;
            record.rows[3].share_of_read = 0.93;
        }
        let text = markdown(&records);
        let line = |case: &str| text.lines().find(|line| line.starts_with(&format!("| {case} |"))).unwrap();
        assert!(line("1 x 1024").ends_with("| met, 5.3 us | missed, 5.3 us |"), "{text}");
        assert!(line("native, 128 x 8192").ends_with("| missed, 93.0 % | met, 93.0 % |"), "{text}");
        assert!(line("ragged batches").ends_with("| not measured | not measured |"), "{text}");
    }

    #[test]
    fn every_target_is_judged_on_a_full_record() {
        let text =
            std::fs::read_to_string(crate::workspace::root().join("benches/record/h100-2026-11-23.json"))
                .unwrap();
        let record: Record = serde_json::from_str(&text).unwrap();
        let text = markdown(&[record]);
        assert!(!text.contains("not measured"), "{text}");
        assert_eq!(text.lines().count(), TARGETS.len() + 2);
    }
}
