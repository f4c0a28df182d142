//! Nothing leaks in 100,000 calls, and running out of memory is an error that one recovers from.

use super::text;
use crate::case::Case;
use crate::count::Ledger;
use crate::guarded::kernels;
use crate::numbers::Numbers;
use crate::subject::Subject;
use crate::values::Values;
use attn_backend::{
    CudaBackend, Descriptor, Error, FormatKey, Operation, OperationKey, Registry, SelectOptions, Session,
    SessionOptions, TrialMode, select,
};
use attn_kernels::device::DeviceBuffer;
use attn_plan::PageTable;
use kv_quant::{FloatSliceMut, FloatType};
use std::sync::Arc;

/// Calls of a session, at least.
const NUM_CALLS: u64 = 100_000;
/// Sessions opened and closed on the way.
const NUM_SESSIONS: u64 = 100;
/// Less than a hundred bytes a call: the allocator's and the driver's own play.
const MOST_GROWTH: u64 = 8 << 20;
/// Memory that a pool is too large for: its two planes of codes stay below 64 GiB each.
const MOST_ROOM: usize = 100 << 30;
/// What the driver hands out memory in.
const GRANULE: usize = 2 << 20;

fn case() -> Case {
    Case { num_kv_heads: 2, gqa_group: 4, page_len: 16, in_type: FloatType::F16, ..Case::plain(64, 200) }
}

fn open(case: &Case, num_pages: u64) -> Result<Session<'static>, Error> {
    let descriptor = Descriptor::new(case.layout_of(num_pages), case.bare_spec());
    let mut registry = Registry::empty();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    registry.register(key, Arc::new(CudaBackend::default()));
    let options = SelectOptions { read_environment: false, trial: TrialMode::Skip, ..Default::default() };
    let selection = select(&registry, &descriptor, &options).expect("the backend takes the descriptor");
    Session::open(&selection, SessionOptions::default())
}

/// One session's life: appends, plans and decodes that succeed, appends and plans that are refused.
fn life(case: &Case, num_rounds: u64) -> Result<u64, String> {
    let mut session = open(case, 16).map_err(text)?;
    let spec = case.bare_spec();
    let row = (case.num_kv_heads * case.head_dim) as usize;
    let mut numbers = Numbers::new(1, 9);
    let mut rows = |n: usize| Values::from_f32(case.in_type, &numbers.normals(n * row));
    let (k, v) = (rows(200), rows(200));
    let slots: Vec<i64> = (0..200).collect();
    session.append(k.as_slice(), v.as_slice(), &slots).map_err(text)?;
    let bad = Values::from_f32(case.in_type, &vec![f32::NAN; row]);
    let (one_k, one_v) = (k.part(0..row), v.part(0..row));
    let q = Values::from_f32(case.q_type, &vec![0.5; spec.q_elements(1)]);
    let pages: Vec<i32> = (0..13).collect();
    let (mut out, mut lse) = (vec![0f32; spec.q_elements(1)], vec![0f32; spec.lse_elements(1)]);
    let mut calls = 1;
    for round in 0..num_rounds {
        session.append(one_k.as_slice(), one_v.as_slice(), &[(round % 200) as i64]).map_err(text)?;
        let kv_len = 1 + (round * 37 % 200) as u32;
        session.plan(&[kv_len], PageTable::padded(&pages, 13)).map_err(text)?;
        session.decode(q.as_slice(), FloatSliceMut::F32(&mut out), Some(&mut lse)).map_err(text)?;
        calls += 3;
        if round % 10 == 0 {
            let refused = session.append(bad.as_slice(), one_v.as_slice(), &[0]);
            if !matches!(refused, Err(Error::Cache(kv_quant::Error::NonFinite { .. }))) {
                return Err(format!("NaN: {refused:?}"));
            }
            if session.plan(&[100_000], PageTable::padded(&pages, 13)).is_ok() {
                return Err("a request that is longer than its row was planned".to_owned());
            }
            calls += 2;
        }
    }
    Ok(calls)
}

/// Calls of every kind over many sessions: as much device memory is free afterwards as before, and the process has
/// not grown.
///
/// # Errors
/// What is missing.
pub fn leaks(ledger: &Ledger) -> Result<(), String> {
    let device = kernels().map_err(text)?.device();
    let case = case();
    life(&case, 10)?;
    device.synchronize().map_err(text)?;
    let (resident_before, free_before) = (resident_bytes(), device.memory_info().map_err(text)?.0);
    let mut calls = 0;
    for _ in 0..NUM_SESSIONS {
        calls += life(&case, NUM_CALLS / NUM_SESSIONS / 3 + 1)?;
    }
    device.synchronize().map_err(text)?;
    let free = device.memory_info().map_err(text)?.0;
    if free < free_before {
        let lost = free_before - free;
        return Err(format!("{lost} bytes of device memory are lost after {calls} calls"));
    }
    let grown = resident_bytes().saturating_sub(resident_before);
    ledger.tally("calls without a leak of device memory", calls);
    if grown > MOST_GROWTH {
        return Err(format!("the process has grown by {grown} bytes in {calls} calls"));
    }
    ledger.tally("bytes by which the process grew meanwhile", grown);
    Ok(())
}

/// Resident memory of this process; 0 where the system does not say.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// A pool that does not fit, and a device that is full when a session opens: typed errors with the numbers, and the next
/// attempt with room succeeds; a session that was open goes on.
///
/// # Errors
/// Another answer.
pub fn out_of_memory(ledger: &Ledger) -> Result<(), String> {
    let device = kernels().map_err(text)?.device();
    let case = case();
    let mut open_already = open(&case, 16).map_err(text)?;
    let (free, total) = device.memory_info().map_err(text)?;
    // More than what the device has, in buffers of K and V of which each alone would fit. A larger device is made smaller
    // first: a plane of codes is within the kernels' reach.
    let room = total.min(MOST_ROOM);
    let ballast = (room < total).then(|| device.alloc(total - room)).transpose().map_err(text)?;
    let page = case.layout_of(1).buffer_bytes().iter().sum::<u64>();
    match open(&case, (room + room / 16) as u64 / page) {
        Err(Error::DeviceOutOfMemory { requested, .. }) if requested as usize >= room / 16 => {}
        other => return Err(format!("a pool larger than the device: {:?}", other.map(|_| ()))),
    }
    drop(ballast);
    // What others hold is theirs; take the rest, in smaller and smaller pieces.
    let mut hogs: Vec<DeviceBuffer> = Vec::new();
    let mut piece = free;
    while piece >= GRANULE {
        match device.alloc(piece) {
            Ok(hog) => hogs.push(hog),
            Err(_) => piece /= 2,
        }
    }
    let refused = open(&case, 4096 * 16).map(|_| ());
    let Err(Error::DeviceOutOfMemory { requested, free }) = refused else {
        return Err(format!("a full device: {refused:?}"));
    };
    if free > requested {
        return Err(format!("{requested} bytes were refused while {free} were free"));
    }
    // The session that is there wants no more memory for what it has done before, and more for what it has not.
    let spec = case.bare_spec();
    let batch = 1000;
    let (kv_lens, pages) = (vec![256u32; batch], (0..16).collect::<Vec<i32>>().repeat(batch));
    let planned = open_already.plan(&kv_lens, PageTable::padded(&pages, 16));
    if !matches!(planned, Ok(()) | Err(Error::DeviceOutOfMemory { .. } | Error::OutOfMemory { .. })) {
        return Err(format!("a plan on a full device: {planned:?}"));
    }
    drop(hogs);
    open_already.plan(&kv_lens, PageTable::padded(&pages, 16)).map_err(text)?;
    let q = vec![0f32; spec.q_elements(batch)];
    let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; spec.lse_elements(batch)]);
    open_already
        .decode(kv_quant::FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), Some(&mut lse))
        .map_err(text)?;
    // The cache is zero, so is everything that is read from it.
    if out.iter().any(|x| *x != 0.0) || lse.iter().any(|x| (x - 256f32.ln()).abs() > 1e-4) {
        return Err("wrong after memory had run out".to_owned());
    }
    open(&case, 4096 * 16).map_err(text)?;
    let subject = Subject::new(Arc::new(CudaBackend::default()), &Arc::default());
    crate::conformance::judge(&subject, "after out of memory", &case)?;
    ledger.tally("recoveries from a full device", 1);
    Ok(())
}
