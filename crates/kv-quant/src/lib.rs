//! The INT8 group-quantized KV cache format: groups, scales, rounding, layouts, pages and the error bound.
//!
//! A cache holds, for every token and every kv head, `head_dim` codes (`i8`) for K and for V and one scale for
//! each group of consecutive channels. The dequantized value is exactly `code * scale`.
//! [`CacheFormat`] says how numbers are coded, [`CacheLayout`] where they lie, [`append()`] writes them,
//! [`CachePool`] hands out pages to sequences. The byte map is in `docs/int8-format.md`.
//!
//! ```
//! use kv_quant::{CacheFormat, CacheLayout, CacheBuffers, FloatSlice, ScaleType};
//! let format = CacheFormat::new(1, 64, 32, 32, ScaleType::F16)?;
//! let layout = CacheLayout::native(format, 4, 16)?;
//! let mut cache = CacheBuffers::zeroed(&layout)?;
//! let k = vec![0.5f32; 64];
//! kv_quant::append(&layout, &mut cache.view_mut(), FloatSlice::F32(&k), FloatSlice::F32(&k), &[17])?;
//! let mut row = vec![0f32; 64];
//! kv_quant::dequantize_row(&layout, &cache.view(), kv_quant::Side::K, 17, 0, &mut row)?;
//! assert!((row[0] - 0.5).abs() < 1e-3);
//! # Ok::<(), kv_quant::Error>(())
//! ```
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("cache bytes are little-endian and are read in place; big-endian machines are not supported");

mod advise;
mod append;
mod bound;
mod buffers;
mod element;
mod error;
mod float;
mod format;
mod group;
mod layout;
mod layout_kind;
mod moments;
mod overlap;
mod plane;
mod pool;
mod rows;
mod scale;
mod shape;
mod smooth;

pub use advise::{
    Advice, AdviceOptions, GroupError, HeadReport, LayerAdvice, LayerSample, OutlierChannel, Recommendation,
    advise,
};
pub use append::{append, append_row, check_append};
pub use bound::{max_code, quantization_error_bound};
pub use buffers::{CacheBuffers, CacheView, CacheViewMut};
pub use element::Element;
pub use error::{Error, Side};
pub use float::{FloatSlice, FloatSliceMut, FloatType};
pub use format::{CacheFormat, GROUP_LENS, MAX_HEAD_DIM, MIN_HEAD_DIM};
pub use group::{quantize_group, quantize_value};
pub use layout::{CacheLayout, MAX_BUFFERS};
pub use layout_kind::{LayoutKind, NATIVE_RECORD_ALIGN};
pub use moments::{QueryMoments, RotaryPairs};
pub use plane::{Plane, PlaneId};
pub use pool::{AppendSlots, CachePool, PageCopy, PagePool, PoolError, SequenceId};
pub use rows::{dequantize_row, read_codes, read_scales};
pub use scale::{ScaleType, StoredScale, round_scale_up};
pub use shape::ShapedRounding;
pub use smooth::{KeyOffset, rotate_heads};
