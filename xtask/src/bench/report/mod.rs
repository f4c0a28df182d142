//! `cargo xtask bench report`: a record of `bench gpu` as a person wants to see it, tables in Markdown and pictures.

mod plot;
mod serving;
mod tables;
mod targets;

use super::record::Record;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Options of `bench report`.
#[derive(clap::Args, Clone, Debug)]
pub struct ReportArgs {
    /// The JSON that `bench gpu --record` wrote
    record: PathBuf,
    /// Folder for the pictures
    #[arg(long, value_name = "DIR", default_value = "docs/img")]
    out: PathBuf,
}

/// Options of `bench targets`.
#[derive(clap::Args, Clone, Debug)]
pub struct TargetArgs {
    /// What `bench gpu --record` wrote, a column each
    #[arg(required = true)]
    records: Vec<PathBuf>,
}

/// Prints which targets the records reach.
pub fn run_targets(args: &TargetArgs) -> Result<()> {
    let records: Vec<Record> = args.records.iter().map(|path| read(path)).collect::<Result<_>>()?;
    print!("{}", targets::markdown(&records));
    Ok(())
}

fn read(path: &Path) -> Result<Record> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no record of `bench gpu`", path.display()))
}

/// Prints the tables and draws the pictures.
pub fn run(args: &ReportArgs) -> Result<()> {
    let record = read(&args.record)?;
    print!("{}{}", tables::markdown(&record), serving::markdown(&record));
    let gpu = short_name(&record.gpu);
    let [roofline, latency] = ["roofline", "latency"].map(|name| args.out.join(format!("{name}-{gpu}.svg")));
    std::fs::create_dir_all(&args.out)?;
    plot::roofline(&roofline, &record)?;
    plot::latency(&latency, &record)?;
    eprintln!("wrote {} and {}", roofline.display(), latency.display());
    Ok(())
}

/// "h100" for "NVIDIA H100 80GB HBM3": the first word with a digit.
fn short_name(gpu: &str) -> String {
    let word = gpu.split_whitespace().find(|word| word.contains(|c: char| c.is_ascii_digit()));
    word.unwrap_or("gpu").to_ascii_lowercase()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bench::record::Row;

    /// A row of the table that `bytes` and `microseconds` describe.
    pub fn row(suite: &str, batch: usize, kv_len: u32, microseconds: f64) -> Row {
        let megabytes = batch as f64 * f64::from(kv_len) * 2560.0 / 1e6;
        Row {
            suite: suite.to_owned(),
            case: format!("{batch} x {kv_len} 32/8 d128 native p16 g8 f16"),
            layout: "native".to_owned(),
            page_len: 16,
            group_len: 8,
            num_q_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            batch,
            kv_len,
            megabytes,
            microseconds,
            p10_microseconds: microseconds,
            p90_microseconds: microseconds,
            gb_per_s: megabytes / microseconds * 1e3,
            share_of_read: megabytes / microseconds / 3.0,
            copy_only_microseconds: Some(0.95 * microseconds),
            share_of_copy_only: Some(0.95),
            relative_error: None,
            plan: String::new(),
            ratio_to: [("XQA fp8".to_owned(), 1.25)].into(),
        }
    }

    pub fn record() -> Record {
        let cases = [(1, 1024, 6.0), (8, 8192, 64.0), (32, 8192, 235.0), (128, 8192, 910.0)];
        Record {
            gpu: "NVIDIA H100 80GB HBM3".to_owned(),
            driver: "13.0".to_owned(),
            commit: "0123456789ab".to_owned(),
            read_gb_per_s: 3000.0,
            copy_gb_per_s: 2800.0,
            rows: cases.map(|(batch, kv_len, us)| row("table", batch, kv_len, us)).into(),
        }
    }

    #[test]
    fn a_record_survives_its_file() {
        let mut record = record();
        record.rows[0].copy_only_microseconds = None;
        let text = serde_json::to_string(&record).unwrap();
        let again: Record = serde_json::from_str(&text).unwrap();
        let times = |record: &Record| -> Vec<_> {
            record
                .rows
                .iter()
                .map(|row| (row.case.clone(), row.microseconds, row.copy_only_microseconds))
                .collect()
        };
        assert_eq!(times(&again), times(&record));
    }

    #[test]
    fn gpus_have_short_names() {
        assert_eq!(short_name("NVIDIA H100 80GB HBM3"), "h100");
        assert_eq!(short_name("Quadro"), "gpu");
    }

    #[test]
    fn every_case_is_a_line_and_a_point() {
        let record = record();
        let text = tables::markdown(&record);
        assert_eq!(text.matches("| 128 x 8192 |").count(), 1, "{text}");
        assert!(text.contains("1.25x XQA fp8"), "{text}");
        let path = std::env::temp_dir().join(format!("kv8-roofline-{}.svg", std::process::id()));
        plot::roofline(&path, &record).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        // Each case twice (the kernel and the reader), and the two of the legend.
        assert_eq!(svg.matches("<circle").count(), 2 * record.rows.len() + 2);
        plot::latency(&path, &record).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("XQA fp8"));
        std::fs::remove_file(&path).unwrap();
    }
}
