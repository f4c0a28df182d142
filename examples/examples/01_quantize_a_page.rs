//! Lesson 1: what a page of the INT8 cache holds, what it costs, and how far a value can be from what was written.
//!
//! `cargo run -p attn-examples --example 01_quantize_a_page`
#![allow(clippy::print_stdout, clippy::expect_used, reason = "a lesson prints")]

use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, ScaleType, Side};
use kv_quant::{append, dequantize_row, quantization_error_bound, read_codes, read_scales};

fn main() -> anyhow::Result<()> {
    // Two kv heads of 64 channels; each run of 16 channels shares one f16 scale. One page of 4 slots.
    let (num_kv_heads, head_dim, group_len, page_len) = (2, 64, 16, 4);
    let format = CacheFormat::new(num_kv_heads, head_dim, group_len, group_len, ScaleType::F16)?;
    let layout = CacheLayout::native(format, 1, page_len)?;
    println!("{format}: {} bytes a token, {} in f16", format.bytes_per_token(), 2 * 2 * 2 * head_dim);
    println!("a page of {page_len} slots takes {} bytes", layout.bytes_per_page());

    // Three tokens; token 1 has an outlier in channel 5 of head 0.
    let row = (num_kv_heads * head_dim) as usize;
    let mut k: Vec<f32> = (0..3 * row).map(|i| (i as f32 * 0.37).sin()).collect();
    k[row + 5] = 40.0;
    let v = vec![0.25f32; 3 * row];

    // Token i goes to slot slots[i]. Slots are the caller's choice; -1 would skip a token.
    let mut cache = CacheBuffers::zeroed(&layout)?;
    append(&layout, &mut cache.view_mut(), FloatSlice::F32(&k), FloatSlice::F32(&v), &[2, 0, 1])?;

    // Token 1, head 0: the outlier has made the first group's steps coarse, and only those.
    let (slot, head) = (0, 0);
    let mut scales = [0f32; 4];
    read_scales(&layout, &cache.view(), Side::K, slot, head, &mut scales)?;
    let codes = read_codes(&layout, &cache.view(), Side::K, slot, head)?;
    println!("scales {scales:?}");
    println!("codes of group 0 {:?}", &codes[..16]);

    let mut read_back = vec![0f32; head_dim as usize];
    dequantize_row(&layout, &cache.view(), Side::K, slot, head, &mut read_back)?;
    for (group_idx, scale) in scales.iter().enumerate() {
        let channels = group_idx * group_len as usize..(group_idx + 1) * group_len as usize;
        let written = &k[row..][channels.clone()];
        let errors = written.iter().zip(&read_back[channels]).map(|(a, b)| f64::from((a - b).abs()));
        let worst = errors.fold(0.0, f64::max);
        let bound = quantization_error_bound(*scale);
        println!("group {group_idx}: worst error {worst:.5}, bound {bound:.5}");
        assert!(worst <= bound);
    }

    // What cannot be represented is an error that says where, and nothing is written.
    k[7] = f32::NAN;
    let refused =
        append(&layout, &mut cache.view_mut(), FloatSlice::F32(&k), FloatSlice::F32(&v), &[0, 1, 2]);
    println!("with a NaN: {}", refused.expect_err("NaN is refused"));
    Ok(())
}
