//! What the children do: sessions from open to drop, on whatever driver there is.

use attn_backend::{
    BackendId, Descriptor, Error, Registry, SelectOptions, Selection, Session, SessionOptions, TrialMode,
    select,
};
use attn_plan::{DecodeSpec, PageTable};
use half::f16;
use kv_quant::{CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, PageCopy, ScaleType};
use std::time::{Duration, Instant};

const ROW: usize = 2 * 64;
const Q_ROW: usize = 8 * 64;

fn selection() -> Result<Selection, String> {
    let format = CacheFormat::new(2, 64, 8, 8, ScaleType::F16).unwrap();
    let sinks = Some(vec![0.5; 8]);
    let spec = DecodeSpec { sinks, want_lse: true, ..DecodeSpec::new(8, 2, 64) };
    let descriptor = Descriptor::new(CacheLayout::native(format, 16, 16).unwrap(), spec);
    let options = SelectOptions {
        read_environment: false,
        trial: TrialMode::Skip,
        ..SelectOptions::named(BackendId::CUDA)
    };
    select(&Registry::builtin(), &descriptor, &options).map_err(|error| error.to_string())
}

/// One step of an engine; answers the number of calls.
fn step(session: &mut Session<'_>, kv_len: u32) -> Result<u64, Error> {
    let (k, q) = (vec![f16::ONE; ROW], vec![f16::ONE; Q_ROW]);
    let (mut out, mut lse) = (vec![f16::ZERO; Q_ROW], vec![0f32; 8]);
    session.append(FloatSlice::F16(&k), FloatSlice::F16(&k), &[i64::from(kv_len) - 1])?;
    session.plan(&[kv_len], PageTable::padded(&[0, 1, 2, 3, 4, 5, 6, 7], 8))?;
    session.decode(FloatSlice::F16(&q), FloatSliceMut::F16(&mut out), Some(&mut lse))?;
    session.synchronize()?;
    Ok(4)
}

/// A session's whole life.
fn life() -> Result<(), String> {
    let text = |error: Error| error.to_string();
    let mut session = Session::open(&selection()?, SessionOptions::default()).map_err(text)?;
    session.write_bytes(0, 0, &[1; 64]).map_err(text)?;
    for kv_len in [1, 2, 100, 128] {
        step(&mut session, kv_len).map_err(text)?;
    }
    session.copy_pages(&[PageCopy { src: 0, dst: 9 }]).map_err(text)?;
    session.read_bytes(0, 0, &mut [0; 64]).map_err(text)
}

#[test]
#[ignore = "run by every_call_may_fail on a fake driver"]
fn once() {
    life().unwrap();
}

#[test]
#[ignore = "run by every_call_may_fail on a fake driver"]
fn again_after_a_failure() {
    // The first may fail or, where nothing depends on the call, succeed. The second must succeed: the failure is over.
    match life() {
        Ok(()) => println!("the first attempt succeeded"),
        Err(error) => {
            assert!(!error.is_empty());
            println!("the first attempt: {error}");
        }
    }
    life().unwrap();
}

#[test]
#[ignore = "run by every_call_may_fail on a fake driver"]
fn until_lost() {
    // A context that is lost stays lost; what comes later says so and does not wait.
    let first = life();
    let begin = Instant::now();
    let second = life().unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(5), "later calls fail at once");
    println!("first {first:?}, then {second}");
}

#[test]
#[ignore = "run by a_machine_that_does_not_fit_is_named on a fake driver"]
fn refused() {
    println!("refused: {}", life().unwrap_err());
}

#[test]
#[ignore = "run by nothing_is_left_of_100000_calls on a fake driver"]
fn many_calls() {
    let selection = selection().unwrap();
    let mut calls = 0;
    for _ in 0..10 {
        let mut session = Session::open(&selection, SessionOptions::default()).unwrap();
        for round in 0..2_500 {
            calls += step(&mut session, 1 + round % 128).unwrap();
        }
    }
    println!("{calls} calls");
}
