//! Every malformed call gives its own typed error, and nothing ran or changed.

use attn_tests::count::{Ledger, num_cases};
use attn_tests::malformed;
use libtest_mimic::{Failed, Trial};
use std::collections::BTreeSet;
use std::sync::Arc;

pub fn trials(ledger: &Arc<Ledger>) -> Vec<Trial> {
    let [named, fuzzed] = [(); 2].map(|()| Arc::clone(ledger));
    vec![
        Trial::test("malformed::named_calls", move || named_calls(&named)),
        Trial::test("malformed::fuzzed_calls", move || {
            malformed::fuzz(&fuzzed, num_cases(2000).saturating_mul(10)).map_err(Failed::from)
        }),
    ]
}

fn named_calls(ledger: &Ledger) -> Result<(), Failed> {
    let table = malformed::table();
    let names: BTreeSet<&str> = table.iter().map(|row| row.name).collect();
    assert_eq!(names.len(), table.len(), "every row has a name of its own");
    assert!(table.len() >= 200, "{} rows", table.len());
    let failures: Vec<String> = table.iter().filter_map(|row| malformed::check(row).err()).collect();
    ledger.tally("named malformed calls refused with their own error", (table.len() - failures.len()) as u64);
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n").into()) }
}
