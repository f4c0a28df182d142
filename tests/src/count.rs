//! What was really executed: every case, skip and worst error is entered here and printed at the end of the run.

use proptest::test_runner::{FailurePersistence, FileFailurePersistence};
use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::fmt::Write as _;
use std::hash::BuildHasher as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many cases a property runs: `KV8_CASES`, else `PROPTEST_CASES`, else `default`.
pub fn num_cases(default: u32) -> u32 {
    let read = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    read("KV8_CASES").or_else(|| read("PROPTEST_CASES")).unwrap_or(default)
}

/// The seed of random cases: `KV8_SEED`, else another for each run.
pub fn seed() -> u64 {
    let asked = std::env::var("KV8_SEED").ok().and_then(|value| value.parse().ok());
    // The standard library's hash keys are random bits without a crate for them.
    asked.unwrap_or_else(|| RandomState::new().hash_one(0u8) >> 32)
}

/// Where failing seeds of a property are kept: beside the sources, if they are on this machine.
pub fn persistence(property: &str) -> Option<Box<dyn FailurePersistence>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("proptest-regressions");
    let file = folder.join(property).with_extension("txt").to_str()?.to_owned();
    // proptest wants a name for the whole run; there are few properties.
    let file: &'static str = Box::leak(file.into_boxed_str());
    folder.is_dir().then(|| Box::new(FileFailurePersistence::Direct(file)) as Box<dyn FailurePersistence>)
}

/// The record of one test run. Shared by all tests of the binary.
#[derive(Debug, Default)]
pub struct Ledger {
    subjects: Mutex<BTreeMap<String, Account>>,
    totals: Mutex<BTreeMap<String, u64>>,
}

/// What one backend (or one crate) was put through.
#[derive(Clone, Debug, Default)]
struct Account {
    executed: BTreeMap<String, u64>,
    skipped: BTreeMap<String, u64>,
    worst: Option<(f64, String)>,
    coverage: BTreeMap<&'static str, BTreeMap<String, u64>>,
    took: BTreeMap<String, Duration>,
}

impl Ledger {
    fn subjects(&self) -> MutexGuard<'_, BTreeMap<String, Account>> {
        // A failed test poisons the lock; its counts are still true.
        self.subjects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn account<R>(&self, subject: &str, change: impl FnOnce(&mut Account) -> R) -> R {
        let mut subjects = self.subjects();
        if let Some(account) = subjects.get_mut(subject) {
            return change(account);
        }
        change(subjects.entry(subject.to_owned()).or_default())
    }

    /// Enters `count` executed cases of a suite.
    pub fn ran(&self, subject: &str, suite: &str, count: u64) {
        self.account(subject, |account| match account.executed.get_mut(suite) {
            Some(total) => *total += count,
            None => {
                account.executed.insert(suite.to_owned(), count);
            }
        });
    }

    /// Adds to a count that is no case of a backend: elements compared, broken backends found.
    pub fn tally(&self, what: &str, count: u64) {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        *totals.entry(what.to_owned()).or_default() += count;
    }

    /// Enters a case that was not executed, with the reason.
    pub fn skipped(&self, subject: &str, reason: &str) {
        self.account(subject, |account| *account.skipped.entry(reason.to_owned()).or_default() += 1);
    }

    /// Enters the largest error of a case as a share of its bound; `at` says which case it was.
    pub fn error_ratio(&self, subject: &str, ratio: f64, at: impl FnOnce() -> String) {
        self.account(subject, |account| {
            if account.worst.as_ref().is_none_or(|(worst, _)| ratio > *worst) {
                account.worst = Some((ratio, at()));
            }
        });
    }

    /// Enters one value of one axis of the generator.
    pub fn covered(&self, subject: &str, axis: &'static str, value: impl ToString) {
        self.account(subject, |account| {
            *account.coverage.entry(axis).or_default().entry(value.to_string()).or_default() += 1;
        });
    }

    /// How often a value of an axis was entered.
    pub fn times_covered(&self, subject: &str, axis: &str, value: &str) -> u64 {
        let subjects = self.subjects();
        let values = subjects.get(subject).and_then(|account| account.coverage.get(axis));
        values.and_then(|values| values.get(value)).copied().unwrap_or(0)
    }

    /// Enters how long a suite took.
    pub fn took(&self, subject: &str, suite: &str, duration: Duration) {
        self.account(subject, |account| {
            account.took.insert(suite.to_owned(), duration);
        });
    }

    /// Cases executed by one subject, all suites together.
    pub fn executed(&self, subject: &str) -> u64 {
        self.subjects().get(subject).map_or(0, |account| account.executed.values().sum())
    }

    /// One block a subject: executed, skipped with reasons, worst error, coverage.
    pub fn report(&self) -> String {
        let mut text = String::new();
        let mut total = 0;
        for (subject, account) in self.subjects().iter() {
            total += account.executed.values().sum::<u64>();
            // Writing to a String cannot fail.
            let _ = account.write(subject, &mut text);
        }
        for (what, count) in self.totals.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = writeln!(text, "{what}: {count}");
        }
        let _ = writeln!(text, "property and conformance cases executed in all: {total}");
        text
    }
}

/// Axes with more values than this are summed up.
const MOST_VALUES: usize = 28;

impl Account {
    fn write(&self, subject: &str, text: &mut String) -> std::fmt::Result {
        let executed: u64 = self.executed.values().sum();
        let skipped: u64 = self.skipped.values().sum();
        write!(text, "{subject}: {executed} cases executed, {skipped} skipped")?;
        if let Some((ratio, at)) = &self.worst {
            write!(text, ", worst error {ratio:.3} of the bound ({at})")?;
        }
        writeln!(text)?;
        let suites: Vec<String> = self.executed.iter().map(|(suite, n)| format!("{suite} {n}")).collect();
        if !suites.is_empty() {
            writeln!(text, "    executed  {}", suites.join(", "))?;
        }
        let took: Vec<String> =
            self.took.iter().map(|(suite, time)| format!("{suite} {:.1} s", time.as_secs_f64())).collect();
        if !took.is_empty() {
            writeln!(text, "    took      {}", took.join(", "))?;
        }
        for (reason, count) in &self.skipped {
            writeln!(text, "    skipped   {count}: {reason}")?;
        }
        for (axis, values) in &self.coverage {
            let mut values: Vec<(&String, &u64)> = values.iter().collect();
            values.sort_by_key(|(value, _)| (value.len(), *value));
            if let Some((rarest, fewest)) = values.iter().min_by_key(|(_, n)| *n)
                && values.len() > MOST_VALUES
                && *axis != crate::conformance::judge::VARIANT
            {
                writeln!(text, "    {axis:<9} {} values, the rarest {rarest}:{fewest}", values.len())?;
                continue;
            }
            let values: Vec<String> = values.iter().map(|(value, n)| format!("{value}:{n}")).collect();
            writeln!(text, "    {axis:<9} {}", values.join(" "))?;
        }
        Ok(())
    }
}
