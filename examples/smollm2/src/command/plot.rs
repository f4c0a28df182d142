//! The figure: KL divergence over group length, a line for each rule and side.

use super::accuracy::Row;
use anyhow::Result;
use plotters::prelude::*;
use std::path::Path;

const COLORS: [RGBColor; 6] = [
    RGBColor(0, 90, 181),
    RGBColor(220, 50, 32),
    RGBColor(0, 140, 90),
    RGBColor(200, 130, 0),
    RGBColor(120, 60, 160),
    RGBColor(90, 90, 90),
];

/// Draws the rows over all texts (or of the only text) with f16 scales.
pub(super) fn write(path: &Path, rows: &[Row]) -> Result<()> {
    let has_total = rows.iter().any(Row::is_total);
    let rows: Vec<_> = rows
        .iter()
        .filter(|row| row.is_total() == has_total && row.scale_type.as_deref() == Some("f16") && row.kl > 0.0)
        .collect();
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for row in &rows {
        let Some(group_len) = row.group_len else { continue };
        let name = format!("{}, {}", row.format, row.rounding.as_deref().unwrap_or("-"));
        let point = (f64::from(group_len).log2(), row.kl);
        match lines.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(point),
            None => lines.push((name, vec![point])),
        }
    }
    let kls = || rows.iter().filter(|row| row.group_len.is_some()).map(|row| row.kl);
    let (low, high) = (kls().fold(f64::INFINITY, f64::min) / 2.0, kls().fold(0.0, f64::max) * 3.0);
    if !(low.is_finite() && high > low) {
        return Ok(()); // nothing with groups was measured
    }
    let area = SVGBackend::new(path, (860, 520)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("SmolLM2-135M on the INT8 cache: KL divergence from the f32 cache", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(2.8f64..6.2f64, (low..high).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(5)
        .x_label_formatter(&|x| format!("{:.0}", x.exp2()))
        .y_label_formatter(&|y| format!("{y:.0e}"))
        .x_desc("channels that share a scale")
        .y_desc("mean KL divergence, nats")
        .draw()?;
    for ((name, mut points), color) in lines.into_iter().zip(COLORS.iter().cycle()) {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, color.filled())))?;
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 13))
        .draw()?;
    area.present()?;
    Ok(())
}
