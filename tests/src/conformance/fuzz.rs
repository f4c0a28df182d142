//! Random cases through proptest, judged one by one.

use super::judge::{VARIANT, judge};
use super::runner::run_cases;
use crate::case::cases;
use crate::subject::Subject;

/// From this many cases on, chance leaves out no variant of a backend.
const ENOUGH_FOR_ALL: u32 = 5_000;

/// Judges `num_cases` random cases. Many of them must hit every variant that the subject names.
///
/// # Errors
/// The smallest failing case that was found; a variant that was not hit.
pub fn fuzz(subject: &Subject, num_cases: u32) -> Result<(), String> {
    let profile = subject.profile();
    let name = format!("{}: fuzz", subject.name);
    run_cases(&name, num_cases, || cases(&profile), |case| judge(subject, "fuzz", case).map(|_| ()))?;
    let hit = |variant: &&String| subject.ledger.times_covered(&subject.name, VARIANT, variant) > 0;
    let missed: Vec<&String> = subject.variants.iter().filter(|variant| !hit(variant)).collect();
    if missed.is_empty() || num_cases < ENOUGH_FOR_ALL {
        return Ok(());
    }
    Err(format!("{num_cases} cases hit none of these variants: {missed:?}"))
}
