//! The CPU backend against the oracle on generated cases, within the a-priori bound.

use cpu_reference::case::{CaseConfig, Data};
use cpu_reference::{Arithmetic, DotProduct, Isa, Workspace};
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
        let mut workspace = workspace.with_dot(DotProduct::Int8);
        let (out, lse) = case.run(&mut workspace).map_err(|e| e.to_string())?;
        let arithmetic = Arithmetic::host_int8(&case.spec, &case.plan);
        case.check_against(&expected, &out, Some(&lse), &arithmetic)
            .map_err(|e| format!("{isa}, integer q.k: {e}"))?;
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

/// Every count of query rows, and of codes that share a scale. The integers are what runs: outputs differ from f32's, and
/// not between instruction sets by more than f32 sums do.
#[test]
fn integer_dot_products_are_within_their_bound() {
    for (head_dim, group_len) in [(64, 32), (64, 64), (128, 32), (128, 128), (192, 64), (256, 256)] {
        for gqa_group in 1..=9 {
            let groups = (group_len, group_len);
            let config = CaseConfig {
                head_dim,
                gqa_group,
                k_group_len: groups.0,
                v_group_len: groups.1,
                kv_lens: vec![70, 131],
                ..CaseConfig::default()
            };
            run(&config).unwrap();
            let case = config.build().unwrap();
            let out = |isa, dot| {
                let mut workspace = Workspace::for_isa(isa).unwrap().with_dot(dot);
                case.run(&mut workspace).unwrap().0.to_f32()
            };
            let (float, integer) =
                (out(Isa::Portable, DotProduct::F32), out(Isa::Portable, DotProduct::Int8));
            assert!(float != integer, "{config:?}");
            for isa in Isa::available() {
                let pairs = out(isa, DotProduct::Int8).into_iter().zip(&integer);
                assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-4), "{isa}: {config:?}");
            }
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
