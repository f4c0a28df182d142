//! How good the cost model is by itself.

use attn_tune::{Point, Profile};

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

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = include_str!("../../../crates/attn-tune/tests/data/a-gpu.toml");

    #[test]
    fn the_model_is_judged_by_its_worst_point() {
        let (profile, _) = Profile::parse(PROFILE).unwrap();
        let share = ModelShare::of(&profile).unwrap();
        assert_eq!(share.points, 5);
        assert!((share.worst - 5.25 / 8.75).abs() < 1e-12 && share.median > share.worst);
        assert!(share.to_string().contains("60.0 % at the worst (d128"), "{share}");
        assert!(share.worst_at.contains("1 requests, 1024 tokens"), "{share}");
        assert!(ModelShare::of(&Profile::default()).is_none());
    }
}
