//! Random cases over all processors: each thread draws from a generator of its own, and all end at the first failure.

use crate::count;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Steps of shrinking: each runs the backend again.
const MAX_SHRINK_ITERS: u32 = 200;
/// A line of progress is written after this many cases.
const PROGRESS: u64 = 10_000;

/// Judges `num_cases` cases of the strategy that `strategy` makes. A failing case is written at once, before it shrinks;
/// with the seed that is written at the start, `KV8_SEED` repeats a run on as many threads.
///
/// # Errors
/// The smallest failing case that was found.
pub fn run_cases<S: Strategy>(
    name: &str,
    num_cases: u32,
    strategy: impl Fn() -> S + Sync,
    judge: impl Fn(&S::Value) -> Result<(), String> + Sync,
) -> Result<(), String> {
    let seed = count::seed();
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from).min(num_cases as usize);
    say(&format!("{name}: {num_cases} cases, seed {seed}, {num_threads} threads"));
    let (begin, done, stop) = (Instant::now(), AtomicU64::new(0), AtomicBool::new(false));
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for thread in 0..num_threads {
            let (strategy, judge) = (&strategy, &judge);
            let (done, stop, failure) = (&done, &stop, &failure);
            scope.spawn(move || {
                let share =
                    num_cases as usize / num_threads + usize::from(thread < num_cases as usize % num_threads);
                let config = Config {
                    cases: share as u32,
                    max_shrink_iters: MAX_SHRINK_ITERS,
                    failure_persistence: None,
                    ..Config::default()
                };
                let mut runner = TestRunner::new_with_rng(config, rng(seed, thread as u64));
                let mine = AtomicBool::new(false);
                let outcome = runner.run(&strategy(), |case| {
                    // A case that failed here is shrunk to its end; the other threads have nothing more to find.
                    if stop.load(Ordering::Relaxed) && !mine.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    match judge(&case) {
                        Ok(()) => {
                            let count = done.fetch_add(1, Ordering::Relaxed) + 1;
                            if count.is_multiple_of(PROGRESS) {
                                say(&format!("{name}: {count} cases, {:.0?}", begin.elapsed()));
                            }
                            Ok(())
                        }
                        Err(error) => {
                            if !mine.swap(true, Ordering::Relaxed) {
                                stop.store(true, Ordering::Relaxed);
                                say(&format!(
                                    "{name}: FAILED (seed {seed}, thread {thread}): {error}\n  in {case:?}"
                                ));
                            }
                            Err(TestCaseError::fail(error))
                        }
                    }
                });
                let text = match outcome {
                    Ok(()) => return,
                    Err(TestError::Fail(reason, case)) => format!("{reason}\n  shrunk to {case:?}"),
                    Err(TestError::Abort(reason)) => format!("aborted: {reason}"),
                };
                stop.store(true, Ordering::Relaxed);
                if let Ok(mut failure) = failure.lock() {
                    failure.get_or_insert(text);
                }
            });
        }
    });
    let failure = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    say(&format!("{name}: {} cases, {:.1?}", done.into_inner(), begin.elapsed()));
    failure.map_or(Ok(()), Err)
}

fn rng(seed: u64, thread: u64) -> TestRng {
    let mut bytes = [0u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&thread.to_le_bytes());
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

/// Straight out: whatever becomes of the process, the line stands.
fn say(line: &str) {
    let mut out = std::io::stderr().lock();
    // Nothing can be done about a closed stream.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
