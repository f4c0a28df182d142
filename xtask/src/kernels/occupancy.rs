//! How many blocks of a kernel one multiprocessor holds, by the limits of the CUDA programming guide (table
//! "Technical Specifications per Compute Capability").

/// Limits of one multiprocessor.
#[derive(Clone, Copy, Debug)]
struct Limits {
    threads: u32,
    blocks: u32,
    shared_bytes: u32,
}

const REGISTERS: u32 = 65_536;
/// Registers are handed to a warp in units of this many.
const REGISTER_UNIT: u32 = 256;
const SHARED_UNIT: u32 = 128;
/// What the system keeps of each block's shared memory.
const SHARED_RESERVED: u32 = 1024;

fn limits(arch: &str) -> Option<Limits> {
    let digits = arch.strip_prefix("sm_")?.trim_end_matches(['a', 'f']);
    let limits =
        |threads, blocks, shared_kib: u32| Limits { threads, blocks, shared_bytes: shared_kib * 1024 };
    Some(match digits.parse().ok()? {
        80 => limits(2048, 32, 164),
        86 => limits(1536, 16, 100),
        87 => limits(1536, 16, 164),
        89 => limits(1536, 24, 100),
        90 | 100 | 103 => limits(2048, 32, 228),
        110 => limits(1536, 24, 228),
        120 | 121 => limits(1536, 24, 100),
        _ => return None,
    })
}

/// Blocks at once on one multiprocessor; `None` for an architecture whose limits are not known here.
pub fn blocks_per_sm(arch: &str, registers: u32, block_threads: u32, shared_bytes: u32) -> Option<u32> {
    let limits = limits(arch)?;
    let warps = block_threads.div_ceil(32).max(1);
    let warp_registers = (registers * 32).next_multiple_of(REGISTER_UNIT).max(REGISTER_UNIT);
    let by_registers = REGISTERS / warp_registers / warps;
    let by_threads = limits.threads / (warps * 32);
    let by_shared = limits.shared_bytes / (shared_bytes + SHARED_RESERVED).next_multiple_of(SHARED_UNIT);
    Some(by_registers.min(by_threads).min(by_shared).min(limits.blocks))
}

#[cfg(test)]
mod tests {
    use super::blocks_per_sm;

    #[test]
    fn each_limit_binds_in_turn() {
        assert_eq!(blocks_per_sm("sm_90a", 32, 128, 0), Some(16), "threads");
        assert_eq!(blocks_per_sm("sm_90a", 128, 128, 0), Some(4), "registers");
        assert_eq!(blocks_per_sm("sm_90a", 32, 128, 99 * 1024), Some(2), "shared memory");
        assert_eq!(blocks_per_sm("sm_80", 16, 32, 0), Some(32), "blocks");
        assert_eq!(blocks_per_sm("sm_89", 32, 128, 99 * 1024), Some(1), "shared memory");
        assert_eq!(blocks_per_sm("sm_89", 32, 128, 100 * 1024), Some(0), "too much");
        assert_eq!(blocks_per_sm("sm_42", 32, 128, 0), None);
    }
}
