//! How many blocks of stage 1 a multiprocessor is let hold at once, so that all get equally many.
//!
//! A launch that follows another finds multiprocessors as the one before leaves them. Where there is room for more blocks than
//! their share, the first to be free take too many, and the others end early: 256 blocks on 132 multiprocessors with room
//! for three took 71 us, with room for two 62 (32 x 2048 tokens on an H100, a block each).

/// Shared memory that the driver keeps for itself, of each block.
const RESERVED_BYTES: u32 = 1024;
/// Dynamic shared memory is asked for in multiples of this.
const UNIT_BYTES: u32 = 128;

/// Blocks that a multiprocessor should hold at most: one less than the `most` it can, where all of a launch find room so and some have to
/// share. One fewer of three or more streams as fast, one of two does not; several waves even out by themselves.
/// ```
/// use attn_kernels::residency::blocks_to_let_in;
/// assert_eq!(blocks_to_let_in(256, 132, 3), 2);
/// assert_eq!(blocks_to_let_in(392, 132, 3), 3);
/// assert_eq!(blocks_to_let_in(256, 132, 2), 2);
/// ```
#[must_use]
pub fn blocks_to_let_in(blocks: u64, num_sms: u32, most: u32) -> u32 {
    let room = |per_sm: u32| u64::from(per_sm) * u64::from(num_sms);
    if most >= 3 && (room(1) + 1..=room(most - 1)).contains(&blocks) { most - 1 } else { most }
}

/// Shared memory to ask for so that no more than `blocks` find room where a multiprocessor has `per_sm_bytes`; at least `needed`.
/// ```
/// use attn_kernels::residency::shared_bytes_for;
/// let bytes = shared_bytes_for(2, 67_168, 233_472);
/// assert!(3 * (bytes + 1024) > 233_472 && 2 * (bytes + 1024) <= 233_472);
/// ```
#[must_use]
pub fn shared_bytes_for(blocks: u32, needed: u32, per_sm_bytes: u32) -> u32 {
    let too_many = per_sm_bytes / (blocks + 1);
    needed.max((too_many.saturating_sub(RESERVED_BYTES) + 1).next_multiple_of(UNIT_BYTES))
}

/// Parts of a device's room for a kernel's blocks; with all but one of them in use it counts as full.
const ROOM_PARTS: u64 = 50;

/// Whether a launch needs nearly all of the `room` that there is for its blocks at once. A block of another kernel that sat down among them while
/// those of the launch before end would leave a gap in the register file that fits none: a slot less for the whole step.
/// ```
/// use attn_kernels::residency::fills;
/// assert!(fills(396, 396) && fills(392, 396));
/// assert!(!fills(384, 396), "slots enough without the gaps");
/// assert!(!fills(792, 396), "two waves");
/// ```
#[must_use]
pub fn fills(blocks: u64, room: u64) -> bool {
    blocks <= room && blocks * ROOM_PARTS > room * (ROOM_PARTS - 1)
}

/// Of the room for blocks, what a plan's workers should need at most, in percent.
const ENOUGH_PERCENT: u64 = 97;

/// Workers for a plan that would have `num_workers` of so many blocks each: fewer where these would fill the device.
/// ```
/// use attn_kernels::residency::workers_to_leave_room;
/// assert_eq!(workers_to_leave_room(49, 8, 396), 48);
/// assert_eq!(workers_to_leave_room(198, 2, 396), 192);
/// assert_eq!(workers_to_leave_room(33, 8, 396), 33);
/// ```
#[must_use]
pub fn workers_to_leave_room(num_workers: u32, blocks_per_worker: u32, room: u64) -> u32 {
    let blocks_per_worker = u64::from(blocks_per_worker.max(1));
    if !fills(u64::from(num_workers) * blocks_per_worker, room) {
        return num_workers;
    }
    let enough = room * ENOUGH_PERCENT / 100 / blocks_per_worker;
    u32::try_from(enough).map_or(num_workers, |enough| enough.clamp(1, num_workers.max(1)))
}

/// Blocks of a cluster from which on, and up to which, its placement is left to the device.
const BALANCED_CLUSTERS: core::ops::RangeInclusive<u32> = 4..=8;

/// Whether the device should place the blocks of clusters where most room is ([`LaunchShape::balances`]), rather than side by side on the
/// multiprocessors of one part of it: where there are about as many blocks as multiprocessors or more, and all find room at once. Placed
/// side by side behind a launch like them, they take two places each on half of the multiprocessors: 8 x 8192 tokens in clusters of four took
/// 71.7 us on an H100, balanced 59.5. Clusters of six and seven took the same both ways, to 2 %; fewer blocks lost a fifth by it, larger clusters 5 %.
///
/// [`LaunchShape::balances`]: crate::device::LaunchShape::balances
/// ```
/// use attn_kernels::residency::balances_clusters;
/// assert!(balances_clusters(4, 256, 132, 264) && balances_clusters(4, 128, 132, 264));
/// assert!(!balances_clusters(4, 64, 132, 264), "few blocks");
/// assert!(!balances_clusters(2, 128, 132, 264) && !balances_clusters(16, 128, 132, 264));
/// assert!(!balances_clusters(4, 512, 132, 264), "two waves");
/// ```
#[must_use]
pub fn balances_clusters(cluster: u32, blocks: u64, num_sms: u32, room: u64) -> bool {
    BALANCED_CLUSTERS.contains(&cluster) && 4 * blocks > 3 * u64::from(num_sms) && blocks <= room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_blocks_as_asked_for_find_room() {
        for per_sm in [102_400, 167_936, 233_472] {
            for blocks in 1..6 {
                let each = per_sm / (blocks + 1) - RESERVED_BYTES - 512;
                let bytes = shared_bytes_for(blocks, each, per_sm);
                assert!((blocks + 1) * (bytes + RESERVED_BYTES) > per_sm, "{blocks} of {per_sm}");
                assert!(blocks * (bytes + RESERVED_BYTES) <= per_sm, "{blocks} of {per_sm}");
            }
        }
        assert_eq!(shared_bytes_for(2, 90_000, 233_472), 90_000);
    }

    #[test]
    fn a_block_less_only_where_all_find_room() {
        let let_in = |blocks| blocks_to_let_in(blocks, 132, 3);
        assert_eq!([let_in(264), let_in(256), let_in(133)], [2, 2, 2]);
        // Three each; a block too many for two; one each; two waves.
        assert_eq!([let_in(396), let_in(265), let_in(132), let_in(512)], [3, 3, 3, 3]);
        assert_eq!([blocks_to_let_in(132 * 3, 132, 4), blocks_to_let_in(200, 132, 2)], [3, 2]);
    }
}
