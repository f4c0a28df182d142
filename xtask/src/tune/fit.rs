//! `cargo xtask tune --fit`: the cost model's constants, fitted anew to the times in journals.
//!
//! Least squares on the logarithm of the time, over every candidate of every step, by Levenberg and Marquardt's method on
//! the logarithms of the constants (they are positive). Each is held weakly where it was, so that one of which the data
//! say nothing stays. Then they are moved in small steps for what the model's choices lose (`choices`). No randomness: the
//! same journals give the same constants.

mod choices;
mod cross;

pub use cross::{Fits, run as judge};

use super::journal::{self, Contents, Entry, Header};
use super::share::ModelShare;
use anyhow::{Context, Result, ensure};
use attn_tune::{Candidates, Choice, CostModel, Machine, RunKey, Shape, StaticKey};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::path::PathBuf;

const MOST_ROUNDS: usize = 200;
/// A constant that has moved by a factor of e weighs as much as this many times that are missed as usual.
const HOLD: f64 = 10.0;

/// What a miss that all candidates of a step share counts as: no choice depends on it.
const COMMON: f64 = 0.3;

/// Steps that a report names.
const NUM_LOSSES: usize = 12;

/// One step and what its candidates took.
#[derive(Clone)]
struct Step {
    machine: usize,
    key: StaticKey,
    run: RunKey,
    shape: Shape,
    times: Vec<(Choice, f64)>,
    /// What a model may choose, and what was timed of it.
    few: Vec<(Choice, Option<(Choice, f64)>)>,
}

/// The data of a fit.
#[derive(Clone)]
struct Data {
    machines: Vec<Machine>,
    steps: Vec<Step>,
}

/// A step on a GPU, with a kernel of one shape.
type Place = (String, String, RunKey);

/// What each run of a GPU took for the candidates of a step.
type Times = HashMap<Place, Vec<Vec<(Choice, f64)>>>;

fn place_of(machine: &Machine, entry: &Entry) -> Place {
    (format!("{} {} {:?}", machine.device, machine.build, entry.shape), entry.key.clone(), entry.run)
}

fn times_of(journals: &[Contents]) -> Times {
    let mut all = Times::new();
    for Contents { header, entries, .. } in journals {
        for entry in entries {
            let times = entry.times.iter().filter(|(_, us)| us.is_finite() && *us > 0.0);
            all.entry(place_of(&header.machine, entry)).or_default().push(times.copied().collect());
        }
    }
    all
}

/// Each choice's median.
fn medians(runs: &[Vec<(Choice, f64)>]) -> Vec<(Choice, f64)> {
    let mut times: BTreeMap<Choice, Vec<f64>> = BTreeMap::new();
    for (choice, us) in runs.iter().flatten() {
        times.entry(*choice).or_default().push(*us);
    }
    times.iter().map(|(choice, us)| (*choice, median(us))).collect()
}

/// Each choice as far behind the best as in the run where it was farthest.
fn worst(runs: &[Vec<(Choice, f64)>], best: f64) -> Vec<(Choice, f64)> {
    let mut times: BTreeMap<Choice, f64> = BTreeMap::new();
    for run in runs {
        let least = run.iter().map(|(_, us)| *us).fold(f64::INFINITY, f64::min);
        for (choice, us) in run {
            let worst = times.entry(*choice).or_default();
            *worst = worst.max(best * us / least);
        }
    }
    times.into_iter().collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

impl Data {
    /// The steps of journals. What several runs of a GPU have measured is one step, whose times are their medians: a choice that one of
    /// them has not timed another has. Of what a model may choose the run counts in which it lost most.
    fn of(journals: &[Contents]) -> Result<Self> {
        let mut bandwidths: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let name_of = |machine: &Machine| format!("{} {}", machine.device, machine.build);
        for Contents { header: Header { machine, .. }, .. } in journals {
            bandwidths.entry(name_of(machine)).or_default().push(machine.read_gb_per_s);
        }
        let mut data = Self { machines: Vec::new(), steps: Vec::new() };
        let (all, mut seen) = (times_of(journals), HashSet::new());
        for Contents { header: Header { machine, .. }, entries, .. } in journals {
            let name = name_of(machine);
            let known = data.machines.iter().position(|known| name_of(known) == name);
            let index = known.unwrap_or_else(|| {
                let read_gb_per_s = median(&bandwidths[&name]);
                data.machines.push(Machine { read_gb_per_s, ..machine.clone() });
                data.machines.len() - 1
            });
            for entry in entries {
                let place = place_of(machine, entry);
                if seen.insert(place.clone()) {
                    let runs = &all[&place];
                    data.add(index, entry, medians(runs))?;
                    if let Some(step) = data.steps.last_mut() {
                        let best = step.best().map_or(0.0, |(_, us)| us);
                        step.few = few_of(&data.machines[index], step, &worst(runs, best));
                    }
                }
            }
        }
        Ok(data)
    }

    /// The steps of one journal; what it has not timed of a model's candidates others may have.
    fn of_one(journal: &Contents, others: &Times) -> Result<Self> {
        let machine = journal.header.machine.clone();
        let mut data = Self { machines: vec![machine], steps: Vec::new() };
        for entry in &journal.entries {
            let times = entry.times.iter().filter(|(_, us)| us.is_finite() && *us > 0.0);
            data.add(0, entry, times.copied().collect())?;
            let others = others.get(&place_of(&journal.header.machine, entry));
            if let (Some(others), Some(step)) = (others, data.steps.last_mut()) {
                let few = few_of(&data.machines[0], step, &medians(others));
                for (own, of_others) in step.few.iter_mut().zip(few) {
                    own.1 = own.1.or(of_others.1);
                }
            }
        }
        Ok(data)
    }

    fn add(&mut self, machine: usize, entry: &Entry, times: Vec<(Choice, f64)>) -> Result<()> {
        let (key, run, shape) = (entry.key()?, entry.run, entry.shape);
        let mut step = Step { machine, key, run, shape, times, few: Vec::new() };
        step.few = few_of(&self.machines[machine], &step, &step.times);
        self.steps.push(step);
        Ok(())
    }

    /// ln(predicted / measured) of every candidate; of one far behind the best of its step less, for nobody will choose it.
    fn residuals(&self, model: &CostModel) -> Vec<f64> {
        let of_step = |step: &Step| -> Vec<f64> {
            let best = step.best().map_or(f64::INFINITY, |(_, us)| us);
            let predict = model.step(&self.machines[step.machine], &step.key, &step.shape, &step.run);
            let times = step.times.iter();
            let each: Vec<(f64, f64)> =
                times.map(|(choice, us)| (best / us, (predict(choice) / us).ln())).collect();
            let weights: f64 = each.iter().map(|(weight, _)| weight * weight).sum();
            let mean =
                each.iter().map(|(weight, miss)| weight * weight * miss).sum::<f64>() / weights.max(1e-9);
            each.into_iter().map(|(weight, miss)| weight * (miss - (1.0 - COMMON) * mean)).collect()
        };
        self.steps.iter().flat_map(of_step).collect()
    }

    fn predict(&self, model: &CostModel, step: &Step, choice: &Choice) -> f64 {
        let machine = self.machines.get(step.machine);
        machine.map_or(f64::NAN, |machine| model.predict(machine, &step.key, &step.shape, &step.run, choice))
    }

    /// The model's choice.
    fn chosen(&self, model: &CostModel, step: &Step) -> Option<(Choice, Option<(Choice, f64)>)> {
        let predict = model.step(self.machines.get(step.machine)?, &step.key, &step.shape, &step.run);
        step.few.iter().min_by(|a, b| predict(&a.0).total_cmp(&predict(&b.0))).copied()
    }

    /// The model's choice, if it was timed, and the fastest of all.
    fn chosen_and_best(&self, model: &CostModel, step: &Step) -> Option<[(Choice, f64); 2]> {
        let (_, chosen) = self.chosen(model, step)?;
        let (chosen, best) = (chosen?, step.best()?);
        Some([chosen, if chosen.1 < best.1 { chosen } else { best }])
    }

    fn name(&self, step: &Step) -> String {
        let device = self.machines.get(step.machine).map_or("", |machine| machine.device.as_str());
        format!("{device}: {}, {}", step.key, step.run)
    }

    /// The model's choice as a share of the speed of the fastest, and where that is.
    fn share_at(&self, model: &CostModel, step: &Step) -> Option<(f64, String)> {
        let [chosen, best] = self.chosen_and_best(model, step)?;
        Some((best.1 / chosen.1, self.name(step)))
    }

    /// How fast the model's choice among the candidates is, beside the fastest of them.
    fn share(&self, model: &CostModel) -> Option<ModelShare> {
        ModelShare::among(self.steps.iter().filter_map(|step| self.share_at(model, step)))
    }

    /// Some of the steps.
    fn part(&self, keep: impl Fn(&Step) -> bool) -> Self {
        let steps = self.steps.iter().filter(|step| keep(step)).cloned().collect();
        Self { machines: self.machines.clone(), steps }
    }

    /// The steps where the model's choice loses most.
    fn losses(&self, model: &CostModel) -> String {
        let pairs = |step| Some((step, self.chosen_and_best(model, step)?));
        let mut losses: Vec<_> = self.steps.iter().filter_map(pairs).collect();
        let share = |[chosen, best]: &[(Choice, f64); 2]| best.1 / chosen.1;
        losses.sort_by(|(_, a), (_, b)| share(a).total_cmp(&share(b)));
        let mut text = String::new();
        for (step, pair) in losses.iter().take(NUM_LOSSES) {
            text += &format!("  {:.1} % at {}\n", 100.0 * share(pair), self.name(step));
            for (what, (choice, us)) in ["chosen", "best"].iter().zip(pair) {
                let expected = self.predict(model, step, choice);
                text += &format!("    {what}: {choice}: {us:.1} us, {expected:.1} expected\n");
            }
        }
        text
    }
}

impl Step {
    fn best(&self) -> Option<(Choice, f64)> {
        self.times.iter().min_by(|a, b| a.1.total_cmp(&b.1)).copied()
    }
}

/// The candidates of a step, and those of them that were timed. The smallest split does not matter where nothing else differs and as much
/// is expected of both.
fn few_of(machine: &Machine, step: &Step, times: &[(Choice, f64)]) -> Vec<(Choice, Option<(Choice, f64)>)> {
    let model = CostModel::default();
    let predict = model.step(machine, &step.key, &step.shape, &step.run);
    let timed = |choice: &Choice| {
        let expected = predict(choice);
        let is_same = |timed: &Choice| {
            Choice { min_split_tiles: choice.min_split_tiles, ..*timed } == *choice
                && (predict(timed) / expected - 1.0).abs() < 1e-9
        };
        let exact = times.iter().find(|(timed, _)| timed == choice);
        exact.or_else(|| times.iter().find(|(timed, _)| is_same(timed))).copied()
    };
    let few = Candidates::few(machine.num_sms, &step.key, &step.shape, &step.run);
    few.map(|choice| (choice, timed(&choice))).collect()
}

fn values(model: &CostModel) -> Vec<f64> {
    model.clone().constants().into_iter().map(|(_, value)| *value).collect()
}

fn with_logs(logs: &[f64]) -> CostModel {
    let mut model = CostModel::default();
    for ((_, value), log) in model.constants().into_iter().zip(logs) {
        *value = log.exp();
    }
    model
}

fn sum_of_squares(residuals: &[f64]) -> f64 {
    residuals.iter().map(|residual| residual * residual).sum()
}

/// The constants with the least squares, from those to `begin` with.
fn fit(data: &Data, begin: &CostModel) -> CostModel {
    let begin: Vec<f64> = values(begin).iter().map(|value| value.max(1e-6).ln()).collect();
    let mut logs = begin.clone();
    let cost = |residuals: &[f64], logs: &[f64], hold: f64| {
        let moved = logs.iter().zip(&begin).map(|(log, begin)| (log - begin) * (log - begin));
        sum_of_squares(residuals) + hold * moved.sum::<f64>()
    };
    let mut residuals = data.residuals(&with_logs(&logs));
    let mut damping = 1e-3;
    for _ in 0..MOST_ROUNDS {
        let step = 1e-5;
        let hold = HOLD * sum_of_squares(&residuals) / residuals.len().max(1) as f64;
        let slopes: Vec<Vec<f64>> = (0..logs.len())
            .map(|constant| {
                let mut moved = logs.clone();
                moved[constant] -= step;
                let moved = data.residuals(&with_logs(&moved));
                residuals.iter().zip(&moved).map(|(here, there)| (here - there) / step).collect()
            })
            .collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut normal: Vec<Vec<f64>> = slopes
            .iter()
            .map(|a| slopes.iter().map(|b| dot(a, b)).chain([-dot(a, &residuals)]).collect())
            .collect();
        for (at, row) in normal.iter_mut().enumerate() {
            row[at] += hold + damping * row[at];
            if let Some(right) = row.last_mut() {
                *right -= hold * (logs[at] - begin[at]);
            }
        }
        let moved: Vec<f64> =
            logs.iter().zip(solve(normal)).map(|(log, by)| log + by.clamp(-0.5, 0.5)).collect();
        let after = data.residuals(&with_logs(&moved));
        let (old, new) = (cost(&residuals, &logs, hold), cost(&after, &moved, hold));
        if new < old {
            (logs, residuals, damping) = (moved, after, damping / 3.0);
            if old - new < 1e-9 * old {
                break;
            }
        } else {
            damping *= 4.0;
            if damping > 1e9 {
                break;
            }
        }
    }
    with_logs(&logs)
}

/// Solves `[A | b]`, symmetric and positive, by elimination with pivots.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let count = rows.len();
    for column in 0..count {
        let pivot = (column..count).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs()));
        rows.swap(column, pivot.unwrap_or(column));
        let pivot = rows[column].clone();
        for (at, row) in rows.iter_mut().enumerate() {
            if at != column && pivot[column] != 0.0 {
                let factor = row[column] / pivot[column];
                row.iter_mut().zip(&pivot).for_each(|(value, pivot)| *value -= factor * pivot);
            }
        }
    }
    (0..count).map(|at| if rows[at][at] == 0.0 { 0.0 } else { rows[at][count] / rows[at][at] }).collect()
}

/// Runs the command.
pub fn run(journals: &[PathBuf]) -> Result<()> {
    let contents = journals.iter().map(|path| journal::read(path)).collect::<Result<Vec<_>>>()?;
    println!("{}", report(&Data::of(&contents)?)?);
    Ok(())
}

/// The constants as they are written: with five digits, for though the data say three, choices that are nearly alike turn on the others.
fn rounded(model: &CostModel) -> CostModel {
    let mut model = *model;
    for (_, value) in model.constants() {
        let unit = 10f64.powf(value.abs().max(1e-6).log10().floor() - 4.0);
        *value = (*value / unit).round() * unit;
        // The nearest number to the decimal, which the product above may miss by the last bit.
        *value = format!("{value:.10}").parse().unwrap_or(*value);
    }
    model
}

fn report(data: &Data) -> Result<String> {
    let before = CostModel::default();
    let num_times = data.residuals(&before).len();
    ensure!(num_times > values(&before).len(), "{num_times} times are too few for a fit");
    let squares = fit(data, &before);
    // From where the squares are least, and from what the code has: neither is near the other's best.
    let polish = |from| rounded(&choices::polish(data, from));
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| polish(&before));
        (polish(&squares), other.join())
    });
    let other = other.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let after = if choices::cost(data, &one) <= choices::cost(data, &other) { one } else { other };
    let mut text = String::new();
    let devices: Vec<&str> = data.machines.iter().map(|machine| machine.device.as_str()).collect();
    writeln!(text, "{num_times} times of {} steps on {}", data.steps.len(), devices.join(", "))?;
    let models =
        [("the code's constants", &before), ("least squares", &squares), ("fitted constants", &after)];
    for (name, model) in models {
        let rms = (sum_of_squares(&data.residuals(model)) / num_times as f64).sqrt();
        let share = data.share(model).context("a step with times")?;
        writeln!(
            text,
            "{name}: a time is missed by {:.1} % (root mean square); {share}",
            100.0 * (rms.exp() - 1.0)
        )?;
    }
    write!(text, "where the fitted constants choose worst:\n{}", data.losses(&after))?;
    writeln!(text, "for CostModel::default() in crates/attn-tune/src/model.rs:")?;
    for (name, value) in after.clone().constants() {
        writeln!(text, "            {name}: {value:?},")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tune::tests::{SHAPE, machine};
    use attn_tune::Timing;

    /// Times made by the model itself, with other constants and noise of a percent.
    fn journal(model: &CostModel) -> Contents {
        let machine = machine();
        let mut entries = Vec::new();
        let mut turn = 0u32;
        // Heads of every length, groups of a whole head, further rows, capped logits; shares with kernels of their own, and without.
        let keys = [
            ("d128 k8 v8 f16 gqa4 q1 records-paged throughput", (2, 8)),
            ("d128 k8 v8 f16 gqa4 q1 records-paged throughput", (0, 0)),
            ("d128 k128 v128 f16 gqa8 q1 records-paged throughput", (2, 8)),
            ("d256 k8 v8 f16 gqa8 q1 records-paged throughput", (0, 0)),
            ("d64 k8 v8 f16 gqa1 q1 records-paged throughput soft-cap", (2, 8)),
            ("d64 k8 v8 f16 gqa4 q1 planes-scattered throughput", (2, 8)),
            ("d128 k8 v8 f16 gqa4 q4 planes-scattered throughput", (2, 8)),
            ("d256 k8 v8 f16 gqa4 q1 planes-scattered throughput", (0, 0)),
            ("d128 k8 v8 f16 gqa4 q1 records-paged batch-invariant-512", (0, 0)),
            ("d128 k32 v32 f16 gqa4 q1 records-paged throughput", (2, 8)),
            ("d128 k32 v32 f16 gqa8 q1 planes-scattered throughput", (2, 8)),
            ("d64 k32 v32 f16 gqa8 q1 planes-scattered throughput", (2, 8)),
            ("d64 k8 v8 f16 gqa7 q1 planes-scattered throughput", (2, 8)),
            ("d64 k32 v32 f16 gqa4 q1 records-paged throughput", (2, 8)),
            ("d256 k32 v32 f16 gqa1 q1 planes-scattered throughput", (0, 0)),
            ("d256 k32 v32 f16 gqa4 q1 records-paged throughput", (0, 0)),
        ];
        for (key, share_blocks) in keys {
            let key: StaticKey = key.parse().unwrap();
            let shape = SHAPE.with_share_blocks(share_blocks);
            for (batch, num_kv_heads) in [(1u32, 8u32), (8, 8), (64, 8), (4, 1)] {
                for kv_len in [512u32, 2048, 8192, 32_768] {
                    let kv_tokens = u64::from(batch) * u64::from(kv_len);
                    let run = RunKey { batch, num_kv_heads, kv_tokens, longest: kv_len };
                    let times: Vec<(Choice, f64)> = Candidates::few(132, &key, &shape, &run)
                        .map(|choice| {
                            turn = turn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                            let noise = 1.0 + 0.01 * (f64::from(turn >> 16) / 32_768.0 - 1.0);
                            (choice, noise * model.predict(&machine, &key, &shape, &run, &choice))
                        })
                        .collect();
                    let (choice, us) = times[0];
                    let timing = Timing { us, p10_us: us, p90_us: us, model_us: us, floor_us: us };
                    entries.push(Entry {
                        key: key.to_string(),
                        run,
                        shape,
                        choice,
                        timing,
                        times,
                        wrong: vec![],
                    });
                }
            }
        }
        let header = Header { machine, driver: "13.0".to_owned(), date: "2026-11-22".to_owned() };
        Contents { header, entries, num_damaged: 0 }
    }

    #[test]
    fn constants_that_made_the_times_are_found_again() {
        let truth = CostModel {
            launch_us: 4.1,
            item_us: 1.7,
            step_us: 0.4,
            row_ns: 7.1,
            merge_us: 3.2,
            crowd_us: 1.9,
            ..CostModel::default()
        };
        let data = Data::of(&[journal(&truth)]).unwrap();
        let fitted = fit(&data, &CostModel::default());
        let mut names = CostModel::default();
        let pairs = values(&truth).into_iter().zip(values(&fitted)).zip(names.constants());
        for ((want, got), (name, _)) in pairs {
            // What a partial costs, and whatever else is less than the noise of most steps, is lost in it.
            let is_small = matches!(name, "merge_partial_us" | "crowd_us" | "shares_issue_us" | "share_us");
            assert!((got / want).ln().abs() < 0.1 || is_small, "{name}: {got} instead of {want}");
        }
        let share = data.share(&fitted).unwrap();
        assert!(share.median > 0.99 && share.worst > 0.95, "{share}");
        let text = report(&data).unwrap();
        assert!(
            text.contains("            launch_us: 4.")
                && text.contains("fitted constants: a time is missed by 0."),
            "{text}"
        );
    }

    #[test]
    fn constants_that_have_not_seen_a_step_are_good_where_the_model_holds() {
        let data = Data::of(&[journal(&CostModel { merge_us: 3.2, ..CostModel::default() })]).unwrap();
        let text = cross::report(&data).unwrap();
        let moved: Vec<&str> = text.lines().filter(|line| line.contains("moved for their choices")).collect();
        // One GPU: halves of its keys, and no other to be judged by.
        let [line] = moved[..] else { panic!("{text}") };
        assert!(line.contains(&format!("of {} points", data.steps.len())), "{line}");
        // Half of the keys do not tell every constant: one step of 256 may be chosen badly.
        assert!(["; 0 below", "; 1 below"].iter().any(|few| line.contains(few)), "{line}");
        assert!(!text.contains("all other journals"));
        let halves: Vec<usize> =
            [0, 1].map(|half| data.steps.iter().filter(|step| cross::half_of(step) == half).count()).to_vec();
        assert!(halves.iter().all(|count| *count > 0), "{halves:?}");
    }

    #[test]
    fn a_run_that_was_not_fitted_to_is_foretold() {
        let truth = CostModel { merge_us: 3.2, ..CostModel::default() };
        let text = cross::held_out(&[journal(&truth), journal(&truth)]).unwrap();
        for held_out in ["judged by journal 1 (A GPU)", "judged by journal 2 (A GPU)"] {
            assert!(text.contains(held_out), "{text}");
        }
        let moved = text.lines().filter(|line| line.contains("moved for their choices"));
        assert_eq!(moved.filter(|line| line.contains("; 0 below 85 %")).count(), 2, "{text}");
        // Nothing would be left to fit to.
        assert!(cross::held_out(&[journal(&truth)]).is_err());
    }

    #[test]
    fn the_codes_constants_are_judged_as_they_are() {
        let text = cross::judge(&[journal(&CostModel::default())]).unwrap();
        assert!(
            text.contains("A GPU with kernels 0123456789ab") && text.contains("; 0 below 85 %, 0 whose"),
            "{text}"
        );
        let other = CostModel { launch_us: 1.0, merge_us: 40.0, shares_us: 60.0, ..CostModel::default() };
        assert!(!cross::judge(&[journal(&other)]).unwrap().contains("; 0 below 85 %"));
    }

    #[test]
    fn nothing_can_be_fitted_to_nothing() {
        assert!(report(&Data { machines: vec![], steps: vec![] }).is_err());
    }
}
