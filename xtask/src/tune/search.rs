//! The search for one step: the model's favourites first, then successive halving on measured times.

use anyhow::{Result, ensure};
use attn_tune::{Choice, Timing};

/// What a step is tried on.
pub trait Subject {
    /// What is wrong with the result of each choice, if anything. Nothing is timed before.
    fn faults(&mut self, choices: &[Choice]) -> Result<Vec<Option<String>>>;

    /// Microseconds of this many replays.
    fn time(&mut self, choice: &Choice, samples: usize) -> Result<Vec<f64>>;
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Candidates of the first round.
    pub candidates: usize,
    /// Samples of each in the first round; twice as many in each further one.
    pub first_samples: usize,
    /// Samples of the last two.
    pub last_samples: usize,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The fastest, and what the model would have taken if nothing was faster beyond the noise.
    pub choice: Choice,
    /// Its times, and the model's; the floor is the caller's to fill in.
    pub timing: Timing,
    /// Median microseconds of each candidate that was timed, the model's choice first.
    pub times: Vec<(Choice, f64)>,
    /// Candidates whose results were wrong, and how.
    pub wrong: Vec<(Choice, String)>,
}

/// Turns of the last two.
const ROUNDS: usize = 3;

struct Entry {
    choice: Choice,
    samples: Vec<f64>,
}

impl Entry {
    fn median(&self) -> f64 {
        quantile(&self.samples, 0.5)
    }
}

fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((share * sorted.len().saturating_sub(1) as f64).round() as usize).copied().unwrap_or(f64::NAN)
}

/// Searches among `candidates`, which stand in the order of the model's liking; the first is the model's own choice.
///
/// # Errors
/// The subject's; none of the candidates right.
pub fn search(subject: &mut dyn Subject, candidates: &[Choice], effort: &Effort) -> Result<Outcome> {
    let candidates = candidates.get(..effort.candidates.max(1)).unwrap_or(candidates);
    let mut wrong = Vec::new();
    let mut entries: Vec<Entry> = Vec::new();
    for (&choice, fault) in candidates.iter().zip(subject.faults(candidates)?) {
        match fault {
            Some(fault) => wrong.push((choice, fault)),
            None => entries.push(Entry { choice, samples: Vec::new() }),
        }
    }
    ensure!(!entries.is_empty(), "no candidate gives a right result: {wrong:?}");
    // The model's choice stays to the end: the others are compared with it.
    let model = entries.remove(0);
    let mut model = Entry { samples: subject.time(&model.choice, effort.first_samples)?, ..model };
    let mut samples = effort.first_samples;
    let mut times = Vec::new();
    while entries.len() > 1 {
        for entry in &mut entries {
            entry.samples.extend(subject.time(&entry.choice, samples)?);
        }
        entries.sort_by(|a, b| a.median().total_cmp(&b.median()));
        let lost = entries.split_off(entries.len().div_ceil(2));
        times.extend(lost.iter().map(|entry| (entry.choice, entry.median())));
        samples *= 2;
    }
    // The last two in turn, so that a drift of clocks meets both.
    let mut best = entries.pop();
    for _ in 0..ROUNDS {
        let samples = effort.last_samples.div_ceil(ROUNDS);
        model.samples.extend(subject.time(&model.choice, samples)?);
        if let Some(best) = &mut best {
            best.samples.extend(subject.time(&best.choice, samples)?);
        }
    }
    let finalists = [Some(&model), best.as_ref()];
    times.splice(0..0, finalists.into_iter().flatten().map(|entry| (entry.choice, entry.median())));
    let model_us = model.median();
    // Within the noise the model's choice is kept, so that profiles do not change from run to run.
    let noise = quantile(&model.samples, 0.75) - quantile(&model.samples, 0.25);
    let faster = best.filter(|best| best.median() + noise.max(0.005 * model_us) < model_us);
    let Entry { choice, samples } = faster.unwrap_or(model);
    let timing = Timing {
        us: quantile(&samples, 0.5),
        p10_us: quantile(&samples, 0.1),
        p90_us: quantile(&samples, 0.9),
        model_us,
        floor_us: f64::NAN,
    };
    Ok(Outcome { choice, timing, times, wrong })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device whose best number of blocks is known, with noise of one percent.
    struct Fake {
        best: u32,
        wrong: u32,
        timed: Vec<u32>,
        turn: u32,
    }

    impl Subject for Fake {
        fn faults(&mut self, choices: &[Choice]) -> Result<Vec<Option<String>>> {
            let fault =
                |choice: &Choice| (choice.num_blocks == self.wrong).then(|| "a token is missing".to_owned());
            Ok(choices.iter().map(fault).collect())
        }

        fn time(&mut self, choice: &Choice, samples: usize) -> Result<Vec<f64>> {
            self.timed.push(choice.num_blocks);
            let off = f64::from(choice.num_blocks.abs_diff(self.best));
            let noise = |turn: u32| f64::from(turn.wrapping_mul(2_654_435_761) >> 24) / 256.0;
            Ok((0..samples)
                .map(|_| {
                    self.turn += 1;
                    100.0 + off + noise(self.turn)
                })
                .collect())
        }
    }

    fn choices() -> Vec<Choice> {
        (1..17).map(Choice::dealt).collect()
    }

    const EFFORT: Effort = Effort { candidates: 16, first_samples: 3, last_samples: 20 };

    fn fake(best: u32, wrong: u32) -> Fake {
        Fake { best, wrong, timed: Vec::new(), turn: 0 }
    }

    #[test]
    fn the_fastest_is_found_and_the_wrong_one_never_timed() {
        let mut subject = fake(12, 11);
        let outcome = search(&mut subject, &choices(), &EFFORT).unwrap();
        assert_eq!(outcome.choice.num_blocks, 12);
        assert!(outcome.timing.us < outcome.timing.model_us);
        assert_eq!(outcome.wrong.len(), 1);
        assert!(!subject.timed.contains(&11) && subject.timed.contains(&12));
        // Each one that was timed is told of once, the model's choice first.
        assert_eq!(outcome.times[0].0.num_blocks, 1);
        let mut told: Vec<u32> = outcome.times.iter().map(|(choice, _)| choice.num_blocks).collect();
        told.sort_unstable();
        assert_eq!(told, (1..17).filter(|blocks| *blocks != 11).collect::<Vec<_>>());
    }

    #[test]
    fn the_model_is_kept_within_the_noise() {
        let outcome = search(&mut fake(1, 0), &choices(), &EFFORT).unwrap();
        assert_eq!(outcome.choice.num_blocks, 1);
        assert_eq!(outcome.timing.us, outcome.timing.model_us);
    }

    #[test]
    fn one_candidate_is_no_search_and_none_is_an_error() {
        let outcome = search(&mut fake(1, 0), &choices()[..1], &EFFORT).unwrap();
        assert_eq!(outcome.choice.num_blocks, 1);
        assert!(search(&mut fake(1, 1), &choices()[..1], &EFFORT).is_err());
    }
}
