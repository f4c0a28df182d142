//! The run over the grid: what is known is left out, each step is kept as it is found, the time limit is held.

use super::journal::{Entry, Header, Journal, path_of};
use super::search::Outcome;
use crate::bench::case::Case;
use anyhow::{Context, Result, ensure};
use attn_tune::{MAX_DISTANCE, Profile, RunKey, Shape, StaticKey, file_name};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Steps between two writes of the profile; the journal has every one.
const STEPS_PER_WRITE: usize = 64;
/// As many failures one after the other are the device's, not the steps'.
const MOST_FAILURES: usize = 20;

/// What measures steps, in the order that it was given them.
pub trait Device {
    /// The kernel's shape for the next step and what the search found.
    fn measure(&mut self, case: &Case) -> Result<(Shape, Outcome)>;
}

/// A step's place in a profile.
pub fn place_of(case: &Case) -> Result<(StaticKey, RunKey)> {
    let key = StaticKey::of(&case.layout_of(1)?, &case.spec, case.policy);
    Ok((key, RunKey::of_step(&case.spec, &case.kv_lens)))
}

/// Where a run stands.
pub struct Run {
    journal: Journal,
    profile: Profile,
    dir: PathBuf,
    grid: Vec<Case>,
    /// Of the grid, what is not known yet, in the order of measuring.
    pub todo: Vec<Case>,
    pub counts: Counts,
}

/// What became of the steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub measured: usize,
    pub better: usize,
    pub known: usize,
    pub left: usize,
    pub failed: usize,
    pub wrong: usize,
}

impl Run {
    /// Goes on with what stands in `dir` of this GPU and these kernels; `anew` forgets it.
    ///
    /// # Errors
    /// Those of the file system, a grid that no cache can hold.
    pub fn begin(dir: &Path, header: &Header, grid: Vec<Case>, anew: bool) -> Result<Self> {
        let file = dir.join(file_name(&header.machine.device));
        let (journal, contents) = Journal::open(&path_of(&file), header, anew)?;
        let mut profile = header.profile();
        if !anew && let Ok(text) = std::fs::read_to_string(&file) {
            // A profile without a journal was learned at warm-up, or the journal was deleted.
            match Profile::parse(&text) {
                Ok((old, _)) if old.build == profile.build && old.device == profile.device => {
                    profile.tables = old.tables;
                }
                Ok((old, _)) => eprintln!(
                    "{} is of {} with kernels {}: it will be replaced",
                    file.display(),
                    old.device,
                    old.build
                ),
                Err(cause) => eprintln!("{} {cause}: it will be replaced", file.display()),
            }
        }
        if contents.num_damaged > 0 {
            eprintln!(
                "{} lines of the journal were cut off or damaged; their steps come again",
                contents.num_damaged
            );
        }
        for entry in &contents.entries {
            entry.enter(&mut profile)?;
        }
        let mut todo = Vec::new();
        for case in &grid {
            let (key, run) = place_of(case)?;
            if !profile.tables.get(&key).is_some_and(|table| table.contains_key(&run)) {
                todo.push(case.clone());
            }
        }
        let counts = Counts { known: grid.len() - todo.len(), ..Counts::default() };
        Ok(Self { journal, profile, dir: dir.to_owned(), grid, todo, counts })
    }

    /// Measures until the grid or the time is at its end, and returns the profile and where it stands.
    ///
    /// # Errors
    /// Those of the file system; a device that fails at everything.
    pub fn drive(
        mut self,
        device: &mut dyn Device,
        ends: Option<Instant>,
    ) -> Result<(Profile, PathBuf, Counts)> {
        let todo = std::mem::take(&mut self.todo);
        let bar = bar(todo.len(), ends);
        let mut failures = 0;
        for (index, case) in todo.iter().enumerate() {
            if ends.is_some_and(|ends| Instant::now() >= ends) {
                self.counts.left = todo.len() - index;
                break;
            }
            bar.set_message(case.name());
            match device.measure(case) {
                Ok((shape, outcome)) => {
                    failures = 0;
                    for (choice, fault) in &outcome.wrong {
                        say(&bar, &format!("WRONG {}: {choice}: {fault}", case.name()));
                    }
                    self.keep(case, shape, outcome)?;
                }
                Err(error) => {
                    say(&bar, &format!("{}: {error:#}", case.name()));
                    self.counts.failed += 1;
                    failures += 1;
                    ensure!(failures < MOST_FAILURES, "{failures} steps failed one after the other");
                }
            }
            bar.inc(1);
            if (index + 1) % STEPS_PER_WRITE == 0 {
                self.write()?;
            }
        }
        bar.finish_and_clear();
        let file = self.write()?;
        Ok((self.profile, file, self.counts))
    }

    fn keep(&mut self, case: &Case, shape: Shape, outcome: Outcome) -> Result<()> {
        let (key, run) = place_of(case)?;
        let Outcome { choice, timing, times, wrong } = outcome;
        self.counts.measured += 1;
        self.counts.better += usize::from(timing.us < timing.model_us);
        self.counts.wrong += wrong.len();
        let entry = Entry { key: key.to_string(), run, shape, choice, timing, times, wrong };
        self.journal.add(&entry).context("cannot write the journal")?;
        entry.enter(&mut self.profile)
    }

    fn write(&mut self) -> Result<PathBuf> {
        self.profile.coverage = coverage(&self.grid, &self.profile)?;
        self.profile.save(&self.dir).with_context(|| format!("cannot write to {}", self.dir.display()))
    }
}

/// What of the grid was measured, and what is left to the look-up's neighbours and to the cost model.
pub fn coverage(grid: &[Case], profile: &Profile) -> Result<String> {
    let (mut measured, mut near) = (0, 0);
    for case in grid {
        let (key, run) = place_of(case)?;
        let distances = profile.tables.get(&key).into_iter().flatten().map(|(known, _)| known.distance(&run));
        let nearest = distances.fold(f32::INFINITY, f32::min);
        measured += usize::from(nearest == 0.0);
        near += usize::from(nearest > 0.0 && nearest <= MAX_DISTANCE);
    }
    let left = grid.len() - measured - near;
    Ok(format!(
        "{measured} of the {} steps of the grid were measured, {near} more are within {MAX_DISTANCE} octaves of one, {left} \
         are left to the cost model",
        grid.len()
    ))
}

/// Above the bar, or where no terminal shows one.
fn say(bar: &ProgressBar, text: &str) {
    if bar.is_hidden() { eprintln!("{text}") } else { bar.println(text) }
}

fn bar(steps: usize, ends: Option<Instant>) -> ProgressBar {
    // Drawn on stderr, and only if that is a terminal.
    let bar = ProgressBar::new(steps as u64);
    let seconds = ends.map(|ends| ends.saturating_duration_since(Instant::now()).as_secs());
    let template = match seconds {
        None => "{bar:30} {pos}/{len} steps, {eta} left  {msg}".to_owned(),
        Some(seconds) => {
            format!("{{bar:30}} {{pos}}/{{len}} steps, {{elapsed}} of {seconds} s, {{eta}} for all  {{msg}}")
        }
    };
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { measured, better, known, left, failed, wrong } = self;
        write!(
            f,
            "{measured} steps measured, {better} of them faster than the cost model's choice; {known} were known"
        )?;
        for (count, what) in
            [(left, "left for lack of time"), (failed, "could not be measured"), (wrong, "candidates WRONG")]
        {
            if *count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}
