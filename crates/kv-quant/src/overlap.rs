//! Proof that no two elements of a layout share a byte.

use crate::{CacheLayout, Error, PlaneId};

/// A set of bytes: `extent` contiguous ones at every combination of the strides, from `start` on.
struct Footprint {
    start: u128,
    extent: u128,
    /// (count, stride in bytes), largest stride first.
    axes: [(u128, u128); 3],
}

impl Footprint {
    fn new(layout: &CacheLayout, id: PlaneId) -> Self {
        let (plane, bytes) = (layout.plane(id), u128::from(layout.element_bytes(id)));
        let mut axes = [
            (u128::from(layout.num_pages()), u128::from(plane.page_stride) * bytes),
            (u128::from(layout.page_len()), u128::from(plane.slot_stride) * bytes),
            (u128::from(layout.format().num_kv_heads()), u128::from(plane.head_stride) * bytes),
        ];
        for axis in &mut axes {
            if axis.0 == 1 {
                axis.1 = 0; // the stride of an axis of one is never used
            }
        }
        axes.sort_by_key(|&(_, stride)| std::cmp::Reverse(stride));
        Self { start: u128::from(plane.offset) * bytes, extent: u128::from(layout.row_len(id)) * bytes, axes }
    }

    /// One past the last byte, counted from `start`.
    fn span(&self) -> u128 {
        self.axes.iter().map(|(count, stride)| (count - 1) * stride).sum::<u128>() + self.extent
    }

    /// Whether each axis steps over everything inside it, so that rows are disjoint.
    fn is_nested(&self) -> bool {
        let mut inner = self.extent;
        for &(count, stride) in self.axes.iter().rev() {
            if count > 1 {
                if stride < inner {
                    return false;
                }
                inner += (count - 1) * stride;
            }
        }
        true
    }
}

/// Whether two nested footprints are disjoint. Exact where both step alike (the layouts people use); where they step
/// differently only a separation of the whole spans is accepted.
fn are_disjoint(a: &Footprint, b: &Footprint) -> bool {
    let (first, second) = if a.start <= b.start { (a, b) } else { (b, a) };
    let distance = second.start - first.start;
    if distance >= first.span() {
        return true;
    }
    let same_steps = first.axes.iter().zip(&second.axes).all(|(x, y)| x == y);
    if !same_steps {
        return false;
    }
    // Peel axes from the largest stride: within one step of it, either both fit side by side or a smaller axis decides.
    let mut distance = distance;
    for depth in 0..first.axes.len() {
        let inner = |f: &Footprint| -> u128 {
            f.axes.iter().skip(depth + 1).map(|(count, stride)| (count - 1) * stride).sum::<u128>() + f.extent
        };
        let Some(&(count, stride)) = first.axes.get(depth) else { return false };
        if count <= 1 || stride == 0 {
            continue;
        }
        if distance / stride >= count {
            return true;
        }
        distance %= stride;
        if distance >= inner(first) && distance + inner(second) <= stride {
            return true;
        }
        if distance + inner(second) > stride {
            return false;
        }
    }
    distance >= first.extent
}

/// Refuses a layout in which two elements share bytes (or may, where strides are too odd to tell).
pub(crate) fn check(layout: &CacheLayout) -> Result<(), Error> {
    // An unquantized cache has no scales, and what has no bytes cannot overlap.
    let planes = PlaneId::ALL.into_iter().filter(|id| layout.row_len(*id) > 0);
    let footprints: Vec<_> =
        planes.map(|id| (id, layout.plane(id).buffer_idx, Footprint::new(layout, id))).collect();
    for (i, (id, buffer_idx, footprint)) in footprints.iter().enumerate() {
        if !footprint.is_nested() {
            return Err(Error::Overlap { first: *id, second: *id, buffer_idx: *buffer_idx });
        }
        for (other_id, other_buffer, other) in footprints.iter().skip(i + 1) {
            if buffer_idx == other_buffer && !are_disjoint(footprint, other) {
                return Err(Error::Overlap { first: *id, second: *other_id, buffer_idx: *buffer_idx });
            }
        }
    }
    Ok(())
}
