//! What nobody may read: dead slots, padding, page table entries past the end of a row.

use crate::numbers::Numbers;
use kv_quant::{CacheBuffers, CacheLayout, PlaneId, ScaleType};

/// What dead memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Codes -128, scales NaN, padding 0xff: whatever leaks shows.
    Poison,
    /// Zeros: the bits of every result must be the same as with poison.
    Zeros,
}

/// A cache with nothing alive in it.
pub fn dead_cache(layout: &CacheLayout, fill: Fill) -> CacheBuffers {
    let mut cache = CacheBuffers::zeroed(layout).expect("test caches are small");
    if fill == Fill::Zeros {
        return cache;
    }
    cache.as_mut_vecs().iter_mut().for_each(|buffer| buffer.fill(0xff));
    for slot in 0..layout.num_slots() {
        kill_slot(layout, &mut cache, slot);
    }
    cache
}

/// Poisons one slot of a cache.
pub fn kill_slot(layout: &CacheLayout, cache: &mut CacheBuffers, slot: u64) {
    let nan: &[u8] = match layout.format().scale_type() {
        ScaleType::F16 => &[0x01, 0x7e],
        ScaleType::Bf16 => &[0xc1, 0x7f],
        ScaleType::F32 => &[0x01, 0x00, 0xc0, 0x7f],
    };
    for id in PlaneId::ALL {
        for head in 0..layout.format().num_kv_heads() {
            let (buffer_idx, range) = layout.row_bytes(id, slot, head);
            let row = &mut cache.as_mut_vecs()[buffer_idx][range.start as usize..range.end as usize];
            match id {
                PlaneId::Codes(_) => row.fill(0x80),
                PlaneId::Scales(_) => row.chunks_exact_mut(nan.len()).for_each(|x| x.copy_from_slice(nan)),
            }
        }
    }
}

/// A page index that no cache has.
pub fn wild_page(numbers: &mut Numbers, num_pages: u64) -> i32 {
    let choices = [-1, i32::MIN, i32::MAX, num_pages as i32, i32::MAX / 2, -2, 0x5555_5555];
    numbers.pick(&choices)
}
