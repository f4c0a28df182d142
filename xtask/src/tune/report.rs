//! `cargo xtask tune --report`: tuned against the model's choice and against the floor.

use anyhow::{Context, Result};
use attn_tune::{Point, Profile, RunKey, StaticKey, Timing};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const WIDTH: u32 = 900;
const PANEL_HEIGHT: u32 = 230;
const HEAD_HEIGHT: u32 = 300;
const COLUMNS: usize = 2;
const TUNED: RGBColor = RGBColor(0, 90, 160);
const MODEL: RGBColor = RGBColor(213, 94, 0);
const FLOOR: RGBColor = RGBColor(90, 90, 90);
/// What the model should reach at the median and at the worst, in percent.
const TARGETS: [f64; 2] = [93.0, 85.0];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Shapes that share a panel: all numbers of query heads of one cache.
fn panel_name(key: &StaticKey) -> String {
    let StaticKey { head_dim, k_group_len, layout, .. } = *key;
    let layout = if layout.is_scattered() { "single slots" } else { "pages" };
    format!("head_dim {head_dim}, groups of {k_group_len}, {layout}")
}

/// Percent of the copy-only reader's speed.
fn of_floor(timing: &Timing, us: f64) -> f64 {
    100.0 * timing.floor_us / us
}

/// Draws all points in the order of their speed, then each in the panel of its cache: speed as a share of a kernel's that
/// only reads the same rows, against that kernel's time.
pub fn draw(profile: &Profile, path: &Path) -> Result<()> {
    anyhow::ensure!(!profile.tables.is_empty(), "the profile has no points to draw");
    let mut panels: BTreeMap<String, Vec<(&RunKey, &Point)>> = BTreeMap::new();
    for (key, table) in &profile.tables {
        panels.entry(panel_name(key)).or_default().extend(table);
    }
    let rows = panels.len().div_ceil(COLUMNS);
    let mut svg = String::new();
    {
        let height = HEAD_HEIGHT + PANEL_HEIGHT * rows as u32;
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let (head, rest) = area.split_vertically(HEAD_HEIGHT);
        let timings: Vec<Timing> = panels.values().flatten().map(|(_, point)| point.timing).collect();
        let (left, right) = head.split_horizontally(WIDTH / 2);
        speeds(&left, &profile.device, &timings)?;
        shares(&right, &timings)?;
        for (area, (name, points)) in rest.split_evenly((rows, COLUMNS)).iter().zip(&panels) {
            panel(area, name, points)?;
        }
        area.present()?;
    }
    std::fs::write(path, svg).with_context(|| path.display().to_string())
}

/// `(percent of the points, value)`, values rising.
fn sorted(values: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1).max(1) as f64;
    values.into_iter().enumerate().map(|(index, value)| (100.0 * index as f64 / last, value)).collect()
}

/// Tuned and by the model, all points by their speed.
fn speeds(area: &Area<'_>, device: &str, timings: &[Timing]) -> Result<()> {
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(24)
        .caption(format!("{device}: speed, % of only reading the same rows"), ("sans-serif", 15))
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..100.0, 0.0..110.0)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_desc(format!("% of {} points, the slowest first", timings.len()))
        .label_style(("sans-serif", 12))
        .draw()?;
    type Time = fn(&Timing) -> f64;
    let series: [(&str, RGBColor, Time); 2] =
        [("the cost model's choice", MODEL, |timing| timing.model_us), ("tuned", TUNED, |timing| timing.us)];
    for (label, color, time) in series {
        let points = sorted(timings.iter().map(|timing| of_floor(timing, time(timing))));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE)
        .border_style(FLOOR)
        .label_font(("sans-serif", 12))
        .draw()?;
    Ok(())
}

/// The model's choice as a share of the tuned speed, the worst first, and what it should be.
fn shares(area: &Area<'_>, timings: &[Timing]) -> Result<()> {
    let points = sorted(timings.iter().map(|timing| 100.0 * timing.us / timing.model_us));
    let least = points.first().map_or(0.0, |(_, share)| *share).min(TARGETS[1]);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(24)
        .caption("the model alone: speed, % of the tuned", ("sans-serif", 15))
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..100.0, least - 3.0..101.0)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_desc("% of the points, the worst first; grey: what is asked of the median and the worst")
        .label_style(("sans-serif", 12))
        .draw()?;
    for target in TARGETS {
        chart.draw_series(LineSeries::new([(0.0, target), (100.0, target)], FLOOR.stroke_width(1)))?;
    }
    chart.draw_series(LineSeries::new(points, MODEL.stroke_width(2)))?;
    Ok(())
}

/// The points of one cache.
fn panel(area: &Area<'_>, name: &str, points: &[(&RunKey, &Point)]) -> Result<()> {
    let floors = points.iter().map(|(_, point)| point.timing.floor_us);
    let (least, most) =
        floors.fold((f64::MAX, 1.0f64), |(least, most), floor| (least.min(floor), most.max(floor)));
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(24)
        .caption(name, ("sans-serif", 14))
        .x_label_area_size(34)
        .y_label_area_size(40)
        .build_cartesian_2d((least / 1.3..most * 1.3).log_scale(), 0.0..110.0)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_desc("microseconds of only reading")
        .y_desc("% of it")
        .label_style(("sans-serif", 12))
        .draw()?;
    let at = |timing: &Timing, us: f64| (timing.floor_us, of_floor(timing, us));
    let timings = || points.iter().map(|(_, point)| point.timing);
    chart.draw_series(
        timings().map(|timing| Circle::new(at(&timing, timing.model_us), 3, MODEL.stroke_width(1))),
    )?;
    chart.draw_series(timings().map(|timing| Circle::new(at(&timing, timing.us), 2, TUNED.filled())))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = include_str!("../../../crates/attn-tune/tests/data/a-gpu.toml");

    #[test]
    fn every_point_is_drawn_tuned_and_by_the_model() {
        let (profile, _) = Profile::parse(PROFILE).unwrap();
        let path = std::env::temp_dir().join(format!("kv8-report-{}.svg", std::process::id()));
        draw(&profile, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let points: usize = profile.tables.values().map(attn_tune::Table::len).sum();
        assert_eq!(svg.matches("<circle").count(), 2 * points);
        for panel in ["head_dim 128, groups of 8, pages", "head_dim 128, groups of 8, single slots"] {
            assert_eq!(svg.matches(panel).count(), 1, "{panel}");
        }
        // Two curves and the model's share: each has as many points as the profile.
        let is_curve = |line: &&str| {
            line.starts_with("<polyline")
                && line.split(',').count() == points + 1
                && line.contains("stroke-width=\"2\"")
        };
        assert_eq!(svg.lines().filter(is_curve).count(), 3);
        assert!(draw(&Profile::default(), &path).is_err());
    }
}
