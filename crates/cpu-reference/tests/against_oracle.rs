//! The CPU backend against the oracle on generated cases, within the a-priori bound.

use cpu_reference::case::{CaseConfig, Data};
use cpu_reference::{Isa, Workspace};
#[cfg(feature = "proptest")]
use proptest::test_runner::{Config, TestRunner};

/// Runs one case on every instruction set that this machine has.
fn run(config: &CaseConfig) -> Result<(), String> {
    let case = config.build().map_err(|e| format!("{e}; {config:?}"))?;
    let expected = case.expected().map_err(|e| e.to_string())?;
    for isa in Isa::available() {
        let mut workspace = Workspace::for_isa(isa).map_err(|e| e.to_string())?;
        let (out, lse) = case.run(&mut workspace).map_err(|e| e.to_string())?;
        let arithmetic = case.host_arithmetic();
        case.check_against(&expected, &out, Some(&lse), &arithmetic).map_err(|e| format!("{isa}: {e}"))?;
    }
    Ok(())
}

#[test]
fn every_kind_of_data_is_within_the_bound() {
    for data in Data::ALL {
        for seed in 0..10 {
            let config =
                CaseConfig { data, seed, kv_lens: vec![100, 0, 1, 17, 321], ..CaseConfig::default() };
            run(&config).unwrap();
        }
    }
}

#[cfg(feature = "proptest")]
#[test]
fn generated_cases_are_within_the_bound() {
    use cpu_reference::strategies::{Limits, cases};
    let cases_wanted = std::env::var("KV8_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    let mut runner =
        TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(cases_wanted) });
    runner
        .run(&cases(&Limits::default()), |config| {
            run(&config).map_err(proptest::test_runner::TestCaseError::fail)
        })
        .unwrap();
}
