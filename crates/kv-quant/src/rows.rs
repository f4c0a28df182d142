//! Reading rows back: codes in place, scales decoded, or dequantized values.

use crate::{CacheLayout, CacheView, Element, Error, PlaneId, Side};

fn check_row(layout: &CacheLayout, cache: &CacheView<'_>, slot: u64, head: u32) -> Result<(), Error> {
    cache.check(layout)?;
    let num_slots = layout.num_slots();
    if slot >= num_slots {
        return Err(Error::SlotOutOfRange { token: 0, slot: slot as i64, num_slots });
    }
    let num_kv_heads = layout.format().num_kv_heads();
    if head >= num_kv_heads {
        return Err(Error::HeadOutOfRange { head, num_kv_heads });
    }
    Ok(())
}

/// The codes of one row, in place.
pub fn read_codes<'a>(
    layout: &CacheLayout,
    cache: &CacheView<'a>,
    side: Side,
    slot: u64,
    head: u32,
) -> Result<&'a [i8], Error> {
    check_row(layout, cache, slot, head)?;
    if layout.format().element() != Element::Int8 {
        return Err(Error::NoCodes(layout.format().element()));
    }
    let (buffer_idx, range) = layout.row_bytes(PlaneId::Codes(side), slot, head);
    Ok(bytemuck::cast_slice(cache.bytes(buffer_idx, range)))
}

/// The scales of one row, decoded into `scales` (`head_dim / group_len` of them).
pub fn read_scales(
    layout: &CacheLayout,
    cache: &CacheView<'_>,
    side: Side,
    slot: u64,
    head: u32,
    scales: &mut [f32],
) -> Result<(), Error> {
    check_row(layout, cache, slot, head)?;
    let scale_type = layout.format().scale_type();
    let want = layout.format().num_groups(side) as usize;
    if scales.len() != want {
        return Err(Error::Len { what: "scales", got: scales.len(), want });
    }
    let (buffer_idx, range) = layout.row_bytes(PlaneId::Scales(side), slot, head);
    for (scale, bytes) in
        scales.iter_mut().zip(cache.bytes(buffer_idx, range).chunks_exact(scale_type.bytes()))
    {
        *scale = scale_type.read(bytes).unwrap_or(f32::NAN);
    }
    Ok(())
}

/// Dequantizes one row into `out` (`head_dim` values): `code * scale`, rounded once to f32 (exact for f16 and bf16
/// scales). A row of an unquantized cache is widened, exactly.
pub fn dequantize_row(
    layout: &CacheLayout,
    cache: &CacheView<'_>,
    side: Side,
    slot: u64,
    head: u32,
    out: &mut [f32],
) -> Result<(), Error> {
    let want = layout.format().head_dim() as usize;
    if out.len() != want {
        return Err(Error::Len { what: "out", got: out.len(), want });
    }
    if let Element::Float(float_type) = layout.format().element() {
        check_row(layout, cache, slot, head)?;
        let (buffer_idx, range) = layout.row_bytes(PlaneId::Codes(side), slot, head);
        crate::element::read_floats(cache.bytes(buffer_idx, range), float_type, out);
        return Ok(());
    }
    let mut scales = vec![0f32; layout.format().num_groups(side) as usize];
    read_scales(layout, cache, side, slot, head, &mut scales)?;
    let codes = read_codes(layout, cache, side, slot, head)?;
    let group_len = layout.format().group_len(side) as usize;
    let groups = out.chunks_exact_mut(group_len).zip(codes.chunks_exact(group_len));
    for ((out, codes), &scale) in groups.zip(&scales) {
        for (x, &code) in out.iter_mut().zip(codes) {
            *x = f32::from(code) * scale;
        }
    }
    Ok(())
}
