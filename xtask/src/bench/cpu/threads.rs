//! Pools whose threads stay on a core each.
//!
//! Two threads that wake up on one core while the other looks busy may stay there for as long as a case takes: each runs for less
//! than the half millisecond after which Linux would move it. Five of fifteen cases in three runs were like that.

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// `threads` threads, the first on the first core that this process may use, and so on; more threads than cores go round.
pub fn pool(threads: usize) -> Result<ThreadPool, ThreadPoolBuildError> {
    ThreadPoolBuilder::new().num_threads(threads).start_handler(stay).build()
}

/// Left where it is if the operating system says no: the bench is then less steady, not wrong.
#[cfg(target_os = "linux")]
fn stay(thread: usize) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
    if let Some(&core) = cores.get(thread % cores.len().max(1)) {
        let mut only = CpuSet::new();
        only.set(core);
        let _ = sched_setaffinity(None, &only);
    }
}

#[cfg(not(target_os = "linux"))]
fn stay(_: usize) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::thread::sched_getaffinity;

    #[test]
    fn threads_stay_on_different_cores() {
        let allowed = sched_getaffinity(None).unwrap().count();
        let threads = 2.min(allowed as usize);
        let pool = super::pool(threads).unwrap();
        let mut sets = pool.broadcast(|_| {
            let set = sched_getaffinity(None).unwrap();
            (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect::<Vec<_>>()
        });
        assert!(sets.iter().all(|cores| cores.len() == 1), "{sets:?}");
        sets.sort();
        sets.dedup();
        assert_eq!(sets.len(), threads);
    }
}
