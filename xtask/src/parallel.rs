//! Jobs of a build, several at a time, with a bar that counts them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Runs the jobs, `num_threads` at a time. The first failure ends the others as they come to their next job.
pub fn run_all<J: Sync>(
    jobs: &[J],
    num_threads: usize,
    name: impl Fn(&J) -> String + Sync,
    run: impl Fn(&J) -> Result<()> + Sync,
) -> Result<()> {
    let bar = ProgressBar::new(jobs.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..num_threads.clamp(1, jobs.len().max(1)) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    bar.set_message(name(job));
                    if let Err(error) = run(job)
                        && let Ok(mut failures) = failures.lock()
                    {
                        failures.push(format!("{error:#}"));
                        next.store(jobs.len(), Ordering::Relaxed);
                    }
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    let failures = failures.into_inner().unwrap_or_default();
    if let Some(first) = failures.first() {
        bail!("{first}");
    }
    Ok(())
}

/// The number of processors, unless another number of jobs at a time is asked for.
pub fn num_threads(asked: Option<usize>) -> usize {
    asked.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1)
}
