//! Lesson 5: many sequences with one beginning. A fork shares pages; the first write into a shared page copies it.
//!
//! `cargo run -p attn-examples --example 05_share_a_prefix`
#![allow(clippy::print_stdout, reason = "a lesson prints")]

use attn_backend::{Descriptor, Registry, SelectOptions, normal_decode};
use attn_plan::{DecodeSpec, PageRows, PageTable};
use kv_quant::{
    AppendSlots, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, PagePool, ScaleType,
};

fn main() -> anyhow::Result<()> {
    let spec = DecodeSpec { q_type: FloatType::F32, out_type: FloatType::F32, ..DecodeSpec::new(4, 2, 64) };
    let format = CacheFormat::new(spec.num_kv_heads, spec.head_dim, 64, 64, ScaleType::F16)?;
    let layout = CacheLayout::native(format, 32, 16)?;
    let descriptor = Descriptor::new(layout.clone(), spec.clone());
    let (mut session, _) = normal_decode::open(&Registry::builtin(), &descriptor, &SelectOptions::default())?;
    let row = (spec.num_kv_heads * spec.head_dim) as usize;
    let tokens =
        |count: usize, step: f32| -> Vec<f32> { (0..count * row).map(|i| (i as f32 * step).cos()).collect() };

    // A prompt of 100 tokens: 7 pages, the last with room for 12 more.
    let mut pool = PagePool::for_layout(&layout);
    let mut append = AppendSlots::default();
    let prompt = pool.allocate();
    pool.append(prompt, 100, &mut append)?;
    let k = tokens(100, 0.01);
    session.append(FloatSlice::F32(&k), FloatSlice::F32(&k), append.slots())?;
    let one = pool.bytes_used();

    // Three answers to it. Nothing is copied yet: the pages have more owners, that is all.
    let answers = [pool.fork(prompt, 100)?, pool.fork(prompt, 100)?, pool.fork(prompt, 100)?];
    assert_eq!(pool.bytes_used(), one);

    // Each gets a first token of its own. The pool says which pages to copy first, and where the tokens go.
    let batch = answers.map(|answer| (answer, 1));
    pool.append_batch(&batch, &mut append)?;
    println!("pages to copy before the write: {:?}", append.copies());
    println!("slots of the new tokens: {:?}", append.slots());
    session.copy_pages(append.copies())?;
    let k = tokens(3, 0.7);
    session.append(FloatSlice::F32(&k), FloatSlice::F32(&k), append.slots())?;
    println!("4 sequences of about 100 tokens in {} bytes; one alone took {one}", pool.bytes_used());
    assert!(pool.bytes_used() < 2 * one);

    // Decode all three, and the prompt itself, in one batch.
    let all = [prompt, answers[0], answers[1], answers[2]];
    let (mut pages, mut row_starts, mut kv_lens) = (Vec::new(), Vec::new(), Vec::new());
    pool.fill_page_table(&all, &mut pages, &mut row_starts)?;
    pool.fill_lens(&all, &mut kv_lens)?;
    session.plan(&kv_lens, PageTable { pages: &pages, rows: PageRows::Starts(&row_starts) })?;
    let q = vec![0.3f32; spec.q_elements(all.len())];
    let mut out = vec![0f32; q.len()];
    session.decode(FloatSlice::F32(&q), FloatSliceMut::F32(&mut out), None)?;
    for (request, out) in out.chunks(spec.q_elements(1)).enumerate() {
        println!("request {request}, {} tokens: {:.4?} ...", kv_lens[request], &out[..4]);
    }

    // Pages go back when their last owner does.
    for sequence in all {
        pool.free(sequence)?;
    }
    assert_eq!(pool.bytes_used(), 0);
    Ok(())
}
