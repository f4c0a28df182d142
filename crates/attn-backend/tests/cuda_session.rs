//! A session on a real GPU: device arrays on the caller's stream, the caller's memory, bad data, a child's trial.
//! Without a GPU it says so; `KV8_REQUIRE_GPU=1` makes that a failure.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a failure is the point")]

use attn_backend::{
    BackendId, Descriptor, DeviceSlice, Error, Expect, Isolation, Memory, MemoryKind, Registry,
    SelectOptions, Session, SessionOptions, Stream, TrialMode, select,
};
use attn_kernels::device::{CudaDevice, Stream as CudaStream};
use attn_plan::{DecodeSpec, PageTable};
use attn_tune::{PROFILE_DIR_VARIABLE, Profile, TUNE_VARIABLE, file_name};
use half::f16;
use kv_quant::{CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, ScaleType, Side};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

const KV_LEN: usize = 300;
const HEADS: usize = 2;
const Q_HEADS: usize = 14;
const DIM: usize = 128;

fn device() -> Option<CudaDevice> {
    match CudaDevice::open(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: {error}");
            let required =
                std::env::var("KV8_REQUIRE_GPU").is_ok_and(|value| value != "0" && !value.is_empty());
            assert!(!required, "a GPU is required: {error}");
            None
        }
    }
}

fn numbers(count: usize, seed: usize) -> Vec<f16> {
    (0..count).map(|i| f16::from_f32(((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0)).collect()
}

fn descriptor() -> Descriptor {
    let format = CacheFormat::new(HEADS as u32, DIM as u32, 8, 8, ScaleType::F16).unwrap();
    let spec = DecodeSpec { want_lse: true, ..DecodeSpec::new(Q_HEADS as u32, HEADS as u32, DIM as u32) };
    Descriptor::new(CacheLayout::lightllm(format, 512).unwrap(), spec)
}

#[test]
fn arrays_on_the_device_and_on_the_host_give_the_same_bits() {
    let Some(device) = device() else { return };
    let stream = Arc::new(CudaStream::new(&device).unwrap());
    let descriptor = descriptor().with_memory(MemoryKind::Device);
    let selection =
        select(&Registry::builtin(), &descriptor, &SelectOptions::named(BackendId::CUDA)).unwrap();
    println!("{selection}\n{:?}", selection.evidence);
    assert_eq!(selection.evidence.as_ref().unwrap().isolation, Isolation::Process);

    let buffers: Vec<_> = descriptor
        .layout
        .buffer_bytes()
        .iter()
        .map(|bytes| device.alloc_zeroed(*bytes as usize).unwrap())
        .collect();
    let options = SessionOptions {
        memory: Memory::Device(buffers.iter().map(|buffer| buffer.view()).collect()),
        stream: Some(Stream::new(Arc::clone(&stream))),
        ..SessionOptions::default()
    };
    let mut session = Session::open(&selection, options).unwrap();
    let row = HEADS * DIM;
    let (k, v) = (numbers(KV_LEN * row, 1), numbers(KV_LEN * row, 2));
    let slots: Vec<i64> = (0..KV_LEN as i64).map(|t| (t * 37) % 509).collect();
    let pages: Vec<i32> = slots.iter().map(|slot| *slot as i32).collect();
    let half = KV_LEN / 2;
    session
        .append(FloatSlice::F16(&k[..half * row]), FloatSlice::F16(&v[..half * row]), &slots[..half])
        .unwrap();
    let rest = |x: &[f16]| device.upload(&x[half * row..]).unwrap();
    let (k_rest, v_rest) = (rest(&k), rest(&v));
    let slice = |buffer: &attn_kernels::device::DeviceBuffer| DeviceSlice::new(buffer.view(), FloatType::F16);
    session.append_on_device(slice(&k_rest), slice(&v_rest), &slots[half..]).unwrap();

    let q = numbers(Q_HEADS * DIM, 3);
    session.plan(&[KV_LEN as u32], PageTable::padded(&pages, KV_LEN as u64)).unwrap();
    let (mut out, mut lse) = (vec![f16::NAN; Q_HEADS * DIM], vec![f32::NAN; Q_HEADS]);
    session.decode(FloatSlice::F16(&q), FloatSliceMut::F16(&mut out), Some(&mut lse)).unwrap();

    let (q_there, out_there) = (device.upload(&q).unwrap(), device.alloc_zeroed(Q_HEADS * DIM * 2).unwrap());
    let lse_there = device.alloc_zeroed(Q_HEADS * 4).unwrap();
    let lse_slice = DeviceSlice::new(lse_there.view(), FloatType::F32);
    session.decode_on_device(slice(&q_there), slice(&out_there), Some(lse_slice)).unwrap();
    session.synchronize().unwrap();
    let (mut out_bits, mut lse_bits) = (vec![f16::ZERO; Q_HEADS * DIM], vec![0f32; Q_HEADS]);
    out_there.read(0, &mut out_bits).unwrap();
    lse_there.read(0, &mut lse_bits).unwrap();
    assert_eq!((out_bits, lse_bits), (out.clone(), lse.clone()));

    // The CPU agrees.
    let host = Descriptor { memory: MemoryKind::Owned, ..descriptor };
    let cpu = select(&Registry::builtin(), &host, &SelectOptions::named(BackendId::CPU)).unwrap();
    let mut session = Session::open(&cpu, SessionOptions::default()).unwrap();
    session.append(FloatSlice::F16(&k), FloatSlice::F16(&v), &slots).unwrap();
    session.plan(&[KV_LEN as u32], PageTable::padded(&pages, KV_LEN as u64)).unwrap();
    let (mut cpu_out, mut cpu_lse) = (vec![f16::NAN; Q_HEADS * DIM], vec![f32::NAN; Q_HEADS]);
    session.decode(FloatSlice::F16(&q), FloatSliceMut::F16(&mut cpu_out), Some(&mut cpu_lse)).unwrap();
    for (got, want) in out.iter().zip(&cpu_out) {
        assert!((got.to_f32() - want.to_f32()).abs() < 2e-3, "{got} {want}");
    }
    for (got, want) in lse.iter().zip(&cpu_lse) {
        assert!((got - want).abs() < 2e-3, "{got} {want}");
    }
}

#[test]
fn bad_data_is_the_same_error_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let selection =
        select(&Registry::builtin(), &descriptor(), &SelectOptions::named(BackendId::CUDA)).unwrap();
    let mut session = Session::open(&selection, SessionOptions::default()).unwrap();
    let good = numbers(3 * HEADS * DIM, 1);
    let mut bad = good.clone();
    bad[(2 * HEADS + 1) * DIM + 77] = f16::INFINITY;
    let expected = Error::Cache(kv_quant::Error::NonFinite { side: Side::V, token: 2, head: 1, channel: 77 });
    let refused = session.append(FloatSlice::F16(&good), FloatSlice::F16(&bad), &[5, -1, 9]);
    assert_eq!(refused, Err(expected.clone()));
    session.append(FloatSlice::F16(&good), FloatSlice::F16(&good), &[5, -1, 9]).unwrap();

    let upload = |x: &[f16]| device.upload(x).unwrap();
    let (k, v) = (upload(&good), upload(&bad));
    let slice = |buffer: &attn_kernels::device::DeviceBuffer| DeviceSlice::new(buffer.view(), FloatType::F16);
    session.append_on_device(slice(&k), slice(&v), &[5, 6, 9]).unwrap();
    assert_eq!(session.synchronize(), Err(expected));
    session.synchronize().unwrap();

    let huge = vec![3e38f32; HEADS * DIM];
    let refused = session.append(FloatSlice::F32(&huge), FloatSlice::F32(&huge), &[5]).unwrap_err();
    assert!(matches!(
        refused,
        Error::Cache(kv_quant::Error::ScaleOverflow { token: 0, head: 0, channel: 0, .. })
    ));
}

const TUNED_BATCH: usize = 4;
const TUNED_LEN: usize = 1000;

/// A session's warm-up under a level and a folder of profiles, in a process of its own that has them in its environment.
/// Answers why the step was cut as it was.
fn warm_up(dir: &Path, level: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "one_session_that_expects_its_step", "--ignored", "--nocapture"])
        .env(PROFILE_DIR_VARIABLE, dir)
        .env(TUNE_VARIABLE, level)
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{level}: {out}\n{err}");
    let why = out.lines().find_map(|line| line.split("why: ").nth(1));
    let why = why.unwrap_or_else(|| panic!("{level}: {out}\n{err}")).to_owned();
    println!("{level}: {why}");
    why
}

#[test]
fn what_is_missing_is_measured_at_warm_up_and_used_from_then_on() {
    let Some(device) = device() else { return };
    let dir = std::env::temp_dir().join(format!("kv8-warm-up-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    let file = dir.join(file_name(&device.facts().name));
    let here = format!("measured at {TUNED_BATCH} requests, {} tokens", TUNED_BATCH * TUNED_LEN);

    // Groups of 16 are in no profile that ships.
    assert!(warm_up(&dir, "profiles").contains("nothing was measured"));
    assert!(!file.exists());
    let learned = warm_up(&dir, "missing");
    assert!(learned.contains(&here), "{learned}");
    let text = std::fs::read_to_string(&file).unwrap();
    let (profile, left_out) = Profile::parse(&text).unwrap();
    assert!(left_out.is_empty());
    let points: Vec<_> = profile.tables.values().flatten().collect();
    let [(_, point)] = points[..] else { panic!("{text}") };
    let timing = point.timing;
    println!("{:.2} us instead of {:.2}, floor {:.2}", timing.us, timing.model_us, timing.floor_us);
    assert!(timing.us <= timing.model_us && learned.contains(&point.choice.to_string()));

    // It is known now: nothing is measured again, under either level.
    assert_eq!(warm_up(&dir, "profiles"), learned);
    assert_eq!(warm_up(&dir, "missing"), learned);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    assert!(warm_up(&dir, "off").contains("nothing was measured"));

    // A user's own numbers are taken as they are, and measured anew by force.
    let mine = text.replace(&format!("blocks = {}", point.choice.num_blocks), "blocks = 24");
    let mine = mine.replace(&format!(", shares = {}", point.choice.num_shares), "");
    let mine = mine.replace(&format!(", us = {:.2}", timing.us), ", us = 9999.00");
    std::fs::write(&file, &mine).unwrap();
    assert!(warm_up(&dir, "profiles").starts_with("24 blocks"));
    assert!(warm_up(&dir, "force").contains(&here));
    assert!(!std::fs::read_to_string(&file).unwrap().contains("us = 9999.00"));

    // A damaged file is a warning and the model's choice; by `missing` it is replaced.
    std::fs::write(&file, "garbage").unwrap();
    assert!(warm_up(&dir, "profiles").contains("nothing was measured"));
    assert!(warm_up(&dir, "missing").contains(&here));
    assert!(Profile::parse(&std::fs::read_to_string(&file).unwrap()).is_ok());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
#[ignore = "run by the test above, in a process whose environment has a level and a folder"]
fn one_session_that_expects_its_step() {
    const HEADS: usize = 8;
    let format = CacheFormat::new(HEADS as u32, DIM as u32, 16, 16, ScaleType::F16).unwrap();
    let layout = CacheLayout::native(format, 300, 16).unwrap();
    let descriptor = Descriptor::new(layout, DecodeSpec::new(32, HEADS as u32, DIM as u32));
    let row = HEADS * DIM;
    let num_tokens = TUNED_BATCH * TUNED_LEN;
    let (k, v) = (numbers(num_tokens * row, 1), numbers(num_tokens * row, 2));
    let q = numbers(TUNED_BATCH * 32 * DIM, 3);
    // Request after request, each from the start of a page.
    let pages_per_request = TUNED_LEN.div_ceil(16);
    let slot = |token: usize| token / TUNED_LEN * pages_per_request * 16 + token % TUNED_LEN;
    let slots: Vec<i64> = (0..num_tokens).map(|token| slot(token) as i64).collect();
    let pages: Vec<i32> = (0..(TUNED_BATCH * pages_per_request) as i32).collect();
    let outs = [BackendId::CUDA, BackendId::CPU].map(|backend| {
        let options = SelectOptions { trial: TrialMode::Skip, ..SelectOptions::named(backend) };
        let selection = select(&Registry::builtin(), &descriptor, &options).unwrap();
        let expect = Expect { batch: TUNED_BATCH, kv_len: TUNED_LEN as u32, append_tokens: num_tokens };
        let options = SessionOptions { expect: Some(expect), ..SessionOptions::default() };
        let mut session = Session::open(&selection, options).unwrap();
        session.append(FloatSlice::F16(&k), FloatSlice::F16(&v), &slots).unwrap();
        let table = PageTable::padded(&pages, pages_per_request as u64);
        session.plan(&[TUNED_LEN as u32; TUNED_BATCH], table).unwrap();
        if let Some(why) = session.explain_split() {
            println!("why: {why}");
        }
        let mut out = vec![f16::NAN; q.len()];
        session.decode(FloatSlice::F16(&q), FloatSliceMut::F16(&mut out), None).unwrap();
        out
    });
    for (got, want) in outs[0].iter().zip(&outs[1]) {
        assert!((got.to_f32() - want.to_f32()).abs() < 2e-3, "{got} {want}");
    }
}
