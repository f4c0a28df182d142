//! Calls of a session, and of the CPU backend below it, that must be refused before anything runs.

use super::bench::{Bench, Seen};
use super::rows;
use attn_backend::{Array, Error, Memory, MemoryKind, Session, SessionOptions};
use attn_plan::{DecodeSpec, PageTable, SplitConfig, SplitPlan, SplitPolicy};
use half::{bf16, f16};
use kv_quant::{
    CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, PageCopy, ScaleType,
};
use std::sync::atomic::Ordering;

fn copies(bench: &mut Bench, copies: &[(u64, u64)]) -> Seen {
    let copies: Vec<PageCopy> = copies.iter().map(|&(src, dst)| PageCopy { src, dst }).collect();
    bench.in_session(|session, _| session.copy_pages(&copies).into())
}

fn read(bench: &mut Bench, buffer_idx: usize, offset: u64, len: usize) -> Seen {
    bench.in_session(|session, _| session.read_bytes(buffer_idx, offset, &mut vec![0; len]).into())
}

fn write(bench: &mut Bench, buffer_idx: usize, offset: u64, len: usize) -> Seen {
    bench.in_session(|session, _| session.write_bytes(buffer_idx, offset, &vec![7; len]).into())
}

/// Plans for another spec than the session's.
fn plan_for(bench: &mut Bench, change: impl FnOnce(&mut DecodeSpec)) -> Seen {
    let mut spec = bench.spec.clone();
    change(&mut spec);
    bench.in_session(|session, bench| {
        session.plan_for(&spec, &bench.kv_lens, bench.request().page_table).into()
    })
}

fn open(bench: &Bench, options: SessionOptions<'_>) -> Seen {
    let selection = bench.select(&bench.descriptor()).expect("the unbroken descriptor");
    Session::open(&selection, options).into()
}

fn with_split(bench: &Bench, change: impl FnOnce(&mut SplitConfig)) -> Seen {
    let mut split = bench.config;
    change(&mut split);
    open(bench, SessionOptions { split: Some(split), ..Default::default() })
}

/// Opens over host buffers that were made for one page less.
fn over_small_buffers(bench: &Bench, is_read_only: bool) -> Seen {
    let small = CacheLayout::hnd(*bench.layout.format(), 7, 4).expect("valid");
    let mut buffers = CacheBuffers::zeroed(&small).expect("small");
    let memory =
        if is_read_only { Memory::HostReadOnly(buffers.view()) } else { Memory::Host(buffers.view_mut()) };
    open(bench, SessionOptions { memory, ..Default::default() })
}

/// Calls a session over a cache that was borrowed for reading.
fn read_only(bench: &mut Bench, call: impl FnOnce(&mut Session<'_>, &Bench) -> Result<(), Error>) -> Seen {
    let selection = bench.select(&bench.descriptor()).expect("the unbroken descriptor");
    let memory = Memory::HostReadOnly(bench.cache.view());
    let mut session =
        Session::open(&selection, SessionOptions { memory, ..Default::default() }).expect("readable");
    call(&mut session, bench).into()
}

/// A decode by the CPU crate itself, with a plan for other lengths.
fn host(bench: &mut Bench, kv_lens: &[u32]) -> Seen {
    let plan = SplitPlan::new(&bench.spec, kv_lens, &bench.config).expect("a valid plan");
    let Bench { layout, cache, spec, kv_lens, pages, page_stride, q, out, lse, .. } = bench;
    let request =
        attn_plan::DecodeRequest { spec, kv_lens, page_table: PageTable::padded(pages, *page_stride) };
    let (q, out) = (FloatSlice::F32(q), FloatSliceMut::F32(out));
    let mut workspace = cpu_reference::Workspace::new();
    cpu_reference::decode(layout, cache.view(), &request, &plan, q, out, Some(lse), &mut workspace).into()
}

rows! {
    "decode: q one element short" => Seen::Session(Error::Len { array: Array::Q, got: 383, want: 384 }),
        |b| { b.q.pop(); b.decode_in_session() };
    "decode: q one element long" => Seen::Session(Error::Len { array: Array::Q, got: 385, .. }),
        |b| { b.q.push(0.0); b.decode_in_session() };
    "decode: q empty" => Seen::Session(Error::Len { array: Array::Q, got: 0, .. }),
        |b| { b.q.clear(); b.decode_in_session() };
    "decode: q of one request more" => Seen::Session(Error::Len { array: Array::Q, got: 512, .. }),
        |b| { b.q.resize(512, 0.0); b.decode_in_session() };
    "decode: out one element short" => Seen::Session(Error::Len { array: Array::Out, got: 383, .. }),
        |b| { b.out.pop(); let seen = b.decode_in_session(); b.out.push(b.out[0]); seen };
    "decode: lse one element short" => Seen::Session(Error::Len { array: Array::Lse, got: 11, want: 12 }),
        |b| { b.lse.pop(); let seen = b.decode_in_session(); b.lse.push(b.lse[0]); seen };
    "decode: lse empty" => Seen::Session(Error::Len { array: Array::Lse, got: 0, .. }),
        |b| b.in_session(|session, b| {
            session.decode(FloatSlice::F32(&b.q), FloatSliceMut::F32(&mut b.out), Some(&mut [])).into()
        });
    "decode: lse missing" => Seen::Session(Error::LseMissing), |b| b.in_session(|session, b| {
        session.decode(FloatSlice::F32(&b.q), FloatSliceMut::F32(&mut b.out), None).into()
    });
    "decode: lse not wanted" => Seen::Session(Error::LseNotWanted), |b| {
        b.spec.want_lse = false;
        b.decode_in_session()
    };
    "decode: q in f16" => Seen::Session(Error::Type { array: Array::Q, got: FloatType::F16, want: FloatType::F32 }),
        |b| b.in_session(|session, b| {
            let q = vec![f16::ONE; b.q.len()];
            session.decode(FloatSlice::F16(&q), FloatSliceMut::F32(&mut b.out), Some(&mut b.lse)).into()
        });
    "decode: q in bf16" => Seen::Session(Error::Type { array: Array::Q, got: FloatType::Bf16, .. }),
        |b| b.in_session(|session, b| {
            let q = vec![bf16::ONE; b.q.len()];
            session.decode(FloatSlice::Bf16(&q), FloatSliceMut::F32(&mut b.out), Some(&mut b.lse)).into()
        });
    "decode: out in f16" => Seen::Session(Error::Type { array: Array::Out, got: FloatType::F16, .. }),
        |b| b.in_session(|session, b| {
            let mut out = vec![f16::ONE; b.out.len()];
            session.decode(FloatSlice::F32(&b.q), FloatSliceMut::F16(&mut out), Some(&mut b.lse)).into()
        });
    "decode before any plan" => Seen::Session(Error::NoPlan), |b| {
        let selection = b.select(&b.descriptor()).expect("valid");
        let mut session = Session::open(&selection, SessionOptions::default()).expect("valid");
        session.decode(FloatSlice::F32(&b.q), FloatSliceMut::F32(&mut b.out), Some(&mut b.lse)).into()
    };
    "decode after a refused plan" => Seen::Session(Error::NoPlan), |b| b.in_session(|session, b| {
        assert!(session.plan(&[1 << 20], b.request().page_table).is_err());
        session.decode(FloatSlice::F32(&b.q), FloatSliceMut::F32(&mut b.out), Some(&mut b.lse)).into()
    });
    "decode after another split" => Seen::Session(Error::NoPlan), |b| b.in_session(|session, b| {
        session.set_split(SplitConfig::throughput(2)).expect("valid");
        session.decode(FloatSlice::F32(&b.q), FloatSliceMut::F32(&mut b.out), Some(&mut b.lse)).into()
    });
    "decode of the batch before" => Seen::Session(Error::Len { array: Array::Q, got: 384, want: 128 }),
        |b| b.in_session(|session, b| {
            session.plan(&b.kv_lens[..1], b.request().page_table).expect("valid");
            b.backend.launches.store(0, Ordering::Relaxed);
            session.decode(FloatSlice::F32(&b.q), FloatSliceMut::F32(&mut b.out), Some(&mut b.lse)).into()
        });

    "session: page out of range" => Seen::Plan(attn_plan::Error::PageOutOfRange { page: 8, .. }),
        |b| { b.pages[0] = 8; b.plan_in_session() };
    "session: length beyond the row" => Seen::Plan(attn_plan::Error::PageRowStride { .. }),
        |b| { b.kv_lens[2] = 13; b.plan_in_session() };
    "session: page table short" => Seen::Plan(attn_plan::Error::PageTableShort { .. }),
        |b| { b.pages.truncate(6); b.plan_in_session() };
    "session: row starts for another batch" => Seen::Plan(attn_plan::Error::PageRowCount { got: 2, want: 3 }),
        |b| { b.page_starts = Some(vec![0, 3]); b.plan_in_session() };
    "session: more tokens than the cache has slots" => Seen::Session(Error::KvLen { request: 0, kv_len: 33, .. }),
        |b| {
            b.page_starts = Some(vec![0]);
            (b.pages, b.kv_lens) = (vec![0; 9], vec![33]);
            b.plan_in_session()
        };
    "session: another softmax_scale" => Seen::Session(Error::SpecNotSelected { .. }),
        |b| plan_for(b, |spec| spec.softmax_scale = 1.0);
    "session: longer q_len" => Seen::Session(Error::SpecNotSelected { .. }), |b| plan_for(b, |spec| spec.q_len = 2);
    "session: a window it was not opened for" => Seen::Session(Error::SpecNotSelected { .. }),
        |b| plan_for(b, |spec| spec.window = Some(4));
    "session: another q type" => Seen::Session(Error::SpecNotSelected { .. }),
        |b| plan_for(b, |spec| spec.q_type = FloatType::F16);
    "session: more query heads" => Seen::Session(Error::SpecNotSelected { .. }),
        |b| plan_for(b, |spec| spec.num_q_heads = 8);
    "session: spec of another cache" => Seen::Plan(attn_plan::Error::CacheMismatch { what: "head_dim", .. }),
        |b| plan_for(b, |spec| spec.head_dim = 64);
    "session: spec with a NaN scale" => Seen::Plan(attn_plan::Error::SoftmaxScale(_)),
        |b| plan_for(b, |spec| spec.softmax_scale = f32::NAN);
    "session: spec without heads" => Seen::Plan(attn_plan::Error::NumQHeads { num_q_heads: 0, .. }),
        |b| plan_for(b, |spec| spec.num_q_heads = 0);

    "append: k short" => Seen::Session(Error::Len { array: Array::K, got: 191, want: 192 }),
        |b| { b.k.pop(); b.append_in_session() };
    "append: v one token long" => Seen::Session(Error::Len { array: Array::V, got: 256, .. }),
        |b| { b.v.resize(256, 0.0); b.append_in_session() };
    "append: no slots" => Seen::Session(Error::Len { array: Array::K, want: 0, .. }),
        |b| { b.slots.clear(); b.append_in_session() };
    "append: v of another type" => Seen::Quant(kv_quant::Error::MixedTypes { .. }),
        |b| b.in_session(|session, b| {
            let v = vec![f16::ONE; b.v.len()];
            session.append(FloatSlice::F32(&b.k), FloatSlice::F16(&v), &b.slots).into()
        });
    "append: slot past the end" => Seen::Quant(kv_quant::Error::SlotOutOfRange { slot: 32, .. }),
        |b| { b.slots[2] = 32; b.append_in_session() };
    "append: slot -2" => Seen::Quant(kv_quant::Error::SlotOutOfRange { slot: -2, .. }),
        |b| { b.slots[1] = -2; b.append_in_session() };
    "append: slot twice" => Seen::Quant(kv_quant::Error::SlotTwice { slot: 28, .. }),
        |b| { b.slots[0] = 28; b.append_in_session() };
    "append: NaN in k" => Seen::Quant(kv_quant::Error::NonFinite { token: 2, head: 1, channel: 31, .. }),
        |b| { b.k[191] = f32::NAN; b.append_in_session() };
    "append: infinity in v" => Seen::Quant(kv_quant::Error::NonFinite { token: 0, head: 0, channel: 0, .. }),
        |b| { b.v[0] = f32::INFINITY; b.append_in_session() };
    "append: scale overflows" => Seen::Quant(kv_quant::Error::ScaleOverflow { token: 2, .. }),
        |b| { b.k[190] = 1e30; b.append_in_session() };

    "copy: source past the end" => Seen::Session(Error::CopyPage { copy: 1, page: 8, num_pages: 8 }),
        |b| copies(b, &[(0, 7), (8, 6)]);
    "copy: destination past the end" => Seen::Session(Error::CopyPage { copy: 0, page: 8, .. }),
        |b| copies(b, &[(0, 8)]);
    "copy: page u64::MAX" => Seen::Session(Error::CopyPage { page: u64::MAX, .. }), |b| copies(b, &[(u64::MAX, 7)]);
    "copy: one page written twice" => Seen::Session(Error::CopyConflict { first: 0, second: 1, page: 7 }),
        |b| copies(b, &[(0, 7), (1, 7)]);
    "copy: a page read after it was written" => Seen::Session(Error::CopyConflict { page: 7, .. }),
        |b| copies(b, &[(0, 7), (7, 6)]);
    "copy: a page onto itself" => Seen::Session(Error::CopyConflict { page: 3, .. }), |b| copies(b, &[(3, 3)]);
    "read: no such buffer" => Seen::Session(Error::ByteRange { buffer_idx: 4, have: 0, .. }), |b| read(b, 4, 0, 1);
    "read: one byte past the end" => Seen::Session(Error::ByteRange { buffer_idx: 0, .. }), |b| read(b, 0, 2048, 1);
    "read: offset overflows" => Seen::Session(Error::ByteRange { .. }), |b| read(b, 0, u64::MAX, 8);
    "write: no such buffer" => Seen::Session(Error::ByteRange { buffer_idx: usize::MAX, .. }),
        |b| write(b, usize::MAX, 0, 1);
    "write: past the end" => Seen::Session(Error::ByteRange { buffer_idx: 2, .. }), |b| write(b, 2, 500, 13);
    "write: offset overflows" => Seen::Session(Error::ByteRange { .. }), |b| write(b, 1, u64::MAX - 3, 8);

    "open: workers zero" => Seen::Plan(attn_plan::Error::NumWorkers(0)), |b| with_split(b, |split| split.num_workers = 0);
    "open: tile zero" => Seen::Plan(attn_plan::Error::TileLen(0)), |b| with_split(b, |split| split.tile_len = 0);
    "open: split no multiple of the tile" => Seen::Plan(attn_plan::Error::SplitLen { split_len: 6, tile_len: 4 }),
        |b| with_split(b, |split| split.policy = SplitPolicy::BatchInvariant { split_len: 6 });
    "open: batch invariance that is not offered" => Seen::Session(Error::Refused { .. }), |b| {
        b.backend.is_narrow = true;
        with_split(b, |split| split.policy = SplitPolicy::BatchInvariant { split_len: 8 })
    };
    "open: device memory on a host backend"
        => Seen::Session(Error::Memory { got: MemoryKind::Device, .. }),
        |b| open(b, SessionOptions { memory: Memory::Device(Vec::new()), ..Default::default() });
    "open: host buffers too short" => Seen::Quant(kv_quant::Error::BufferLen { buffer_idx: 0, .. }),
        |b| over_small_buffers(b, false);
    "open: read-only host buffers too short" => Seen::Quant(kv_quant::Error::BufferLen { buffer_idx: 0, .. }),
        |b| over_small_buffers(b, true);
    "set_split: workers beyond the most" => Seen::Plan(attn_plan::Error::NumWorkers(_)),
        |b| b.in_session(|session, _| session.set_split(SplitConfig::throughput(u32::MAX)).into());

    "read-only cache: append" => Seen::Session(Error::ReadOnly),
        |b| read_only(b, |session, b| session.append(FloatSlice::F32(&b.k), FloatSlice::F32(&b.v), &b.slots));
    "read-only cache: write" => Seen::Session(Error::ReadOnly),
        |b| read_only(b, |session, _| session.write_bytes(0, 0, &[1]));
    "read-only cache: copy" => Seen::Session(Error::ReadOnly),
        |b| read_only(b, |session, _| session.copy_pages(&[PageCopy { src: 0, dst: 7 }]));

    "cpu: plan for another batch" => Seen::Host(cpu_reference::Error::PlanBatch { plan: 2, batch: 3 }),
        |b| host(b, &[9, 5]);
    "cpu: plan for longer requests" => Seen::Host(cpu_reference::Error::PlanRange { request: 1, .. }),
        |b| host(b, &[9, 4, 5]);
    "cpu: q short" => Seen::Host(cpu_reference::Error::Len { what: "q", .. }),
        |b| { b.q.pop(); host(b, &[9, 0, 5]) };
    "cpu: heads of another cache" => Seen::Host(cpu_reference::Error::Request(_)), |b| {
        let format = CacheFormat::new(1, 32, 8, 8, ScaleType::F16).expect("valid");
        let mut other = b.clone();
        other.layout = CacheLayout::hnd(format, 8, 4).expect("valid");
        host(&mut other, &[9, 0, 5])
    };
}
