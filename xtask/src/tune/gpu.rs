//! The search on a device: point by point, each kept as it is found.

use super::grid::Grid;
use super::search::{Effort, Outcome, Subject, search};
use super::{Args, read, report};
use crate::bench::gpu::{Bench, Case, DevicePlan, Pool, Step, quantiles, relative_error};
use anyhow::{Context, Result};
use attn_kernels::device::{CudaDevice, Kernels, Stream};
use attn_tune::{Candidates, Choice, Level, Point, Profile, RunKey, Timing, Tuner, file_name};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::time::{Duration, Instant};

/// The oracle is asked for the first request where it is at most this long; other requests are compared between candidates.
const CHECKED_KV_LEN: u32 = 8192;
/// Relative L2 error at which a result in bf16 is wrong: its own rounding is 1.7e-3.
const MOST_ERROR: f64 = 4e-3;

/// One case, tried with one choice after the other.
struct Trial<'a> {
    step: Step<'a>,
    case: &'a Case,
    row_blocks: u32,
    /// The oracle's output of the first request, or the first candidate's where that request is too long for the oracle.
    want: Option<Vec<f64>>,
}

impl Trial<'_> {
    fn plan(&self, choice: &Choice) -> Result<DevicePlan> {
        let Self { case, row_blocks, .. } = self;
        self.step.plan(&choice.split(case.policy, case.spec.num_kv_heads, *row_blocks))
    }
}

impl Subject for Trial<'_> {
    fn fault(&mut self, choice: &Choice) -> Result<Option<String>> {
        let plan = self.plan(choice)?;
        let got = match self.step.run(&plan) {
            Ok(got) => got,
            Err(error) => return Ok(Some(format!("{error:#}"))),
        };
        let Some(want) = &self.want else {
            self.want = Some(got.iter().map(|x| f64::from(*x)).collect());
            return Ok(None);
        };
        let error = relative_error(&got, want);
        let is_right = error <= MOST_ERROR;
        Ok((!is_right).then(|| format!("relative error {error:.1e}; at most {MOST_ERROR:.0e}")))
    }

    fn time(&mut self, choice: &Choice, samples: usize) -> Result<Vec<f64>> {
        let plan = self.plan(choice)?;
        self.step.time(&plan, samples)
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let device = CudaDevice::open(args.device).context("no CUDA device to tune")?;
    let kernels = Kernels::embedded(&device)?;
    let stream = Stream::new(&device)?;
    let effort = if args.quick {
        Effort { candidates: 8, first_samples: 2, last_samples: 12 }
    } else {
        Effort { candidates: 12, first_samples: 3, last_samples: 20 }
    };
    let bench = Bench::new(&device, &kernels, &stream, effort.last_samples)?;
    let dir = match &args.dir {
        Some(dir) => dir.clone(),
        None => {
            attn_tune::user_dir().context("this platform has no configuration folder; name one with --dir")?
        }
    };
    let mut profile = begin(args, &bench, &dir.join(file_name(&device.facts().name)))?;

    let mut grid = if args.quick { Grid::quick() } else { Grid::full() };
    let keep = |named: &[u32], all: &mut Vec<u32>| {
        if !named.is_empty() {
            *all = named.to_vec();
        }
    };
    keep(&args.head_dim, &mut grid.head_dims);
    keep(&args.group_len, &mut grid.group_lens);
    keep(&args.gqa, &mut grid.gqa_groups);
    let steps = grid.steps();
    let bar = ProgressBar::new(steps.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left  {msg}") {
        bar.set_style(style);
    }
    let limit = args.minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes.max(0.0)));
    let mut pool = None;
    let mut counts = Counts::default();
    for case in &steps {
        bar.inc(1);
        if limit.is_some_and(|limit| start.elapsed() > limit) {
            counts.left += 1;
            continue;
        }
        bar.set_message(case.name());
        let run = RunKey::of_step(&case.spec, &case.kv_lens);
        let key = attn_tune::StaticKey::of(&case.layout_of(1)?, &case.spec, case.policy);
        if !args.force && profile.tables.get(&key).is_some_and(|table| table.contains_key(&run)) {
            counts.known += 1;
            continue;
        }
        let outcome = match tune(&bench, case, &run, &mut pool, &effort) {
            Ok(outcome) => outcome,
            Err(error) => {
                bar.println(format!("{}: {error:#}", case.name()));
                counts.failed += 1;
                continue;
            }
        };
        for (choice, fault) in &outcome.wrong {
            bar.println(format!("WRONG {}: {choice}: {fault}", case.name()));
        }
        counts.wrong += outcome.wrong.len();
        counts.measured += 1;
        counts.better += usize::from(outcome.timing.us < outcome.timing.model_us);
        let Outcome { choice, timing, .. } = outcome;
        profile.tables.entry(key).or_default().insert(run, Point { choice, timing });
        // After every point: a crash loses one.
        profile.save(&dir).with_context(|| format!("cannot write to {}", dir.display()))?;
    }
    bar.finish_and_clear();
    println!("{}: {counts}, in {:.0} s", device.facts().name, start.elapsed().as_secs_f64());
    if let Some(share) = report::ModelShare::of(&profile) {
        println!("{share}");
    }
    println!("{}", dir.join(file_name(&profile.device)).display());
    anyhow::ensure!(counts.wrong == 0, "{} candidates gave wrong results", counts.wrong);
    Ok(())
}

/// The profile to go on with: what stands there of this device and build, else an empty one.
fn begin(args: &Args, bench: &Bench<'_>, file: &Path) -> Result<Profile> {
    let machine = bench.tuner.machine();
    let facts = bench.device.facts();
    let mut profile = Profile {
        device: machine.device.clone(),
        arch: machine.arch.clone(),
        build: machine.build.clone(),
        driver: format!("CUDA {}.{}", facts.driver_version / 1000, facts.driver_version % 1000 / 10),
        date: attn_tune::today(),
        read_gb_per_s: bench.read_gb_per_s,
        ..Profile::default()
    };
    if file.exists() && !args.force {
        let old = read(file)?;
        if (&old.device, &old.arch, &old.build) == (&profile.device, &profile.arch, &profile.build) {
            profile.tables = old.tables;
        } else {
            eprintln!(
                "{} is of {} with kernels {}: it will be replaced",
                file.display(),
                old.device,
                old.build
            );
        }
    }
    Ok(profile)
}

fn tune<'a>(
    bench: &'a Bench<'a>,
    case: &'a Case,
    run: &RunKey,
    pool: &'a mut Option<Pool>,
    effort: &Effort,
) -> Result<Outcome> {
    let step = Step::new(bench, case, pool)?;
    // The model alone: what a profile says is what is looked for.
    let model = Tuner::from_sources(bench.tuner.machine().clone(), Level::Off, []);
    let shape = *step.chooser()?.shape();
    let key = *step.chooser()?.key();
    let first = model.chooser(key, shape).choose(run).choice;
    let machine = bench.tuner.machine();
    let mut candidates: Vec<(f64, Choice)> = Candidates::all(machine.num_sms, &key, &shape, run)
        .filter(|choice| *choice != first)
        .map(|choice| (model.model().predict(machine, &key, &shape, run, &choice), choice))
        .collect();
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut distinct = vec![first];
    for (_, choice) in candidates {
        let split = |choice: &Choice| choice.split(case.policy, run.num_kv_heads, shape.row_blocks);
        if !distinct.iter().any(|known| split(known) == split(&choice)) {
            distinct.push(choice);
        }
    }
    let is_short = case.kv_lens.first().is_some_and(|&kv_len| kv_len <= CHECKED_KV_LEN);
    let want = if is_short { Some(step.oracle()?) } else { None };
    let floor = quantiles(&mut step.time_reader(effort.first_samples)?).0;
    let mut trial = Trial { step, case, row_blocks: shape.row_blocks, want };
    let mut outcome = search(&mut trial, &distinct, effort)?;
    // Where there is no reader for the scale type, the bytes over the bandwidth.
    let streamed = trial.step.bytes / bench.read_gb_per_s / 1e3;
    let floor_us = if floor.is_finite() { floor } else { streamed };
    outcome.timing = Timing { floor_us, ..outcome.timing };
    Ok(outcome)
}

/// What became of the steps.
#[derive(Default)]
struct Counts {
    measured: usize,
    better: usize,
    known: usize,
    left: usize,
    failed: usize,
    wrong: usize,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { measured, better, known, left, failed, .. } = self;
        write!(
            f,
            "{measured} steps measured, {better} of them faster than the cost model's choice; {known} were known"
        )?;
        if *left > 0 {
            write!(f, ", {left} left for lack of time")?;
        }
        if *failed > 0 {
            write!(f, ", {failed} could not be measured")?;
        }
        Ok(())
    }
}
