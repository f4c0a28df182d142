//! What the machine can do, measured: the yardstick of every CPU figure.

use rayon::prelude::*;
use std::time::Instant;

/// Bytes that [`read_bandwidth`] streams, beyond most caches.
pub const READ_BYTES: usize = 256 << 20;

/// Read-only bandwidth in bytes a second: the best of `repeats` passes over [`READ_BYTES`] on the threads of rayon's
/// current pool. Each thread sums a stretch of its own.
///
/// ```no_run
/// let gb_per_s = cpu_reference::measure::read_bandwidth(10) / 1e9;
/// ```
pub fn read_bandwidth(repeats: usize) -> f64 {
    let words = vec![1u64; READ_BYTES / size_of::<u64>()];
    read_bandwidth_of(bytemuck::cast_slice(&words), repeats)
}

/// [`read_bandwidth`] over memory of the caller's, which has been written before: what a cache in the same kind of memory is to be
/// compared with.
pub fn read_bandwidth_of(bytes: &[u8], repeats: usize) -> f64 {
    let (_, words, _) = bytemuck::pod_align_to::<u8, u64>(bytes);
    let stretch = words.len().div_ceil(rayon::current_num_threads()).max(1);
    let best = (0..repeats).map(|_| {
        let start = Instant::now();
        let sum: u64 = words.par_chunks(stretch).map(sum).sum();
        std::hint::black_box(sum);
        start.elapsed().as_secs_f64()
    });
    size_of_val(words) as f64 / best.fold(f64::INFINITY, f64::min)
}

/// Eight running sums, so that additions keep up with loads.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    for chunk in words.chunks_exact(16) {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}
