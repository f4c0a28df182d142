//! The query, in the order in which the inner loop over a tile takes it: in f32, or quantized for integer dot products.

use crate::arch::generic::INT_WORDS;
use crate::stage1::{DIM_ALIGN, MAX_BLOCK, Step};
use kv_quant::{CacheFormat, Element, FloatSlice, MAX_HEAD_DIM, Side};

/// How q.k is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DotProduct {
    /// In f32, with q as it is given.
    #[default]
    F32,
    /// In 8-bit integers where `head_dim` is a multiple of 64 and K has int8 codes in groups of a multiple of 32, else in
    /// f32. Each 32 channels of a query row are quantized on a scale of their own, which is half a 127th of their largest
    /// magnitude off at most: see [`crate::Arithmetic::host_int8`].
    Int8,
}

/// Channels of q that share a scale.
const Q_GROUP: usize = 32;

/// Whether the inner loop's vectors of 32 or 64 codes fit rows and groups.
pub(crate) fn can_be_integer(format: &CacheFormat) -> bool {
    format.element() == Element::Int8
        && format.head_dim().is_multiple_of(64)
        && (format.group_len(Side::K) as usize).is_multiple_of(Q_GROUP)
}

/// Fills `out`, `[batch][kv_head][rows * padded_dim]`, from q, `[batch][q_len][num_q_heads][head_dim]`.
///
/// A kv head's rows come in blocks of up to [`MAX_BLOCK`], each `[chunk][row][lane]` in f32; in integers `[vector][row]`
/// with `4 * lanes` codes, `lanes` offsets (-128 times the sum of four codes) and `lanes` scales.
pub(crate) fn pack(step: &Step<'_>, lanes: usize, q: FloatSlice<'_>, out: &mut [f32]) {
    let Step { num_kv_heads, gqa_group, rows, head_dim, padded_dim, is_integer, .. } = *step;
    let q_len = step.request.spec.q_len as usize;
    let mut widened = [0f32; MAX_HEAD_DIM as usize + DIM_ALIGN];
    let Some(widened) = widened.get_mut(..padded_dim) else { return };
    for (i, head) in out.chunks_exact_mut(rows * padded_dim).enumerate() {
        let (request_idx, kv_head) = (i / num_kv_heads, i % num_kv_heads);
        for (block_idx, block) in head.chunks_mut(MAX_BLOCK * padded_dim).enumerate() {
            let block_rows = block.len() / padded_dim;
            for r in 0..block_rows {
                let row = block_idx * MAX_BLOCK + r;
                let (q_idx, in_group) = (row / gqa_group, row % gqa_group);
                let source = ((request_idx * q_len + q_idx) * num_kv_heads + kv_head) * gqa_group + in_group;
                q.widen(source * head_dim, &mut widened[..head_dim]);
                if is_integer {
                    let places = block.chunks_exact_mut(INT_WORDS * lanes).skip(r).step_by(block_rows);
                    places.zip(widened.chunks_exact(4 * lanes)).for_each(|(out, x)| quantize(x, out));
                } else {
                    let places = block.chunks_exact_mut(lanes).skip(r).step_by(block_rows);
                    // Lanes are a multiple of 8, a length that the compiler can see.
                    for (out, x) in places.zip(widened.chunks_exact(lanes)) {
                        let (out, x) = (out.as_chunks_mut::<8>().0, x.as_chunks::<8>().0);
                        out.iter_mut().zip(x).for_each(|(out, x)| *out = *x);
                    }
                }
            }
        }
    }
}

/// 1.5 * 2^23: its neighbours are integers.
const SHIFT: f32 = 12_582_912.0;

/// One vector: codes, offsets, scales, a third of `out` each.
fn quantize(x: &[f32], out: &mut [f32]) {
    let (codes, rest) = out.split_at_mut(x.len() / 4);
    let (offsets, scales) = rest.split_at_mut(x.len() / 4);
    let codes: &mut [i8] = bytemuck::cast_slice_mut(codes);
    let offsets: &mut [i32] = bytemuck::cast_slice_mut(offsets);
    let groups = x.chunks_exact(Q_GROUP).zip(codes.chunks_exact_mut(Q_GROUP));
    let outputs = offsets.chunks_exact_mut(Q_GROUP / 4).zip(scales.chunks_exact_mut(Q_GROUP / 4));
    for ((x, codes), (offsets, scales)) in groups.zip(outputs) {
        let amax = x.iter().fold(0f32, |a, x| a.max(x.abs()));
        let is_finite = x.iter().all(|x| x.is_finite());
        let scale = if is_finite { amax / 127.0 } else { f32::NAN };
        scales.fill(scale);
        for (code, x) in codes.iter_mut().zip(x) {
            // Rounds half to even, the integer in the lowest bits; 0 / 0 becomes 0.
            *code = ((x / scale).clamp(-127.0, 127.0) + SHIFT).to_bits() as i8;
        }
        for (offset, codes) in offsets.iter_mut().zip(codes.chunks_exact(4)) {
            *offset = -128 * codes.iter().map(|&code| i32::from(code)).sum::<i32>();
        }
    }
}
