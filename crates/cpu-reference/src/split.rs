//! How a step is cut on this machine: a small model of facts that are read once.
//!
//! Measured on two cores with 48 KiB of L1 (`docs/cpu-performance.md`): two workers a thread are 1 to 7 % faster than one,
//! since a thread then takes whole pages with all their heads and still leaves something to give away; four are 2 % slower.
//! Below four tiles a worker the step's fixed costs (waking a thread, packing q, merging) outweigh what is shared. A tile whose
//! rows of K and V fill more than five eighths of L1 is 2 % slower than half of it.

use attn_plan::{SplitConfig, SplitPolicy};
use kv_quant::{CacheFormat, Element, Side};
use std::sync::OnceLock;

/// The longest tile, for which the inner loops have room.
pub(crate) const TILE_LEN: u32 = 64;
/// The shortest: a vector of logits of one row.
const MIN_TILE_LEN: u32 = 16;

/// Workers of a plan for each thread.
const WORKERS_PER_THREAD: u32 = 2;
/// The fewest tiles worth a worker.
const MIN_SPLIT_TILES: u32 = 4;
/// Assumed where the operating system does not say: the least of today's CPUs.
const DEFAULT_L1_BYTES: u32 = 32 << 10;

/// What the split of a step follows from.
///
/// ```
/// use attn_plan::SplitPolicy;
/// use cpu_reference::Machine;
/// use kv_quant::{CacheFormat, ScaleType};
/// let machine = Machine { num_threads: 8, l1_bytes: 48 << 10 };
/// let split = |head_dim, policy| {
///     machine.split_config(&CacheFormat::new(8, head_dim, 32, 32, ScaleType::F16).unwrap(), policy)
/// };
/// assert_eq!(split(128, SplitPolicy::Throughput).num_workers, 16);
/// assert_eq!(split(128, SplitPolicy::Throughput).tile_len, 64);
/// // 64 tokens of K and V are 35 KB.
/// assert_eq!(split(256, SplitPolicy::Throughput).tile_len, 32);
/// // Splits are whole tiles.
/// assert_eq!(split(128, SplitPolicy::BatchInvariant { split_len: 96 }).tile_len, 32);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    /// Threads that share a step.
    pub num_threads: u32,
    /// Bytes of a core's first level of data cache.
    pub l1_bytes: u32,
}

impl Machine {
    /// This one: the threads of rayon's current pool, and the cache that the operating system names (Linux), else 32 KiB.
    pub fn here() -> Self {
        static L1_BYTES: OnceLock<u32> = OnceLock::new();
        let l1_bytes = *L1_BYTES.get_or_init(|| {
            let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index0/size");
            size.ok().and_then(|size| parse_size(&size)).unwrap_or(DEFAULT_L1_BYTES)
        });
        Self { num_threads: u32::try_from(rayon::current_num_threads()).unwrap_or(u32::MAX).max(1), l1_bytes }
    }

    /// How steps over a cache of `format` are cut. The tile, and with it the bits of a result, follows from the L1 cache, the
    /// format and the policy; under [`SplitPolicy::Throughput`] the cuts follow from the threads too.
    pub fn split_config(&self, format: &CacheFormat, policy: SplitPolicy) -> SplitConfig {
        let row_bytes = |side| match format.element() {
            Element::Int8 => {
                format.head_dim() as usize + format.num_groups(side) as usize * format.scale_type().bytes()
            }
            Element::Float(float_type) => format.head_dim() as usize * float_type.bytes(),
        };
        let token_bytes = (row_bytes(Side::K) + row_bytes(Side::V)) as u64;
        let room = u64::from(self.l1_bytes) * 5 / 8;
        let mut tile_len = TILE_LEN;
        while tile_len > MIN_TILE_LEN && u64::from(tile_len) * token_bytes > room {
            tile_len /= 2;
        }
        if let SplitPolicy::BatchInvariant { split_len } = policy {
            tile_len = tile_len.min(1 << split_len.trailing_zeros().min(6));
        }
        SplitConfig {
            tile_len,
            min_split_tiles: MIN_SPLIT_TILES * TILE_LEN / tile_len,
            ..SplitConfig::throughput(self.num_threads.max(1).saturating_mul(WORKERS_PER_THREAD).min(1 << 20))
                .with_policy(policy)
        }
    }
}

/// The tile that a plan is run by.
pub(crate) fn tile_len(plan: &attn_plan::SplitPlan) -> u32 {
    plan.config().map_or(TILE_LEN, |config| config.tile_len.clamp(MIN_TILE_LEN, TILE_LEN))
}

/// "48K" and "1M" as Linux writes them; `None` for what cannot be a cache.
fn parse_size(size: &str) -> Option<u32> {
    let size = size.trim();
    let (digits, unit) = match size.strip_suffix('K') {
        Some(digits) => (digits, 1 << 10),
        None => (size.strip_suffix('M')?, 1 << 20),
    };
    digits.parse::<u32>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_quant::{FloatType, ScaleType};

    #[test]
    fn sizes_of_caches() {
        assert_eq!(parse_size("48K\n"), Some(48 << 10));
        assert_eq!(parse_size("2M"), Some(2 << 20));
        for other in ["", "K", "0K", "48", "-1K", "99999999M"] {
            assert_eq!(parse_size(other), None, "{other:?}");
        }
        let machine = Machine::here();
        assert!(machine.num_threads > 0 && machine.l1_bytes >= 1 << 10, "{machine:?}");
    }

    #[test]
    fn tiles_shrink_until_they_fit_and_no_further() {
        let format = |head_dim| CacheFormat::new(1, head_dim, 32, 32, ScaleType::F16).unwrap();
        // K and V of 128 channels take 272 bytes a token, 17408 a tile of 64: five eighths of 27853.
        for (l1_bytes, tile_len) in [(27_856, 64), (27_848, 32), (13_928, 32), (13_920, 16), (1, 16)] {
            let machine = Machine { num_threads: 1, l1_bytes };
            let split = machine.split_config(&format(128), SplitPolicy::Throughput);
            assert_eq!(
                (split.tile_len, split.min_split_tiles * split.tile_len),
                (tile_len, 256),
                "{l1_bytes}"
            );
            assert_eq!(split.check(), Ok(()));
        }
        let machine = Machine { num_threads: 1, l1_bytes: 48 << 10 };
        let unquantized = CacheFormat::unquantized(1, 128, FloatType::F32).unwrap();
        assert_eq!(machine.split_config(&unquantized, SplitPolicy::Throughput).tile_len, 16);
    }

    #[test]
    fn every_policy_and_count_of_threads_gives_a_split_that_a_plan_can_follow() {
        let format = CacheFormat::new(1, 64, 64, 64, ScaleType::F16).unwrap();
        for num_threads in [0, 1, 7, 1 << 19, u32::MAX] {
            for split_len in [1, 24, 64, 96, 4096] {
                let machine = Machine { num_threads, l1_bytes: 32 << 10 };
                let split = machine.split_config(&format, SplitPolicy::BatchInvariant { split_len });
                assert_eq!(split.check(), Ok(()), "{num_threads} threads, splits of {split_len}");
            }
        }
    }
}
