//! A look-up does not allocate. A counting allocator proves it.
#![allow(clippy::expect_used, clippy::panic, reason = "a test")]

mod common;

use attn_tune::{RunKey, Why};
use common::{PROFILE, key, shape, tuner};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system allocator as it came; counting touches no memory of the heap.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on; `alloc` is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One test in this program, so that nobody else allocates meanwhile.
#[test]
fn a_look_up_does_not_allocate() {
    let tuner = tuner(PROFILE);
    let lens: Vec<u32> = (0..256).map(|i| 1 + i * i).collect();
    let mut whys = [0; 3];
    let mut keys = vec![key("d64 k32 v32 bf16 gqa7 q1 records-paged throughput")];
    keys.extend(tuner.keys().copied());
    for key in keys {
        let chooser = tuner.chooser(key, shape());
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        for batch in 1..=lens.len() {
            let run = RunKey::of(lens.iter().take(batch).copied(), 8);
            let decision = std::hint::black_box(&chooser).choose(&run);
            let why = match decision.why {
                Why::Measured { .. } => 0,
                Why::Agreed { .. } => 1,
                _ => 2,
            };
            whys[why] += 1;
        }
        assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), before, "{key}");
    }
    // Each way of deciding was gone.
    assert!(whys.iter().all(|count| *count > 0), "{whys:?}");
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    drop(std::hint::black_box(vec![1u8]));
    assert!(ALLOCATIONS.load(Ordering::SeqCst) > before, "the allocator counts");
}
