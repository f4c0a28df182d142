//! Parameters of the append and dequantize kernels. Twin: `cuda/params/append.h`.

use bytemuck::{Pod, Zeroable};

use super::{PagedCache, assert_layout};

/// The one argument of `append`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct AppendParams {
    /// The cache that is written; its page table is not read.
    pub cache: PagedCache,
    /// `[num_tokens, num_kv_heads, head_dim]` of `input_type`.
    pub k: u64,
    /// The same shape.
    pub v: u64,
    /// i64 `[num_tokens]`, -1 = skip.
    pub slot_mapping: u64,
    /// [`ErrorRecord`](super::ErrorRecord).
    pub error: u64,
    /// Elements between tokens of k.
    pub k_token_stride: u64,
    /// Elements between tokens of v.
    pub v_token_stride: u64,
    /// Tokens of the call.
    pub num_tokens: u32,
    /// A [`FloatType`](kv_quant::FloatType).
    pub input_type: u32,
}
assert_layout!(AppendParams, size 184 + 6 * 8 + 2 * 4, align 8, {
    cache @ 0, k @ 184, v @ 192, slot_mapping @ 200, error @ 208, k_token_stride @ 216, v_token_stride @ 224,
    num_tokens @ 232, input_type @ 236,
});

/// The one argument of `dequantize`: gathers tokens `token_start .. token_end` of one request into dense k and v.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DequantizeParams {
    /// The cache that is read.
    pub cache: PagedCache,
    /// `[token_end - token_start, num_kv_heads, head_dim]` of `out_type`.
    pub k: u64,
    /// The same shape.
    pub v: u64,
    /// [`ErrorRecord`](super::ErrorRecord).
    pub error: u64,
    /// The request whose page row is followed.
    pub request_idx: u32,
    /// Inclusive.
    pub token_start: u32,
    /// Exclusive.
    pub token_end: u32,
    /// A [`FloatType`](kv_quant::FloatType).
    pub out_type: u32,
}
assert_layout!(DequantizeParams, size 184 + 3 * 8 + 4 * 4, align 8, {
    cache @ 0, k @ 184, v @ 192, error @ 200, request_idx @ 208, token_start @ 212, token_end @ 216, out_type @ 220,
});
