//! Writing new K and V rows to their slots.

use crate::{
    CacheLayout, CacheViewMut, Element, Error, FloatSlice, MAX_HEAD_DIM, PlaneId, Side, StoredScale,
    quantize_value, round_scale_up,
};

/// Batches up to this long are searched for double slots without allocating.
const SLOTS_ON_STACK: usize = 512;
/// The most groups of a row.
const MAX_GROUPS: usize = MAX_HEAD_DIM as usize / 8;

/// Widened input and rounded scales of one token-head, on the stack: appending allocates nothing.
struct Row {
    values: [f32; MAX_HEAD_DIM as usize],
    scales: [StoredScale; MAX_GROUPS],
    head_dim: usize,
    num_groups: usize,
}

impl Row {
    fn new(layout: &CacheLayout) -> Self {
        Self {
            values: [0.0; MAX_HEAD_DIM as usize],
            scales: [StoredScale { value: 0.0, bits: 0 }; MAX_GROUPS],
            head_dim: layout.format().head_dim() as usize,
            num_groups: 0,
        }
    }

    fn values(&self) -> &[f32] {
        self.values.get(..self.head_dim).unwrap_or_default()
    }

    fn scales(&self) -> &[StoredScale] {
        self.scales.get(..self.num_groups).unwrap_or_default()
    }

    /// Loads one token-head and rounds its scales; nothing is written yet.
    fn load(
        &mut self,
        layout: &CacheLayout,
        side: Side,
        x: &FloatSlice<'_>,
        token: usize,
        head: u32,
    ) -> Result<(), Error> {
        let format = layout.format();
        let values = self.values.get_mut(..self.head_dim).unwrap_or_default();
        x.widen(token * format.row_elements() + head as usize * self.head_dim, values);
        self.num_groups = format.num_groups(side) as usize;
        if let Element::Float(float_type) = format.element() {
            return crate::element::check_floats(values, float_type, side, token, head);
        }
        let group_len = format.group_len(side) as usize;
        for (group_idx, (group, scale)) in values.chunks_exact(group_len).zip(&mut self.scales).enumerate() {
            // NaN loses every comparison of max, so it is looked for apart.
            let amax = group.iter().fold(0f32, |amax, x| amax.max(x.abs()));
            if let Some(i) = group.iter().position(|x| !x.is_finite()) {
                let channel = (group_idx * group_len + i) as u32;
                return Err(Error::NonFinite { side, token, head, channel });
            }
            let scale_type = format.scale_type();
            *scale = round_scale_up(amax, scale_type).ok_or(Error::ScaleOverflow {
                side,
                token,
                head,
                channel: (group_idx * group_len) as u32,
                scale: amax / 127.0,
                scale_type,
            })?;
        }
        Ok(())
    }

    fn store(&self, layout: &CacheLayout, side: Side, codes: &mut [u8], scales: &mut [u8]) {
        if let Element::Float(float_type) = layout.format().element() {
            return crate::element::write_floats(self.values(), float_type, codes);
        }
        let group_len = layout.format().group_len(side) as usize;
        let scale_type = layout.format().scale_type();
        let groups = self.values().chunks_exact(group_len).zip(codes.chunks_exact_mut(group_len));
        for ((values, codes), scale) in groups.zip(self.scales()) {
            for (code, &x) in codes.iter_mut().zip(values) {
                *code = quantize_value(x, scale.value) as u8;
            }
        }
        for (bytes, scale) in scales.chunks_exact_mut(scale_type.bytes()).zip(self.scales()) {
            scale.write(scale_type, bytes);
        }
    }
}

/// Checks everything that [`append()`] would refuse, and writes nothing.
///
/// `k` and `v` are `[slots.len(), num_kv_heads, head_dim]`. Rows whose slot is -1 are not looked at.
pub fn check_append(
    layout: &CacheLayout,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), Error> {
    check_lens(layout, k, v, slots.len())?;
    check_slots(layout, slots)?;
    check_data(layout, k, v, slots)
}

pub(crate) fn check_lens(
    layout: &CacheLayout,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    num_tokens: usize,
) -> Result<(), Error> {
    let want = num_tokens.saturating_mul(layout.format().row_elements());
    for (what, got) in [("k", k.len()), ("v", v.len())] {
        if got != want {
            return Err(Error::Len { what, got, want });
        }
    }
    if k.float_type() != v.float_type() {
        return Err(Error::MixedTypes { k: k.float_type(), v: v.float_type() });
    }
    Ok(())
}

/// The rows alone: finite values, scales within their type.
pub(crate) fn check_data(
    layout: &CacheLayout,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), Error> {
    let mut scratch = Row::new(layout);
    for (token, _) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        for head in 0..layout.format().num_kv_heads() {
            scratch.load(layout, Side::K, &k, token, head)?;
            scratch.load(layout, Side::V, &v, token, head)?;
        }
    }
    Ok(())
}

fn check_slots(layout: &CacheLayout, slots: &[i64]) -> Result<(), Error> {
    let num_slots = layout.num_slots();
    for (token, &slot) in slots.iter().enumerate() {
        if slot < -1 || slot >= num_slots as i64 {
            return Err(Error::SlotOutOfRange { token, slot, num_slots });
        }
    }
    // Ascending slots, the ordinary case, need no search.
    let mut last = -1;
    let ascending =
        slots.iter().filter(|slot| **slot >= 0).all(|&slot| std::mem::replace(&mut last, slot) < slot);
    if ascending {
        return Ok(());
    }
    let mut on_stack = [0i64; SLOTS_ON_STACK];
    let mut on_heap = Vec::new();
    let sorted = match on_stack.get_mut(..slots.len()) {
        Some(sorted) => sorted,
        None => {
            on_heap.resize(slots.len(), 0);
            on_heap.as_mut_slice()
        }
    };
    sorted.copy_from_slice(slots);
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        if let [slot, other] = *pair
            && slot == other
            && slot >= 0
        {
            let mut tokens = slots.iter().enumerate().filter(|(_, s)| **s == slot).map(|(token, _)| token);
            let (first, second) = (tokens.next().unwrap_or(0), tokens.next().unwrap_or(0));
            return Err(Error::SlotTwice { slot, first, second });
        }
    }
    Ok(())
}

/// Quantizes one row into `codes` (`head_dim` elements) and `scales`. `token` and `head` place the input row.
///
/// # Errors
/// [`Error::NonFinite`] or [`Error::ScaleOverflow`], with nothing written.
pub fn append_row(
    layout: &CacheLayout,
    side: Side,
    x: FloatSlice<'_>,
    token: usize,
    head: u32,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), Error> {
    let mut row = Row::new(layout);
    row.load(layout, side, &x, token, head)?;
    row.store(layout, side, codes, scales);
    Ok(())
}

/// Quantizes `k` and `v`, `[slots.len(), num_kv_heads, head_dim]`, and writes token `i` to slot `slots[i]`; -1 skips.
///
/// # Errors
/// Wrong lengths, slots out of range or named twice, non-finite input, a scale beyond its type. On any error nothing
/// is written.
pub fn append(
    layout: &CacheLayout,
    cache: &mut CacheViewMut<'_>,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), Error> {
    check_append(layout, k, v, slots)?;
    write_rows(layout, cache, k, v, slots)
}

/// [`append()`] of rows that were checked.
pub(crate) fn write_rows(
    layout: &CacheLayout,
    cache: &mut CacheViewMut<'_>,
    k: FloatSlice<'_>,
    v: FloatSlice<'_>,
    slots: &[i64],
) -> Result<(), Error> {
    cache.as_view().check(layout)?;
    let mut row = Row::new(layout);
    let mut codes = [0u8; MAX_HEAD_DIM as usize * 4];
    let mut scales = [0u8; MAX_GROUPS * 4];
    let codes = codes.get_mut(..row.head_dim * layout.format().element().bytes()).unwrap_or_default();
    for (token, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        for head in 0..layout.format().num_kv_heads() {
            for (side, x) in [(Side::K, &k), (Side::V, &v)] {
                row.load(layout, side, x, token, head)?;
                let (code_buffer, code_range) = layout.row_bytes(PlaneId::Codes(side), slot as u64, head);
                let (scale_buffer, scale_range) = layout.row_bytes(PlaneId::Scales(side), slot as u64, head);
                let scale_bytes = (scale_range.end - scale_range.start) as usize;
                let Some(scales) = scales.get_mut(..scale_bytes) else { continue };
                row.store(layout, side, codes, scales);
                cache.bytes_mut(code_buffer, code_range).copy_from_slice(codes);
                cache.bytes_mut(scale_buffer, scale_range).copy_from_slice(scales);
            }
        }
    }
    Ok(())
}
