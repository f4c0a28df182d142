//! A step and an append allocate nothing once warm.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use cpu_reference::Workspace;
use cpu_reference::case::CaseConfig;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Makes every thread of the pool take work from another's queue: the first time costs an allocation a thread.
fn wake_all() {
    let threads = rayon::current_num_threads();
    let all = Barrier::new(threads);
    rayon::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|_| {
                all.wait();
            });
        }
    });
}

#[test]
fn a_warm_step_allocates_nothing() {
    wake_all();
    // head_dim 72 needs padded copies.
    let cases = [64, 72].map(|head_dim| {
        let config = CaseConfig { kv_lens: vec![300, 0, 70], head_dim, ..CaseConfig::default() };
        CaseConfig { k_group_len: 8, v_group_len: 8, ..config }.build().unwrap()
    });
    let mut workspace = Workspace::new();
    for mut case in cases {
        let (mut out, mut lse) = (case.empty_out(), case.empty_lse());
        let slots = case.slots(0, 5);
        let x = vec![1f32; 5 * 2 * case.spec.head_dim as usize];
        let mut step = || {
            for _ in 0..50 {
                let x = kv_quant::FloatSlice::F32(&x);
                let layout = case.layout.clone();
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                cpu_reference::append(&layout, &mut case.cache.view_mut(), x, x, &slots).unwrap();
                let (q, out) = (case.q.as_slice(), out.as_mut_slice());
                let (view, lse) = (case.cache.view(), Some(lse.as_mut_slice()));
                cpu_reference::decode(
                    &layout,
                    view,
                    &case.request(),
                    &case.plan,
                    q,
                    out,
                    lse,
                    &mut workspace,
                )
                .unwrap();
                let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
                SEEN.fetch_max(allocated * usize::from(WARM.load(Ordering::Relaxed) > 0), Ordering::Relaxed);
            }
        };
        static SEEN: AtomicUsize = AtomicUsize::new(0);
        static WARM: AtomicUsize = AtomicUsize::new(0);
        // Inside the pool: a call from outside it costs rayon one block of its queue every 63 calls.
        rayon::scope(|_| step());
        WARM.store(1, Ordering::Relaxed);
        rayon::scope(|_| step());
        WARM.store(0, Ordering::Relaxed);
        assert_eq!(SEEN.load(Ordering::Relaxed), 0);
    }
}
