//! Lesson 2: a ragged batch, decoded on the CPU through a session, and how near it is to the truth.
//!
//! `cargo run -p attn-examples --example 02_decode_on_cpu`
#![allow(clippy::print_stdout, reason = "a lesson prints")]

use attn_backend::{BackendId, Descriptor, Registry, SelectOptions, normal_decode};
use attn_plan::{DecodeSpec, PageTable};
use kv_quant::{AppendSlots, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, PagePool, ScaleType};

fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

fn main() -> anyhow::Result<()> {
    // Shapes: 8 query heads over 2 kv heads of 64 channels, f32 in and out, lse wanted.
    let spec = DecodeSpec {
        q_type: kv_quant::FloatType::F32,
        out_type: kv_quant::FloatType::F32,
        want_lse: true,
        ..DecodeSpec::new(8, 2, 64)
    };
    let format = CacheFormat::new(spec.num_kv_heads, spec.head_dim, 32, 32, ScaleType::F16)?;
    let layout = CacheLayout::native(format, 64, 16)?;

    // Once: choose the backend, open the session. The session owns cache and workspace.
    let descriptor = Descriptor::new(layout.clone(), spec.clone());
    let options = SelectOptions::named(BackendId::CPU);
    let (mut session, _) = normal_decode::open(&Registry::builtin(), &descriptor, &options)?;

    // The pool says which slots new tokens get. Three sequences of very different lengths.
    let mut pool = PagePool::for_layout(&layout);
    let sequences = [pool.allocate(), pool.allocate(), pool.allocate()];
    let mut append = AppendSlots::default();
    pool.append_batch(&[(sequences[0], 700), (sequences[1], 3), (sequences[2], 41)], &mut append)?;
    let row = (spec.num_kv_heads * spec.head_dim) as usize;
    let k = wave(append.slots().len() * row, 0.011);
    let v = wave(append.slots().len() * row, 0.017);
    session.append(FloatSlice::F32(&k), FloatSlice::F32(&v), append.slots())?;

    // Every step: lengths and page table to a plan, then q to out. The new token is already appended.
    let (mut pages, mut row_starts, mut kv_lens) = (Vec::new(), Vec::new(), Vec::new());
    pool.fill_page_table(&sequences, &mut pages, &mut row_starts)?;
    pool.fill_lens(&sequences, &mut kv_lens)?;
    let page_table = PageTable { pages: &pages, rows: attn_plan::PageRows::Starts(&row_starts) };
    session.plan(&kv_lens, page_table)?;
    let q = wave(spec.q_elements(3), 0.023);
    let mut out = vec![0f32; q.len()];
    let mut lse = vec![0f32; spec.lse_elements(3)];
    session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), Some(&mut lse))?;
    println!("lse of request 0: {:.4?}", &lse[..8]);

    // The oracle, in f64, over what the cache holds: the difference is arithmetic, not quantization.
    let mut cache = kv_quant::CacheBuffers::zeroed(&layout)?;
    session.read_bytes(0, 0, &mut cache.as_mut_vecs()[0])?;
    let request = attn_plan::DecodeRequest { spec: &spec, kv_lens: &kv_lens, page_table };
    let truth = cpu_reference::oracle::decode_request(&layout, &cache.view(), &request, FloatSlice::F32(&q))?;
    let truth = truth.iter().flat_map(|request| &request.out);
    let worst = out.iter().zip(truth).map(|(&got, want)| (f64::from(got) - want).abs()).fold(0.0, f64::max);
    println!("worst difference from the oracle: {worst:.1e}");
    assert!(worst < 1e-5);
    Ok(())
}
