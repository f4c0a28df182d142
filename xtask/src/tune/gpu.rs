//! The search on a device.

use super::Args;
use super::check::{self, Check, Judged};
use super::drive::{Device, Run, place_of};
use super::grid::Grid;
use super::journal::Header;
use super::pick::{Facts, pick};
use super::search::{Effort, Outcome, Subject, search};
use super::share::ModelShare;
use crate::bench::case::Case;
use crate::bench::gpu::{Bench, DevicePlan, Pool, Step, quantiles};
use crate::bench::inputs::{Inputs, Patterns};
use crate::bench::suites;
use anyhow::{Context, Result, anyhow};
use attn_backend::{Backend, CudaBackend};
use attn_kernels::device::{CudaDevice, Graph, Kernels, Stream};
use attn_tune::{Choice, Level, RunKey, Shape, StaticKey, Timing, Tuner};
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Threads that make inputs and ask the oracle while the device measures, where there are as many processors twice.
const MOST_MAKERS: usize = 8;
/// A stretch of samples ends with the first one beyond this: long launches are alike.
const STRETCH: Duration = Duration::from_millis(8);
/// Shapes of grid that the copy-only reader is tried with.
const READER_GRIDS: usize = 2;
/// Candidates of a step, if nobody asks for more or fewer, and of one that the benchmark shows.
const CANDIDATES: usize = 8;
const SHOWN_CANDIDATES: usize = 20;
/// Memory beside the rows that are read: padding, rounding up to whole patterns.
const SLACK_BYTES: f64 = 1.02;
const LEAST_ROOM: u64 = 1 << 30;

/// Inputs and what the output has to be.
type Ready = Result<(Inputs, Check)>;

/// One case, tried with one choice after the other.
struct Trial<'a> {
    bench: &'a Bench<'a>,
    step: Step<'a>,
    check: Check,
    row_blocks: u32,
    /// Of each choice that gave a right result: the graph before the plan whose memory it names.
    ready: HashMap<Choice, (Graph, DevicePlan)>,
    /// Choices whose first stretch is timed.
    warm: Vec<Choice>,
}

impl Subject for Trial<'_> {
    fn faults(&mut self, choices: &[Choice]) -> Result<Vec<Option<String>>> {
        let Case { spec, policy, .. } = self.step.inputs.case.clone();
        let mut ran = Vec::new();
        for choice in choices {
            let plan = self.step.plan(&choice.split(policy, spec.num_kv_heads, self.row_blocks))?;
            let out = self.step.run(&plan).map_err(|error| format!("{error:#}"));
            let arithmetic = CudaBackend::default().arithmetic(&spec, &plan.plan);
            ran.push((plan, out, arithmetic));
        }
        let check = &self.check;
        let (plans, outputs): (Vec<_>, Vec<_>) =
            ran.into_iter().map(|(plan, out, arithmetic)| (plan, (out, arithmetic))).unzip();
        let judged: Vec<Result<Judged, String>> = outputs
            .into_par_iter()
            .map(|(out, arithmetic)| out.and_then(|out| check.judge(out.to_f32(), &arithmetic)))
            .collect();
        let faults = check::faults(check, &judged);
        for ((choice, plan), fault) in choices.iter().zip(plans).zip(&faults) {
            if fault.is_none() {
                self.ready.insert(*choice, (self.step.capture(&plan)?, plan));
            }
        }
        Ok(faults)
    }

    fn time(&mut self, choice: &Choice, samples: usize) -> Result<Vec<f64>> {
        let (graph, _) = self.ready.get(choice).context("only right choices are timed")?;
        // The first replay uploads the graph.
        let is_warm = self.warm.contains(choice);
        if !is_warm {
            self.warm.push(*choice);
        }
        let launches = self.step.inputs.launches;
        self.bench.replay(graph, launches, usize::from(!is_warm), samples, STRETCH)
    }
}

struct Gpu<'a> {
    bench: &'a Bench<'a>,
    /// The model alone: what a profile says is what is looked for.
    model: Tuner,
    effort: Effort,
    /// Steps of the benchmark, and how many candidates they get: what is shown should be the best there is.
    shown: (HashSet<(StaticKey, RunKey)>, usize),
    pool: Option<Pool>,
    /// In turn, one case each.
    makers: Vec<Receiver<Ready>>,
    next: usize,
    /// Times of the reader, which knows no queries: several shapes share one.
    floors: HashMap<(StaticKey, RunKey), f64>,
}

impl Device for Gpu<'_> {
    fn measure(&mut self, case: &Case) -> Result<(Shape, Outcome)> {
        let maker = self.makers.get(self.next % self.makers.len().max(1)).context("a maker")?;
        self.next += 1;
        let (inputs, check) = maker.recv().map_err(|_| anyhow!("the inputs could not be made"))??;
        let Self { bench, model, effort, shown, pool, floors, .. } = self;
        let bytes = inputs.bytes;
        let step = Step::of(bench, inputs, pool)?;
        let (key, shape) = {
            let chooser = step.chooser()?;
            (*chooser.key(), *chooser.shape())
        };
        let run = RunKey::of_step(&case.spec, &case.kv_lens);
        let first = model.chooser(key, shape).choose(&run).choice;
        let facts = Facts {
            machine: bench.tuner.machine(),
            model: model.model(),
            key: &key,
            shape: &shape,
            spec: &case.spec,
            kv_lens: &case.kv_lens,
            policy: case.policy,
        };
        let effort = match shown.0.contains(&(key, run)) {
            true => Effort { candidates: shown.1.max(effort.candidates), ..*effort },
            false => *effort,
        };
        let candidates = pick(&facts, first, effort.candidates)?;
        let floor_us = match floors.entry((StaticKey { gqa_group: 1, ..key }, run)) {
            std::collections::hash_map::Entry::Occupied(known) => *known.get(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let us = quantiles(&mut step.time_reader_of(READER_GRIDS, 1, 3, STRETCH)?).0;
                // Where there is no reader for the scale type, the bytes over the bandwidth.
                *place.insert(if us.is_finite() { us } else { bytes / bench.read_gb_per_s / 1e3 })
            }
        };
        let (ready, warm) = (HashMap::new(), Vec::new());
        let mut trial = Trial { bench, step, check, row_blocks: shape.row_blocks, ready, warm };
        let mut outcome = search(&mut trial, &candidates, &effort)?;
        outcome.timing = Timing { floor_us, ..outcome.timing };
        Ok((shape, outcome))
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let device = CudaDevice::open(args.device).context("no CUDA device to tune")?;
    let kernels = Kernels::embedded(&device)?;
    let stream = Stream::new(&device)?;
    let candidates = args.candidates.unwrap_or(CANDIDATES).max(1);
    let last_samples = if args.quick { 12 } else { 9 };
    let effort = Effort { candidates, first_samples: 2, last_samples };
    let bench = Bench::new(&device, &kernels, &stream, effort.last_samples)?;
    let dir = match &args.dir {
        Some(dir) => dir.clone(),
        None => {
            attn_tune::user_dir().context("this platform has no configuration folder; name one with --dir")?
        }
    };
    let mut machine = bench.tuner.machine().clone();
    machine.read_gb_per_s = bench.read_gb_per_s;
    let version = device.facts().driver_version;
    let driver = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    let header = Header { machine, driver, date: attn_tune::today() };
    let run = Run::begin(&dir, &header, grid(args).steps(), args.force)?;
    let limit = args.minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes.max(0.0)));

    let room = room(&run.todo, u64::from(device.facts().l2_bytes), bench.read_gb_per_s)?;
    let pool = Some(Pool::with_room(&device, room)?);
    let model = Tuner::from_sources(bench.tuner.machine().clone(), Level::Off, []);
    let places = suites::steps().iter().map(place_of).collect::<Result<HashSet<_>>>()?;
    let shown = (places, args.candidates.unwrap_or(SHOWN_CANDIDATES));
    let (makers, floors) = (Vec::new(), HashMap::new());
    let gpu = Gpu { bench: &bench, model, effort, shown, pool, makers, next: 0, floors };
    let (l2_bytes, read) = (header.machine.l2_bytes, header.machine.read_gb_per_s);
    let todo = run.todo.clone();
    let (profile, file, counts) = thread::scope(|scope| {
        let num_makers = thread::available_parallelism().map_or(1, |processors| processors.get() / 2);
        let num_makers = num_makers.clamp(1, MOST_MAKERS);
        let makers = (0..num_makers)
            .map(|maker| {
                let (send, receive) = sync_channel(1);
                let (patterns, todo) = (bench.patterns.clone(), &todo);
                scope.spawn(move || {
                    for case in todo.iter().skip(maker).step_by(num_makers) {
                        // Nobody waits any more: the time is up.
                        if send.send(make(case, &patterns, l2_bytes, read)).is_err() {
                            return;
                        }
                    }
                });
                receive
            })
            .collect();
        let mut gpu = Gpu { makers, ..gpu };
        run.drive(&mut gpu, limit.map(|limit| start + limit))
    })?;
    println!("{}: {counts}, in {:.0} s", device.facts().name, start.elapsed().as_secs_f64());
    println!("{}", profile.coverage);
    if let Some(share) = ModelShare::of(&profile) {
        println!("{share}");
    }
    println!("{}", file.display());
    anyhow::ensure!(counts.wrong == 0, "{} candidates gave wrong results", counts.wrong);
    Ok(())
}

fn make(case: &Case, patterns: &Patterns, l2_bytes: u64, read_gb_per_s: f64) -> Ready {
    let inputs = Inputs::new(case, patterns, l2_bytes, read_gb_per_s)?;
    let check = Check::new(&inputs)?;
    Ok((inputs, check))
}

/// The grid that was asked for.
fn grid(args: &Args) -> Grid {
    let mut grid = if args.quick { Grid::quick() } else { Grid::full() };
    let keep = |named: &[u32], all: &mut Vec<u32>| {
        if !named.is_empty() {
            *all = named.to_vec();
        }
    };
    keep(&args.head_dim, &mut grid.head_dims);
    keep(&args.group_len, &mut grid.group_lens);
    keep(&args.gqa, &mut grid.gqa_groups);
    grid
}

/// Bytes of the largest pool, taken once.
fn room(cases: &[Case], l2_bytes: u64, read_gb_per_s: f64) -> Result<u64> {
    let mut most = LEAST_ROOM;
    for case in cases {
        let layout = case.layout_of(1)?;
        let num_pages: u64 = case.kv_lens.iter().map(|&kv_len| case.pages_of(kv_len)).sum();
        let bytes = num_pages * layout.bytes_per_page();
        let (_, rotations) = crate::bench::inputs::launches(bytes as f64, l2_bytes, read_gb_per_s);
        most = most.max((SLACK_BYTES * (bytes * rotations) as f64) as u64);
    }
    Ok(most + LEAST_ROOM / 4)
}
