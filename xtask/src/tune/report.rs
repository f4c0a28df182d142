//! `cargo xtask tune --report`: tuned against the model's choice and against the floor.

use anyhow::{Context, Result};
use attn_tune::{Point, Profile, StaticKey, Table};
use plotters::prelude::*;
use std::path::Path;

const WIDTH: u32 = 760;
const PANEL_HEIGHT: u32 = 300;
const TUNED: RGBColor = RGBColor(0, 90, 160);
const MODEL: RGBColor = RGBColor(213, 94, 0);
const FLOOR: RGBColor = RGBColor(90, 90, 90);

/// How well the cost model does by itself: its choice's speed as a share of the tuned speed.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShare {
    pub median: f64,
    pub worst: f64,
    /// Where that is.
    pub worst_at: String,
    pub points: usize,
}

impl ModelShare {
    /// Over all points of a profile; `None` if it has none.
    pub fn of(profile: &Profile) -> Option<Self> {
        let tables = profile.tables.iter();
        Self::among(tables.flat_map(|(key, table)| {
            table.iter().map(move |(run, Point { timing, .. })| {
                (timing.us / timing.model_us, format!("{key}, {run}"))
            })
        }))
    }

    /// Over shares and where they are.
    pub fn among(shares: impl Iterator<Item = (f64, String)>) -> Option<Self> {
        let mut shares: Vec<(f64, String)> = shares.collect();
        shares.sort_by(|a, b| a.0.total_cmp(&b.0));
        let median = shares.get(shares.len() / 2)?.0;
        let (worst, worst_at) = shares.first()?.clone();
        Some(Self { median, worst, worst_at, points: shares.len() })
    }
}

impl std::fmt::Display for ModelShare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { median, worst, worst_at, points } = self;
        write!(
            f,
            "the cost model alone reaches {:.1} % of the tuned speed at the median of {points} points, {:.1} % at the worst \
             ({worst_at})",
            100.0 * median,
            100.0 * worst
        )
    }
}

/// Draws a panel for each key: time against rows of the cache.
pub fn draw(profile: &Profile, path: &Path) -> Result<()> {
    anyhow::ensure!(!profile.tables.is_empty(), "the profile has no points to draw");
    let height = PANEL_HEIGHT * profile.tables.len() as u32;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let panels = area.split_evenly((profile.tables.len(), 1));
        for (panel, (key, table)) in panels.iter().zip(&profile.tables) {
            panel_of(panel, &profile.device, key, table)?;
        }
        area.present()?;
    }
    std::fs::write(path, svg).with_context(|| path.display().to_string())
}

fn panel_of(
    panel: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    device: &str,
    key: &StaticKey,
    table: &Table,
) -> Result<()> {
    let rows = |run: &attn_tune::RunKey| run.kv_tokens as f64 * f64::from(run.num_kv_heads);
    let (mut least, mut most) = (f64::MAX, 1.0f64);
    let (mut fastest, mut slowest) = (f64::MAX, 1.0f64);
    for (run, point) in table {
        (least, most) = (least.min(rows(run)), most.max(rows(run)));
        fastest = fastest.min(point.timing.floor_us);
        slowest = slowest.max(point.timing.model_us);
    }
    let x = (least / 1.3..most * 1.3).log_scale();
    let y = (fastest / 1.5..slowest * 1.5).log_scale();
    let mut chart = ChartBuilder::on(panel)
        .margin(14)
        .caption(format!("{device}: {key}"), ("sans-serif", 16))
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_desc("tokens x kv heads")
        .y_desc("microseconds")
        .label_style(("sans-serif", 13))
        .draw()?;
    type Time = fn(&attn_tune::Timing) -> f64;
    let series: [(&str, RGBColor, i32, Time); 3] = [
        ("a kernel that only reads", FLOOR, 2, |timing| timing.floor_us),
        ("the cost model's choice", MODEL, 4, |timing| timing.model_us),
        ("tuned", TUNED, 3, |timing| timing.us),
    ];
    for (label, color, size, time) in series {
        let at = |(run, point): (&attn_tune::RunKey, &attn_tune::Point)| (rows(run), time(&point.timing));
        chart
            .draw_series(table.iter().map(|entry| Circle::new(at(entry), size, color.filled())))?
            .label(label)
            .legend(move |(x, y)| Circle::new((x + 8, y), size, color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(FLOOR)
        .label_font(("sans-serif", 13))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = include_str!("../../../crates/attn-tune/tests/data/a-gpu.toml");

    #[test]
    fn every_point_is_drawn_three_times() {
        let (profile, _) = Profile::parse(PROFILE).unwrap();
        let path = std::env::temp_dir().join(format!("kv8-report-{}.svg", std::process::id()));
        draw(&profile, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let points: usize = profile.tables.values().map(Table::len).sum();
        // Each panel's legend has a circle for each series too.
        assert_eq!(svg.matches("<circle").count(), 3 * points + 3 * profile.tables.len());
    }

    #[test]
    fn the_model_is_judged_by_its_worst_point() {
        let (profile, _) = Profile::parse(PROFILE).unwrap();
        let share = ModelShare::of(&profile).unwrap();
        assert_eq!(share.points, 5);
        assert!((share.worst - 5.25 / 5.75).abs() < 1e-12 && share.median > share.worst);
        assert!(share.to_string().contains("91.3 % at the worst (d128"), "{share}");
        assert!(share.worst_at.contains("1 requests, 1024 tokens"), "{share}");
        assert!(ModelShare::of(&Profile::default()).is_none());
    }
}
