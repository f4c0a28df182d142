//! A record's pictures.

use crate::bench::record::{Record, Row};
use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const SIZE: (u32, u32) = (820, 520);
const ROOF: RGBColor = RGBColor(90, 90, 90);
const KERNEL: RGBColor = RGBColor(0, 90, 160);
const READER: RGBColor = RGBColor(150, 150, 150);
/// Dark enough on white, and told apart by people who see red and green alike.
const PEERS: [(&str, RGBColor); 4] = [
    ("LightLLM Triton int8", RGBColor(213, 94, 0)),
    ("FlashInfer bf16 tensor-core", RGBColor(0, 135, 100)),
    ("FlashInfer fp8 tensor-core", RGBColor(150, 60, 130)),
    ("XQA fp8", RGBColor(200, 150, 0)),
];

/// Bytes a second over the bytes of a step, beneath the streaming read bandwidth.
pub fn roofline(path: &Path, record: &Record) -> Result<()> {
    let rows: Vec<&Row> =
        record.rows.iter().filter(|row| row.suite != "append" && row.suite != "smoke").collect();
    ensure!(!rows.is_empty(), "the record has no decode steps");
    let least = rows.iter().map(|row| row.megabytes).fold(f64::MAX, f64::min) / 1.3;
    let most = rows.iter().map(|row| row.megabytes).fold(1.0, f64::max) * 1.3;
    let top = record.read_gb_per_s * 1.12;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(18)
            .caption(format!("Decode steps on {}", record.gpu), ("sans-serif", 22))
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d((least..most).log_scale(), 0.0..top)?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .x_desc("megabytes of codes and scales")
            .y_desc("GB/s")
            .label_style(("sans-serif", 15))
            .draw()?;
        let roof = [(least, record.read_gb_per_s), (most, record.read_gb_per_s)];
        chart
            .draw_series(LineSeries::new(roof, ROOF.stroke_width(2)))?
            .label(format!("streaming read, {:.0} GB/s", record.read_gb_per_s))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], ROOF.stroke_width(2)));
        let reader = rows.iter().filter_map(|row| {
            let speed = row.megabytes / row.copy_only_microseconds? * 1e3;
            Some(Circle::new((row.megabytes, speed), 3, READER.filled()))
        });
        chart
            .draw_series(reader)?
            .label("copy-only reader, the same rows")
            .legend(|(x, y)| Circle::new((x + 8, y), 3, READER.filled()));
        let kernel = rows.iter().map(|row| Circle::new((row.megabytes, row.gb_per_s), 4, KERNEL.filled()));
        chart
            .draw_series(kernel)?
            .label("kv8, both stages")
            .legend(|(x, y)| Circle::new((x + 8, y), 4, KERNEL.filled()));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE)
            .border_style(ROOF)
            .label_font(("sans-serif", 15))
            .draw()?;
        area.present()?;
    }
    std::fs::write(path, svg).with_context(|| path.display().to_string())
}

/// Time over tokens of the batch, with the peers' lines.
pub fn latency(path: &Path, record: &Record) -> Result<()> {
    // The first layout of pages that was measured: the peers read pages of 16 too.
    let mut rows: Vec<&Row> = record
        .rows
        .iter()
        .filter(|row| row.suite == "table" && row.layout == "native" && row.page_len == 16)
        .collect();
    ensure!(!rows.is_empty(), "the record has no rows of suite `table` in the native layout");
    let tokens = |row: &Row| row.batch as f64 * f64::from(row.kv_len);
    rows.sort_by(|a, b| tokens(a).total_cmp(&tokens(b)));
    let mut lines: BTreeMap<usize, Vec<(f64, f64)>> = BTreeMap::new();
    for row in &rows {
        for (system, ratio) in &row.ratio_to {
            if let Some(index) = PEERS.iter().position(|(name, _)| system.starts_with(name)) {
                lines.entry(index).or_default().push((tokens(row), row.microseconds * ratio));
            }
        }
    }
    let ours: Vec<(f64, f64)> = rows.iter().map(|row| (tokens(row), row.microseconds)).collect();
    let all = || lines.values().flatten().chain(&ours);
    let range = |pick: fn(&(f64, f64)) -> f64, margin: f64| {
        let least = all().map(pick).fold(f64::MAX, f64::min) / margin;
        (least..all().map(pick).fold(1.0, f64::max) * margin).log_scale()
    };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(18)
            .caption(format!("32 query and 8 kv heads of 128 on {}", record.gpu), ("sans-serif", 22))
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d(range(|point| point.0, 1.3), range(|point| point.1, 1.5))?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .x_desc("tokens of the batch: requests x length")
            .y_desc("microseconds a layer")
            .label_style(("sans-serif", 15))
            .draw()?;
        for (index, points) in &lines {
            let Some((name, color)) = PEERS.get(*index).copied() else { continue };
            let style = color.stroke_width(2);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
        let style = KERNEL.stroke_width(3);
        chart
            .draw_series(LineSeries::new(ours.iter().copied(), style))?
            .label("kv8 int8, groups of 8")
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE)
            .border_style(ROOF)
            .label_font(("sans-serif", 15))
            .draw()?;
        area.present()?;
    }
    std::fs::write(path, svg).with_context(|| path.display().to_string())
}
