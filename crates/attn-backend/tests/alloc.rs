//! After warm-up, append, plan, decode and page copies do not allocate. A counting allocator proves it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a failure is the point")]

use attn_backend::{Descriptor, Registry, SelectOptions, normal_decode};
use attn_plan::{DecodeSpec, PageTable};
use kv_quant::{CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, PageCopy, ScaleType};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system allocator as it came; counting touches no memory of the heap.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on; `alloc` and `realloc` are the system's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations() -> usize {
    ALLOCATIONS.load(Ordering::SeqCst)
}

/// One test in this program, so that nobody else allocates meanwhile.
#[test]
fn steps_do_not_allocate_after_warm_up() {
    // In a pool of rayon's: from outside, handing a job over may add a block to the pool's own queue now and then.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(steps);
}

fn steps() {
    const BATCH: usize = 5;
    let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16).unwrap();
    let spec = DecodeSpec {
        q_type: FloatType::F16,
        out_type: FloatType::F16,
        window: Some(300),
        alibi_slopes: Some(vec![0.01; 6]),
        sinks: Some(vec![0.1; 6]),
        want_lse: true,
        ..DecodeSpec::new(6, 2, 64)
    };
    let descriptor = Descriptor::new(CacheLayout::native(format, 300, 16).unwrap(), spec);
    let options = SelectOptions { read_environment: false, ..SelectOptions::default() };
    let (mut session, _) = normal_decode::open(&Registry::builtin(), &descriptor, &options).unwrap();
    session
        .set_split(attn_backend::cpu_split_config(descriptor.layout.format(), 4, descriptor.split))
        .unwrap();

    let pages: Vec<i32> = (0..BATCH as i32 * 50).collect();
    let k = vec![half::f16::from_f32(0.5); BATCH * 2 * 64];
    let q = vec![half::f16::from_f32(0.25); BATCH * 6 * 64];
    let (mut out, mut lse) = (vec![half::f16::NAN; BATCH * 6 * 64], vec![f32::NAN; BATCH * 6]);
    let mut kv_lens = [0u32; BATCH];
    let mut slots = [0i64; BATCH];
    let mut step = |t: u32| {
        for (request, (kv_len, slot)) in kv_lens.iter_mut().zip(&mut slots).enumerate() {
            *kv_len = t + 1 + 100 * request as u32;
            *slot = i64::from(request as u32 * 50 * 16 + *kv_len - 1);
        }
        let start = allocations();
        session.append(FloatSlice::F16(&k), FloatSlice::F16(&k), &slots).unwrap();
        let appended = allocations();
        session.plan(&kv_lens, PageTable::padded(&pages, 50)).unwrap();
        let planned = allocations();
        session.decode(FloatSlice::F16(&q), FloatSliceMut::F16(&mut out), Some(&mut lse)).unwrap();
        let decoded = allocations();
        session.copy_pages(&[PageCopy { src: 3, dst: 299 }]).unwrap();
        [appended - start, planned - appended, decoded - planned, allocations() - decoded]
    };
    // Warm-up with the largest step, as an engine would.
    for t in [399, 350, 399] {
        step(t);
    }
    let mut total = [0; 4];
    for t in 0..400 {
        for (total, count) in total.iter_mut().zip(step(t)) {
            *total += count;
        }
    }
    let [append, plan, decode, copy_pages] = total;
    println!(
        "allocations in 400 steps: append {append}, plan {plan}, decode {decode}, copy_pages {copy_pages}"
    );
    assert_eq!(total, [0; 4]);
}
