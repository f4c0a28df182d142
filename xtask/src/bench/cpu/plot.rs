//! The roofline: bytes of a step against its time, and the time in which they could be read.

use super::Record;
use anyhow::Context;
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (760, 480);
const ROOF: RGBColor = RGBColor(90, 90, 90);
const POINT: RGBColor = RGBColor(0, 90, 160);
const PEER: RGBColor = RGBColor(213, 94, 0);

/// Writes an SVG file.
pub fn draw(path: &Path, record: &Record) -> anyhow::Result<()> {
    let most = record.rows.iter().map(|row| row.megabytes).fold(1.0, f64::max) * 1.3;
    let least = record.rows.iter().map(|row| row.megabytes).fold(most, f64::min) / 1.3;
    let peer = |row: &super::Row| row.ggml_microseconds[0];
    let slowest = record.rows.iter().map(peer).fold(1.0, f64::max) * 1.5;
    let fastest = least * 1e3 / record.read_gb_per_s / 1.5;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let title = format!("Decode step, {} on {} threads", record.isa, record.threads);
        let mut chart = ChartBuilder::on(&area)
            .margin(18)
            .caption(title, ("sans-serif", 22))
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d((least..most).log_scale(), (fastest..slowest).log_scale())?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .x_desc("megabytes of codes and scales")
            .y_desc("microseconds")
            .label_style(("sans-serif", 15))
            .draw()?;
        let roof = [least, most].map(|megabytes| (megabytes, megabytes * 1e3 / record.read_gb_per_s));
        chart
            .draw_series(LineSeries::new(roof, ROOF.stroke_width(2)))?
            .label(format!("read at {:.1} GB/s", record.read_gb_per_s))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], ROOF.stroke_width(2)));
        let points = |time: &dyn Fn(&super::Row) -> f64, color: RGBColor| -> Vec<_> {
            record.rows.iter().map(|row| Circle::new((row.megabytes, time(row)), 4, color.filled())).collect()
        };
        chart
            .draw_series(points(&|row| row.microseconds, POINT))?
            .label("kv8")
            .legend(|(x, y)| Circle::new((x + 8, y), 4, POINT.filled()));
        chart
            .draw_series(points(&peer, PEER))?
            .label(if record.ggml == super::ggml::TABLE { "ggml q8_0, another machine" } else { "ggml q8_0" })
            .legend(|(x, y)| Circle::new((x + 8, y), 4, PEER.filled()));
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
