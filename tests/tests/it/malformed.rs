//! Every named malformed call gives its own typed error, and nothing ran or changed.

use attn_tests::malformed;
use libtest_mimic::{Failed, Trial};

pub fn trials() -> Vec<Trial> {
    vec![Trial::test("malformed::named_calls", named_calls)]
}

fn named_calls() -> Result<(), Failed> {
    let failures: Vec<String> =
        malformed::table().iter().filter_map(|row| malformed::check(row).err()).collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n").into()) }
}
