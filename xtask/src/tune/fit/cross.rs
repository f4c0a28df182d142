//! Evidence out of sample: every step judged by constants that were fitted without its key, without its GPU, or without the run in which it was
//! measured.
//!
//! The fits do not begin from the constants in the code, which were fitted to some such journals, but from their orders of magnitude, three
//! times; of the three the one counts that is best on what it has seen.

use super::super::journal::{self, Contents};
use super::super::share::ModelShare;
use super::{Data, Step, choices, fit, times_of, values, with_logs};
use anyhow::{Context, Result, ensure};
use attn_tune::CostModel;
use std::fmt::Write as _;
use std::path::PathBuf;

/// What is asked of the worst step.
const LEAST_SHARE: f64 = 0.85;

/// Constants, and the steps that they have not seen.
struct Fold {
    models: [CostModel; 2],
    held_out: Data,
}

const STAGES: [&str; 2] = ["least squares", "moved for their choices too"];

/// What is fitted beside judging the code's constants.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fits {
    /// To one half of the keys, and to one GPU.
    pub cross: bool,
    /// To all journals but one.
    pub held_out: bool,
}

/// Prints how good the code's constants are on journals, and how good others are that have seen a part of them.
pub fn run(journals: &[PathBuf], fits: Fits) -> Result<()> {
    let contents = journals.iter().map(|path| journal::read(path)).collect::<Result<Vec<_>>>()?;
    println!("{}", judge(&contents)?);
    if fits.cross {
        println!("{}", report(&Data::of(&contents)?)?);
    }
    if fits.held_out {
        println!("{}", held_out(&contents)?);
    }
    Ok(())
}

/// The code's constants on each journal.
pub(super) fn judge(journals: &[Contents]) -> Result<String> {
    let mut text = String::new();
    let others = times_of(journals);
    for contents in journals {
        let data = Data::of_one(contents, &others)?;
        let model = CostModel::default();
        let all = data.steps.iter().map(|step| data.share_at(&model, step));
        writeln!(
            text,
            "the code's constants on {} with kernels {}: {}",
            contents.header.machine.device,
            contents.header.machine.build,
            summary(all)?
        )?;
        write!(text, "{}", data.losses(&model))?;
    }
    Ok(text)
}

/// Each journal judged, as a run on a GPU judges, by constants that were fitted to all the others: what the next run will show.
pub(super) fn held_out(journals: &[Contents]) -> Result<String> {
    ensure!(journals.len() > 1, "one journal alone leaves nothing to fit to");
    let mut text = String::new();
    let times = times_of(journals);
    for (at, contents) in journals.iter().enumerate() {
        let others: Vec<Contents> = journals
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != at)
            .map(|(_, other)| other.clone())
            .collect();
        let held_out = Data::of_one(contents, &times)?;
        let Fold { models, held_out } = Fold::fitted(&Data::of(&others)?, held_out);
        let device = &contents.header.machine.device;
        writeln!(text, "fitted to all other journals, judged by journal {} ({device}):", at + 1)?;
        for (name, model) in STAGES.iter().zip(&models) {
            let shares = held_out.steps.iter().map(|step| held_out.share_at(model, step));
            writeln!(text, "  {name}: {}", summary(shares)?)?;
        }
        if let Some(model) = models.last() {
            write!(text, "{}", held_out.losses(model))?;
        }
    }
    Ok(text)
}

pub(super) fn report(data: &Data) -> Result<String> {
    let mut text = String::new();
    let halves = [0, 1].map(|half| Fold::new(data, |step| half_of(step) == half));
    by_device(&mut text, data, "one half of the keys, judged by the other", &halves)?;
    if data.machines.len() > 1 {
        let others: Vec<Fold> =
            (0..data.machines.len()).map(|machine| Fold::new(data, |step| step.machine == machine)).collect();
        by_device(&mut text, data, "all other journals, judged by this one", &others)?;
    }
    Ok(text)
}

/// Of each device, what the stages of all folds make of the steps that they have not seen.
fn by_device(text: &mut String, data: &Data, how: &str, folds: &[Fold]) -> Result<()> {
    writeln!(text, "fitted to {how}:")?;
    for (stage, name) in STAGES.iter().enumerate() {
        for (machine, facts) in data.machines.iter().enumerate() {
            let shares = folds.iter().flat_map(|Fold { models, held_out }| {
                let of_machine = held_out.steps.iter().filter(move |step| step.machine == machine);
                of_machine.filter_map(move |step| Some(held_out.share_at(models.get(stage)?, step)))
            });
            writeln!(text, "  {name}, {}: {}", facts.device, summary(shares)?)?;
        }
    }
    for Fold { models, held_out } in folds {
        if let Some(model) = models.last() {
            write!(text, "{}", held_out.losses(model))?;
        }
    }
    Ok(())
}

/// Median, worst, how many are below what is asked, and of how many the choice was not timed.
fn summary(shares: impl Iterator<Item = Option<(f64, String)>>) -> Result<String> {
    let all: Vec<Option<(f64, String)>> = shares.collect();
    let untimed = all.iter().filter(|share| share.is_none()).count();
    let below = all.iter().flatten().filter(|(share, _)| *share < LEAST_SHARE).count();
    let share = ModelShare::among(all.into_iter().flatten()).context("a step with times")?;
    Ok(format!("{share}; {below} below {:.0} %, {untimed} whose choice was not timed", 100.0 * LEAST_SHARE))
}

impl Fold {
    fn new(data: &Data, is_held_out: impl Fn(&Step) -> bool) -> Self {
        Self::fitted(&data.part(|step| !is_held_out(step)), data.part(is_held_out))
    }

    fn fitted(seen: &Data, held_out: Data) -> Self {
        let of_start = |round: fn(f64) -> f64| {
            let squares = fit(seen, &orders_of_magnitude(round));
            let moved = choices::polish(seen, &squares);
            (choices::cost(seen, &moved), [squares, moved])
        };
        // By what has been seen alone.
        let fits = [f64::round, f64::floor, f64::ceil].map(of_start);
        let [first, others @ ..] = fits;
        let best = others.into_iter().fold(first, |best, other| if other.0 < best.0 { other } else { best });
        Self { models: best.1, held_out }
    }
}

/// Constants that say next to nothing of the measurements that those in the code were fitted to: each one's nearest power of two, or
/// the next below or above.
fn orders_of_magnitude(round: fn(f64) -> f64) -> CostModel {
    let logs = values(&CostModel::default());
    let logs: Vec<f64> =
        logs.iter().map(|value| round(value.max(1e-6).log2()) * std::f64::consts::LN_2).collect();
    with_logs(&logs)
}

/// The half that a step's key is in, on every GPU the same: a hash (FNV-1a) that no version changes.
pub(super) fn half_of(step: &Step) -> u64 {
    let name = step.key.to_string();
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash >> 32 & 1
}
