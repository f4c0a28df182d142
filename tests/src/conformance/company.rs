//! A request's bits do not depend on neighbours, position, slots, time or threads.

use crate::case::Case;
use crate::compare::Run;
use crate::problem::Problem;
use crate::subject::{Opened, Route, Subject};

/// Batches in which one request is looked at.
const BATCHES: [usize; 6] = [2, 3, 7, 8, 17, 64];

fn ragged(tile: u32) -> Case {
    let lens = [3 * tile + 5, 1, tile, 0, 2 * tile + 1, 17, tile - 1, 200];
    let kv_lens = (0..64).map(|i| lens[i % lens.len()] + (i / lens.len()) as u32).collect();
    Case { kv_lens, num_kv_heads: 2, gqa_group: 3, head_dim: 64, ..Case::plain(tile, 0) }
}

fn open(subject: &Subject, problem: &Problem, route: Route) -> Result<Opened, String> {
    let mut opened = subject.open(&problem.layout, &problem.spec, problem.case.config, route)?;
    opened.write_image(&problem.image)?;
    Ok(opened)
}

/// Under the batch-invariant policy, and in shares: a request alone, and in batches of 2, 3, 7, 8, 17 and 64 at the front, in the
/// middle and at the end, with its tokens in other slots: the same bits of out and lse.
///
/// # Errors
/// The first request whose bits are others.
pub fn invariance(subject: &Subject) -> Result<(), String> {
    if !subject.capability().batch_invariant {
        subject.ledger.skipped(&subject.name, "not offered: batch invariance");
        return Ok(());
    }
    let tile = subject.tile_len();
    let schedules = [
        ragged(tile).batch_invariant(1),
        ragged(tile).batch_invariant(2),
        ragged(tile).shared_out(3),
        ragged(tile).shared_out(16),
    ];
    for (seed, case) in schedules.into_iter().enumerate() {
        let case = Case { seed: seed as u64, q_len: 1 + seed as u32, ..case };
        let problem = Problem::new(&case);
        let moved = problem.relocate(99);
        let mut here = open(subject, &problem, Route::Session)?;
        let mut there = open(subject, &moved, Route::Executor)?;
        for target in [0usize, 4, 7, 31] {
            let alone = here.decode(&problem.step.select(&problem.spec, &[target]))?;
            for batch in BATCHES {
                for position in [0, batch / 2, batch - 1] {
                    let requests: Vec<usize> = (0..batch)
                        .map(|i| if i == position { target } else { (i * 5 + batch + position) % 64 })
                        .collect();
                    for (opened, problem) in [(&mut here, &problem), (&mut there, &moved)] {
                        let run = opened.decode(&problem.step.select(&problem.spec, &requests))?;
                        same(&alone, &run.request(&problem.spec, position)).map_err(|e| {
                            format!("request {target} at {position} of {batch}: {e}\n  in {case:?}")
                        })?;
                        subject.ledger.ran(&subject.name, "invariance", 1);
                    }
                }
            }
        }
    }
    Ok(())
}

/// The same bits from a cache opened anew, from other slots, and from four threads at once.
///
/// # Errors
/// The first run whose bits are others.
pub fn determinism(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let schedules = [ragged(tile), ragged(tile).batch_invariant(2), ragged(tile).shared_out(5)];
    for (seed, case) in schedules.into_iter().enumerate() {
        let case = Case { seed: seed as u64, ..case };
        let problem = Problem::new(&case);
        let moved = problem.relocate(7);
        let first = open(subject, &problem, Route::Session)?.decode(&problem.step)?;
        let elsewhere = open(subject, &moved, Route::Executor)?.decode(&moved.step)?;
        same(&first, &elsewhere).map_err(|error| format!("in other slots: {error}"))?;
        let runs: Vec<Result<(), String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| -> Result<(), String> {
                        let mut opened = open(subject, &problem, Route::Session)?;
                        for _ in 0..5 {
                            same(&first, &opened.decode(&problem.step)?)?;
                            subject.ledger.ran(&subject.name, "determinism", 1);
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err("panicked".to_owned())))
                .collect()
        });
        runs.into_iter()
            .collect::<Result<(), String>>()
            .map_err(|error| format!("four threads at once: {error}"))?;
    }
    Ok(())
}

fn same(first: &Run, second: &Run) -> Result<(), String> {
    first.difference(second).map_or(Ok(()), |difference| Err(format!("other bits: {difference}")))
}
