//! The demo's picture: quantization error by group length, one line a layer.

use super::Row;
use anyhow::Context;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

const SIZE: (u32, u32) = (760, 480);
/// Dark enough on white, and told apart by people who see red and green alike.
const COLORS: [RGBColor; 4] =
    [RGBColor(0, 90, 160), RGBColor(213, 94, 0), RGBColor(0, 135, 100), RGBColor(150, 60, 130)];

/// Writes an SVG file.
pub fn draw(path: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let group_lens = distinct(rows.iter().map(|row| row.group_len));
    let layers = distinct(rows.iter().map(|row| row.layer));
    let top = rows.iter().map(|row| 100.0 * row.quantization_error).fold(0.0, f64::max) * 1.15;
    let last = group_lens.len().saturating_sub(1) as f64;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(18)
            .caption("Quantization error of the attention output", ("sans-serif", 22))
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d(-0.25..last + 0.25, 0.0..top)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .max_light_lines(0)
            .set_tick_mark_size(LabelAreaPosition::Bottom, 0)
            .x_label_formatter(&|_| String::new())
            .y_label_formatter(&|y| format!("{y:.2} %"))
            .x_desc("channels that share a scale")
            .y_desc("relative L2, worst head")
            .label_style(("sans-serif", 15))
            .draw()?;
        // Group lengths stand at equal distances, each with a label of its own: no ticks between them.
        let below =
            ("sans-serif", 15).into_font().into_text_style(&area).pos(Pos::new(HPos::Center, VPos::Top));
        for (x, group_len) in group_lens.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(x as f64, 0.0));
            area.draw(&Text::new(group_len.to_string(), (x, y + 8), below.clone()))?;
        }
        for (&layer, &color) in layers.iter().zip(COLORS.iter().cycle()) {
            let points: Vec<(f64, f64)> = rows
                .iter()
                .filter(|row| row.layer == layer)
                .filter_map(|row| {
                    let x = group_lens.iter().position(|&group_len| group_len == row.group_len)?;
                    Some((x as f64, 100.0 * row.quantization_error))
                })
                .collect();
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, color.filled())))?;
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)))?
                .label(format!("layer {layer}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 15))
            .draw()?;
        area.present()?;
    }
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn distinct(values: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut values: Vec<u32> = values.collect();
    values.sort_unstable();
    values.dedup();
    values
}
