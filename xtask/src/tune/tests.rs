//! The run over a grid on a device that is a few lines long: seeded faults, crashes, resumption.

use super::check::{Check, Judged};
use super::drive::{Counts, Device, Run, coverage, place_of};
use super::grid::Grid;
use super::journal::{Header, path_of};
use super::search::{Effort, Outcome, Subject, search};
use crate::bench::case::Case;
use crate::bench::inputs::{Inputs, Patterns};
use anyhow::{Result, bail};
use attn_plan::{DecodeRequest, PageRows, PageTable, SplitPlan};
use attn_tune::{Choice, Machine, Profile, Shape, Timing, file_name};
use cpu_reference::case::Floats;
use cpu_reference::{Arithmetic, Workspace};
use kv_quant::LayoutKind;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A kernel of head_dim 128 and groups of 8.
pub const SHAPE: Shape = Shape {
    blocks_per_sm: 3,
    max_heads_per_block: 4,
    row_blocks: 1,
    row_bytes: 320,
    most_shares: 16,
    share_blocks_per_sm: 0,
    share_warps: 0,
};

/// A made-up GPU.
pub fn machine() -> Machine {
    Machine {
        device: "A GPU".to_owned(),
        arch: "sm_90".to_owned(),
        build: "0123456789ab".to_owned(),
        num_sms: 132,
        l2_bytes: 50 << 20,
        read_gb_per_s: 3000.0,
    }
}

fn choice(num_blocks: u32) -> Choice {
    Choice::dealt(num_blocks)
}

/// What a schedule's kernel does wrong.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// The last tokens of the longest request are not read.
    Short,
    /// One head of one request in the middle, which the oracle does not look at, is another's.
    Swapped,
    /// All values are a little large: within the relative error of 4e-3 that rounding and such once were allowed.
    Large,
    /// An element is not a number.
    NotANumber,
    /// Of the first request, the last query token's values are a little large.
    LastToken,
}

/// The CPU backend as an executor, with a fault under some choices.
struct Executor {
    inputs: Inputs,
    check: Check,
    faults: Vec<(u32, Fault)>,
    timed: Vec<u32>,
}

impl Executor {
    fn new(kv_lens: &[u32], faults: &[(u32, Fault)]) -> Self {
        Self::of_tokens(1, kv_lens, faults)
    }

    fn of_tokens(q_len: u32, kv_lens: &[u32], faults: &[(u32, Fault)]) -> Self {
        let mut case =
            Case { kv_lens: kv_lens.to_vec(), ..Case::new((8, 2, 64), 1, 64, LayoutKind::Native, 16) };
        case.spec.q_len = q_len;
        let inputs = Inputs::new(&case, &Patterns::default(), 0, 3000.0).unwrap();
        let check = Check::new(&inputs).unwrap();
        Self { inputs, check, faults: faults.to_vec(), timed: Vec::new() }
    }

    fn run(&self, choice: &Choice) -> (Vec<f32>, Arithmetic) {
        let Inputs { case, q, pattern, .. } = &self.inputs;
        let fault =
            self.faults.iter().find(|(blocks, _)| *blocks == choice.num_blocks).map(|(_, fault)| *fault);
        let mut kv_lens = case.kv_lens.clone();
        let (mut pages, mut starts) = (Vec::new(), Vec::new());
        for request in 0..kv_lens.len() {
            starts.push(pages.len() as u64);
            pages.extend(self.inputs.pattern_pages(request));
        }
        if fault == Some(Fault::Short) {
            *kv_lens.iter_mut().max().unwrap() -= 3;
        }
        let table = PageTable { pages: &pages, rows: PageRows::Starts(&starts) };
        let request = DecodeRequest { spec: &case.spec, kv_lens: &kv_lens, page_table: table };
        let plan = SplitPlan::new(&case.spec, &kv_lens, &choice.split(case.policy, 2, 1)).unwrap();
        let mut out = Floats::round(case.spec.out_type, &vec![0.0; case.spec.q_elements(kv_lens.len())]);
        let mut workspace = Workspace::default();
        let (layout, cache) = (&pattern.layout, pattern.cache.view());
        cpu_reference::decode(
            layout,
            cache,
            &request,
            &plan,
            q.as_slice(),
            out.as_mut_slice(),
            None,
            &mut workspace,
        )
        .unwrap();
        let mut out = out.to_f32();
        match fault {
            Some(Fault::Swapped) => {
                let middle = case.spec.q_elements(kv_lens.len() / 2);
                out.copy_within(middle + 64..middle + 128, middle);
            }
            Some(Fault::Large) => out.iter_mut().for_each(|x| *x *= 1.0038),
            Some(Fault::NotANumber) => out[7] = f32::NAN,
            Some(Fault::LastToken) => {
                let end = case.spec.q_elements(1);
                out[end - end / case.spec.q_len as usize..end].iter_mut().for_each(|x| *x *= 1.01);
            }
            Some(Fault::Short) | None => {}
        }
        (out, Arithmetic::host(&case.spec, &plan))
    }
}

impl Subject for Executor {
    fn faults(&mut self, choices: &[Choice]) -> Result<Vec<Option<String>>> {
        let judged: Vec<Result<Judged, String>> = choices
            .iter()
            .map(|choice| {
                let (out, arithmetic) = self.run(choice);
                self.check.judge(out, &arithmetic)
            })
            .collect();
        Ok(super::check::faults(&self.check, &judged))
    }

    fn time(&mut self, choice: &Choice, samples: usize) -> Result<Vec<f64>> {
        self.timed.push(choice.num_blocks);
        // The fewer blocks the faster: the wrong ones would win.
        Ok(vec![10.0 + f64::from(choice.num_blocks); samples])
    }
}

const EFFORT: Effort = Effort { candidates: 8, first_samples: 2, last_samples: 6 };

#[test]
fn wrong_candidates_are_reported_and_never_timed() {
    // By the oracle: it looks at the shortest and the longest request.
    for fault in [Fault::Short, Fault::Large] {
        let mut executor = Executor::new(&[300, 70, 129], &[(2, fault)]);
        let outcome = search(&mut executor, &[choice(8), choice(2), choice(4), choice(6)], &EFFORT).unwrap();
        assert_eq!(outcome.choice, choice(4));
        assert_eq!(outcome.wrong.len(), 1);
        assert_eq!(outcome.wrong[0].0, choice(2));
        assert!(outcome.wrong[0].1.contains("at most"), "{}", outcome.wrong[0].1);
        assert!(!executor.timed.contains(&2) && executor.timed.contains(&4));
    }
    // By another schedule's output: what the oracle does not look at.
    for (fault, what) in [(Fault::Swapped, "another schedule gives"), (Fault::NotANumber, "NaN")] {
        let mut executor = Executor::new(&[300, 200, 70, 129, 210], &[(2, fault)]);
        let outcome = search(&mut executor, &[choice(8), choice(2), choice(4)], &EFFORT).unwrap();
        assert_eq!(outcome.wrong.len(), 1);
        assert!(outcome.wrong[0].1.contains(what), "{}", outcome.wrong[0].1);
        assert!(!executor.timed.contains(&2));
    }
}

#[test]
fn a_wrong_choice_of_the_model_is_reported_too() {
    let mut executor = Executor::new(&[300, 70], &[(8, Fault::Short)]);
    let outcome = search(&mut executor, &[choice(8), choice(2), choice(4)], &EFFORT).unwrap();
    assert_eq!(outcome.wrong.iter().map(|(choice, _)| choice.num_blocks).collect::<Vec<_>>(), [8]);
    assert!(!executor.timed.contains(&8));
}

#[test]
fn right_candidates_pass_at_every_length() {
    for kv_lens in [vec![1], vec![64], vec![5000], vec![1, 2, 3000], vec![129; 7]] {
        for q_len in [1, 3] {
            let mut executor = Executor::of_tokens(q_len, &kv_lens, &[]);
            let choices: Vec<Choice> = [1, 3, 8, 64].map(choice).to_vec();
            let faults = executor.faults(&choices).unwrap();
            assert!(faults.iter().all(Option::is_none), "{q_len} x {kv_lens:?}: {faults:?}");
        }
    }
}

#[test]
fn every_query_token_of_a_step_is_judged() {
    let mut executor = Executor::of_tokens(3, &[300, 70, 129], &[(2, Fault::Large)]);
    assert_eq!(
        executor.faults(&[choice(8), choice(2)]).unwrap().iter().filter(|fault| fault.is_some()).count(),
        1
    );
    // The last token of the longest request alone.
    let mut executor = Executor::of_tokens(3, &[300, 70, 129], &[(2, Fault::LastToken)]);
    let faults = executor.faults(&[choice(8), choice(2)]).unwrap();
    assert!(
        faults[0].is_none() && faults[1].as_ref().is_some_and(|fault| fault.contains("request 0")),
        "{faults:?}"
    );
}

/// A device that takes what it is given, and stops the process in the middle of a step.
struct Crashing {
    measured: Vec<String>,
    crash_after: usize,
}

impl Device for Crashing {
    fn measure(&mut self, case: &Case) -> Result<(Shape, Outcome)> {
        assert!(self.measured.len() < self.crash_after, "a crash");
        self.measured.push(format!("{:?}", place_of(case)?));
        // A time of the step's own, so that a file shows which steps it has.
        let us = 1.0 + case.kv_lens.iter().sum::<u32>() as f64 * f64::from(case.spec.num_q_heads) / 1e3;
        let timing = Timing { us, p10_us: us, p90_us: us, model_us: 1.1 * us, floor_us: us / 2.0 };
        let times = vec![(choice(8), 1.1 * us), (choice(4), us)];
        Ok((SHAPE, Outcome { choice: choice(4), timing, times, wrong: vec![] }))
    }
}

fn header(build: &str) -> Header {
    let machine = Machine { build: build.to_owned(), ..machine() };
    Header { machine, driver: "13.0".to_owned(), date: "2026-11-22".to_owned() }
}

fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("kv8-tune-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    dir
}

fn begin(dir: &Path) -> Run {
    Run::begin(dir, &header("0123456789ab"), Grid::quick().steps(), false).unwrap()
}

fn whole(dir: &Path) -> (String, Counts, Vec<String>) {
    let mut device = Crashing { measured: vec![], crash_after: usize::MAX };
    let (_, file, counts) = begin(dir).drive(&mut device, None).unwrap();
    (std::fs::read_to_string(file).unwrap(), counts, device.measured)
}

#[test]
fn a_run_that_crashed_goes_on_where_it_was_and_ends_in_the_same_file() {
    let (undisturbed, disturbed) = (folder("whole"), folder("crashed"));
    let (want, counts, all) = whole(&undisturbed);
    assert_eq!((counts.measured, counts.known, counts.left, counts.failed), (all.len(), 0, 0, 0));

    let mut measured = Vec::new();
    let journal = path_of(&disturbed.join(file_name("A GPU")));
    for (crash_after, garbage) in [(7, ""), (0, "{\"key\":\"d128 k8"), (13, "{\"key\":\"\u{fffd}")] {
        let mut device = Crashing { measured: vec![], crash_after };
        let run = begin(&disturbed);
        assert_eq!(run.counts.known, measured.len());
        assert!(catch_unwind(AssertUnwindSafe(|| run.drive(&mut device, None))).is_err());
        measured.extend(device.measured);
        // What a kill leaves in the middle of a write; the last one is half a character besides.
        let mut file = std::fs::OpenOptions::new().append(true).open(&journal).unwrap();
        let bytes = garbage.as_bytes();
        file.write_all(&bytes[..bytes.len().saturating_sub(usize::from(crash_after == 13))]).unwrap();
    }
    let (got, counts, rest) = whole(&disturbed);
    assert_eq!((counts.known, counts.measured), (20, all.len() - 20));
    measured.extend(rest);
    // No step twice, none left out, in the same order.
    assert_eq!(measured, all);
    assert_eq!(got, want);

    // Once more: nothing is left to do, and nothing changes.
    let (again, counts, none) = whole(&disturbed);
    assert_eq!((again, counts.known, none.len()), (want, all.len(), 0));
    for dir in [undisturbed, disturbed] {
        std::fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn journals_of_other_kernels_and_damaged_lines_are_not_used() {
    let dir = folder("other");
    let (want, _, all) = whole(&dir);
    let journal = path_of(&dir.join(file_name("A GPU")));
    let grid = Grid::quick().steps();

    // The profile goes as well: else it would say what the journal has lost.
    let text = std::fs::read_to_string(&journal).unwrap();
    std::fs::remove_file(dir.join(file_name("A GPU"))).unwrap();
    let damaged: Vec<&str> =
        text.lines().enumerate().map(|(at, line)| if at == 3 { "garbage" } else { line }).collect();
    std::fs::write(&journal, damaged.join("\n") + "\n").unwrap();
    let run = begin(&dir);
    assert_eq!(
        run.todo.iter().map(|case| format!("{:?}", place_of(case).unwrap())).collect::<Vec<_>>(),
        [all[2].clone()]
    );
    drop(run);
    assert_eq!(whole(&dir).0, want);

    let run = Run::begin(&dir, &header("ba9876543210"), grid.clone(), false).unwrap();
    assert_eq!((run.counts.known, run.todo.len()), (0, grid.len()));
    drop(run);
    std::fs::write(&journal, [0xff, 0xfe, b'\n', 0x00]).unwrap();
    std::fs::write(dir.join(file_name("A GPU")), "garbage").unwrap();
    assert_eq!(whole(&dir).0, want);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_run_whose_time_is_up_says_what_it_left() {
    let dir = folder("late");
    let mut device = Crashing { measured: vec![], crash_after: usize::MAX };
    let (profile, _, counts) = begin(&dir).drive(&mut device, Some(Instant::now())).unwrap();
    let steps = Grid::quick().steps().len();
    assert_eq!((counts.measured, counts.left), (0, steps));
    assert_eq!(
        profile.coverage,
        format!(
            "0 of the {steps} steps of the grid were measured, 0 more are within 1.5 octaves of one, {steps} are left to the cost model"
        )
    );
    // A few of them reach most of the others.
    let mut some = Profile::default();
    for case in Grid::quick().steps().iter().take(16) {
        let (key, run) = place_of(case).unwrap();
        let timing = Timing { us: 1.0, p10_us: 1.0, p90_us: 1.0, model_us: 1.0, floor_us: 1.0 };
        some.tables.entry(key).or_default().insert(run, attn_tune::Point { choice: choice(4), timing });
    }
    let text = coverage(&Grid::quick().steps(), &some).unwrap();
    assert_eq!(
        text,
        "16 of the 42 steps of the grid were measured, 23 more are within 1.5 octaves of one, 3 are left to the cost model"
    );
    std::fs::remove_dir_all(dir).unwrap();
}

/// Fails at everything.
struct Lost;

impl Device for Lost {
    fn measure(&mut self, _: &Case) -> Result<(Shape, Outcome)> {
        bail!("the device is lost")
    }
}

#[test]
fn a_lost_device_ends_the_run() {
    let dir = folder("lost");
    let error = begin(&dir).drive(&mut Lost, None).unwrap_err();
    assert!(error.to_string().contains("20 steps failed one after the other"), "{error}");
    std::fs::remove_dir_all(dir).unwrap();
}
