//! Sessions: in place over the caller's memory, several specs, page copies, raw bytes, and a few malformed calls.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a failure is the point")]

use attn_backend::{
    Array, Descriptor, Error, Expect, Memory, MemoryKind, Registry, SelectOptions, Selection, Session,
    SessionOptions, select,
};
use attn_plan::{DecodeSpec, PageTable, SplitConfig, SplitPolicy};
use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, PageCopy, ScaleType,
};

const DIM: usize = 64;
const HEADS: usize = 2;
const Q_HEADS: usize = 6;

fn spec() -> DecodeSpec {
    DecodeSpec {
        q_type: FloatType::F32,
        out_type: FloatType::F32,
        want_lse: true,
        ..DecodeSpec::new(Q_HEADS as u32, HEADS as u32, DIM as u32)
    }
}

fn format() -> CacheFormat {
    CacheFormat::new(HEADS as u32, DIM as u32, 32, 32, ScaleType::F16).unwrap()
}

fn selection(descriptor: &Descriptor) -> Selection {
    let options = SelectOptions { read_environment: false, ..SelectOptions::default() };
    select(&Registry::builtin(), descriptor, &options).unwrap()
}

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
}

/// Appends `slots.len()` tokens and decodes one request over the pages.
fn step(session: &mut Session<'_>, slots: &[i64], pages: &[i32]) -> (Vec<f32>, Vec<f32>) {
    let (k, v) = (numbers(slots.len() * HEADS * DIM, 1), numbers(slots.len() * HEADS * DIM, 2));
    session.append(FloatSlice::F32(&k), FloatSlice::F32(&v), slots).unwrap();
    decode(session, slots.len() as u32, pages)
}

fn decode(session: &mut Session<'_>, kv_len: u32, pages: &[i32]) -> (Vec<f32>, Vec<f32>) {
    session.plan(&[kv_len], PageTable::padded(pages, pages.len() as u64)).unwrap();
    let q = numbers(Q_HEADS * DIM, 3);
    let (mut out, mut lse) = (vec![f32::NAN; Q_HEADS * DIM], vec![f32::NAN; Q_HEADS]);
    session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), Some(&mut lse)).unwrap();
    (out, lse)
}

#[test]
fn lightllm_buffers_of_the_caller_are_used_in_place() {
    let layout = CacheLayout::lightllm(format(), 64).unwrap();
    let slots: Vec<i64> = (0..40).map(|t| (t * 37) % 64).collect();
    let pages: Vec<i32> = slots.iter().map(|slot| *slot as i32).collect();

    let owned = Descriptor::new(layout.clone(), spec());
    let mut session = Session::open(&selection(&owned), SessionOptions::default()).unwrap();
    let want = step(&mut session, &slots, &pages);

    let mut buffers = CacheBuffers::zeroed(&layout).unwrap();
    let descriptor = owned.clone().with_memory(MemoryKind::Host);
    let options = SessionOptions { memory: Memory::Host(buffers.view_mut()), ..SessionOptions::default() };
    let mut session = Session::open(&selection(&descriptor), options).unwrap();
    assert_eq!(step(&mut session, &slots, &pages), want);
    drop(session);

    let descriptor = owned.with_memory(MemoryKind::HostReadOnly);
    let options =
        SessionOptions { memory: Memory::HostReadOnly(buffers.view()), ..SessionOptions::default() };
    let mut session = Session::open(&selection(&descriptor), options).unwrap();
    assert_eq!(decode(&mut session, 40, &pages), want);
    let row = vec![0.0; HEADS * DIM];
    let refused = session.append(FloatSlice::F32(&row), FloatSlice::F32(&row), &[0]);
    assert_eq!(refused, Err(Error::ReadOnly));
    assert_eq!(session.write_bytes(0, 0, &[1]), Err(Error::ReadOnly));
    assert_eq!(session.copy_pages(&[PageCopy { src: 0, dst: 1 }]), Err(Error::ReadOnly));
}

#[test]
fn buffers_of_another_layout_are_refused() {
    let layout = CacheLayout::lightllm(format(), 64).unwrap();
    let mut small = CacheBuffers::zeroed(&CacheLayout::lightllm(format(), 63).unwrap()).unwrap();
    let descriptor = Descriptor::new(layout, spec()).with_memory(MemoryKind::Host);
    let options = SessionOptions { memory: Memory::Host(small.view_mut()), ..SessionOptions::default() };
    let error = Session::open(&selection(&descriptor), options).unwrap_err();
    let (got, want) = (63 * 4 * 64, 64 * 4 * 64);
    assert_eq!(error, Error::Cache(kv_quant::Error::BufferLen { buffer_idx: 0, got, want }));
}

#[test]
fn one_session_prefills_in_chunks_and_decodes() {
    let chunk = DecodeSpec { q_len: 8, ..spec() };
    let layout = CacheLayout::native(format(), 8, 16).unwrap();
    let descriptor = Descriptor::new(layout, spec()).also(chunk.clone());
    let mut session = Session::open(&selection(&descriptor), SessionOptions::default()).unwrap();
    let slots: Vec<i64> = (0..20).collect();
    step(&mut session, &slots, &[0, 1]);

    // The last chunk is shorter; its last row is what a plain step computes.
    for q_len in [8, 5, 1] {
        let asked = DecodeSpec { q_len, ..spec() };
        session.plan_for(&asked, &[20], PageTable::padded(&[0, 1], 2)).unwrap();
        let rows = q_len as usize;
        let mut q = vec![0.25; (rows - 1) * Q_HEADS * DIM];
        q.extend(numbers(Q_HEADS * DIM, 3));
        let (mut out, mut lse) = (vec![f32::NAN; rows * Q_HEADS * DIM], vec![f32::NAN; rows * Q_HEADS]);
        session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), Some(&mut lse)).unwrap();
        let (want, _) = decode(&mut session, 20, &[0, 1]);
        let last = &out[(rows - 1) * Q_HEADS * DIM..];
        assert!(last.iter().zip(&want).all(|(x, y)| (x - y).abs() < 1e-6), "q_len {q_len}");
    }

    let table = PageTable::padded(&[0, 1], 2);
    for asked in [DecodeSpec { q_len: 9, ..spec() }, DecodeSpec { window: Some(3), ..spec() }] {
        assert!(matches!(session.plan_for(&asked, &[20], table), Err(Error::SpecNotSelected { .. })));
        let mut out = vec![0.0; Q_HEADS * DIM];
        let q = vec![0.0; Q_HEADS * DIM];
        let refused = session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), None);
        assert_eq!(refused, Err(Error::NoPlan), "a failed plan leaves none");
    }
    let error = session.plan_for(&DecodeSpec { q_len: 0, ..spec() }, &[20], table).unwrap_err();
    assert_eq!(error, Error::Plan(attn_plan::Error::QLen { q_len: 0, max: attn_plan::MAX_Q_LEN }));
}

#[test]
fn a_fork_copies_its_page_and_raw_bytes_come_back() {
    let layout = CacheLayout::native(format(), 8, 16).unwrap();
    let mut session =
        Session::open(&selection(&Descriptor::new(layout, spec())), SessionOptions::default()).unwrap();
    let slots: Vec<i64> = (32..42).collect();
    let want = step(&mut session, &slots, &[2]);
    session.copy_pages(&[PageCopy { src: 2, dst: 5 }, PageCopy { src: 2, dst: 6 }]).unwrap();
    assert_eq!(decode(&mut session, 10, &[5]), want);

    let page = session.layout().bytes_per_page();
    let mut bytes = vec![0; page as usize];
    session.read_bytes(0, 2 * page, &mut bytes).unwrap();
    session.write_bytes(0, 7 * page, &bytes).unwrap();
    assert_eq!(decode(&mut session, 10, &[7]), want);

    let conflict = |copies: &[(u64, u64)], session: &mut Session<'_>| {
        let copies: Vec<PageCopy> = copies.iter().map(|&(src, dst)| PageCopy { src, dst }).collect();
        session.copy_pages(&copies).unwrap_err()
    };
    assert_eq!(conflict(&[(0, 8)], &mut session), Error::CopyPage { copy: 0, page: 8, num_pages: 8 });
    let error = conflict(&[(0, 1), (3, 4), (2, 1)], &mut session);
    assert_eq!(error, Error::CopyConflict { first: 0, second: 2, page: 1 });
    let error = conflict(&[(0, 1), (1, 2)], &mut session);
    assert_eq!(error, Error::CopyConflict { first: 0, second: 1, page: 1 });
    assert_eq!(conflict(&[(3, 3)], &mut session), Error::CopyConflict { first: 0, second: 0, page: 3 });
    let error = session.read_bytes(0, 8 * page - 1, &mut [0; 2]).unwrap_err();
    assert_eq!(
        error,
        Error::ByteRange { buffer_idx: 0, start: 8 * page - 1, end: 8 * page + 1, have: 8 * page }
    );
    let error = session.write_bytes(1, 0, &[]).unwrap_err();
    assert_eq!(error, Error::ByteRange { buffer_idx: 1, start: 0, end: 0, have: 0 });
    assert!(session.read_bytes(0, u64::MAX, &mut [0; 2]).is_err());
}

#[test]
fn arrays_are_checked_before_anything_runs() {
    let layout = CacheLayout::native(format(), 8, 16).unwrap();
    let mut session =
        Session::open(&selection(&Descriptor::new(layout, spec())), SessionOptions::default()).unwrap();
    let (q, mut out, mut lse) = (vec![0.0; Q_HEADS * DIM], vec![0.0; Q_HEADS * DIM], vec![0.0; Q_HEADS]);
    let no_plan = session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), Some(&mut lse));
    assert_eq!(no_plan, Err(Error::NoPlan));

    step(&mut session, &[0, 1, -1], &[0]);
    let run = |session: &mut Session<'_>, q: &[f32], out: &mut [f32], lse: Option<&mut [f32]>| {
        session.decode(FloatSlice::F32(q), FloatSliceMut::F32(out), lse).unwrap_err()
    };
    let elements = (Q_HEADS * DIM) as u64;
    assert_eq!(
        run(&mut session, &q[1..], &mut out, Some(&mut lse)),
        Error::Len { array: Array::Q, got: elements - 1, want: elements }
    );
    assert_eq!(
        run(&mut session, &q, &mut out[1..], Some(&mut lse)),
        Error::Len { array: Array::Out, got: elements - 1, want: elements }
    );
    assert_eq!(
        run(&mut session, &q, &mut out, Some(&mut lse[1..])),
        Error::Len { array: Array::Lse, got: 5, want: 6 }
    );
    assert_eq!(run(&mut session, &q, &mut out, None), Error::LseMissing);
    let halves = vec![half::f16::ZERO; Q_HEADS * DIM];
    let error = session.decode(FloatSlice::F16(&halves), FloatSliceMut::F32(&mut out), Some(&mut lse));
    assert_eq!(error, Err(Error::Type { array: Array::Q, got: FloatType::F16, want: FloatType::F32 }));

    let row = vec![0.0; HEADS * DIM];
    let append = |session: &mut Session<'_>, k: &[f32], slots: &[i64]| {
        session.append(FloatSlice::F32(k), FloatSlice::F32(&row), slots).unwrap_err()
    };
    assert_eq!(append(&mut session, &row[1..], &[0]), Error::Len { array: Array::K, got: 127, want: 128 });
    let out_of_range = kv_quant::Error::SlotOutOfRange { token: 0, slot: 128, num_slots: 128 };
    assert_eq!(append(&mut session, &row, &[128]), Error::Cache(out_of_range));
    let mut nan = row.clone();
    nan[70] = f32::NAN;
    let non_finite = kv_quant::Error::NonFinite { side: kv_quant::Side::K, token: 0, head: 1, channel: 6 };
    assert_eq!(append(&mut session, &nan, &[3]), Error::Cache(non_finite));

    let table = [0i32; 100];
    let error = session.plan(&[129], PageTable::padded(&table, 100)).unwrap_err();
    assert_eq!(error, Error::KvLen { request: 0, kv_len: 129, num_slots: 128 });
}

#[test]
fn lse_that_nobody_wants_is_refused() {
    let layout = CacheLayout::native(format(), 8, 16).unwrap();
    let descriptor = Descriptor::new(layout, DecodeSpec { want_lse: false, ..spec() });
    let mut session = Session::open(&selection(&descriptor), SessionOptions::default()).unwrap();
    session.plan(&[0], PageTable::padded(&[], 0)).unwrap();
    let (q, mut out, mut lse) = (vec![0.0; Q_HEADS * DIM], vec![f32::NAN; Q_HEADS * DIM], vec![0.0; Q_HEADS]);
    let error = session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), Some(&mut lse));
    assert_eq!(error, Err(Error::LseNotWanted));
    session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), None).unwrap();
    assert!(out.iter().all(|x| *x == 0.0), "a request of length 0 gives zeros");
}

#[test]
fn an_empty_batch_is_a_step() {
    let layout = CacheLayout::native(format(), 8, 16).unwrap();
    let options = SessionOptions {
        expect: Some(Expect { batch: 4, kv_len: 100, append_tokens: 4 }),
        ..SessionOptions::default()
    };
    let mut session = Session::open(&selection(&Descriptor::new(layout, spec())), options).unwrap();
    session.append(FloatSlice::F32(&[]), FloatSlice::F32(&[]), &[]).unwrap();
    session.plan(&[], PageTable::padded(&[], 0)).unwrap();
    session.decode(FloatSlice::F32(&[]), FloatSliceMut::F32(&mut []), Some(&mut [])).unwrap();
    session.copy_pages(&[]).unwrap();
    session.synchronize().unwrap();
}

#[test]
fn a_split_that_no_plan_can_follow_is_refused_and_the_old_one_stays() {
    let layout = CacheLayout::native(format(), 8, 16).unwrap();
    let selection = selection(&Descriptor::new(layout, spec()));
    let bad = SplitConfig { num_workers: 0, ..SplitConfig::throughput(1) };
    let options = SessionOptions { split: Some(bad), ..SessionOptions::default() };
    assert_eq!(Session::open(&selection, options).unwrap_err(), Error::Plan(attn_plan::Error::NumWorkers(0)));
    let mut session = Session::open(&selection, SessionOptions::default()).unwrap();
    let before = *session.split();
    assert!(session.set_split(bad).is_err());
    assert_eq!(*session.split(), before);
    let policy = SplitPolicy::BatchInvariant { split_len: 64 };
    session.set_split(attn_backend::cpu_split_config(&format(), 3, policy)).unwrap();
    step(&mut session, &(0..100).collect::<Vec<i64>>(), &[0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(session.split_plan().num_partials(), 2);
}
