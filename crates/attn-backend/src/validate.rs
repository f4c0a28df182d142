//! Every check of a call, once, before anything runs.

use crate::Error;
use attn_plan::DecodeSpec;
use kv_quant::CacheLayout;

/// A spec by itself and against the cache.
pub(crate) fn spec(layout: &CacheLayout, spec: &DecodeSpec) -> Result<(), Error> {
    spec.check()?;
    let format = layout.format();
    for (what, spec, cache) in [
        ("num_kv_heads", spec.num_kv_heads, format.num_kv_heads()),
        ("head_dim", spec.head_dim, format.head_dim()),
    ] {
        if spec != cache {
            return Err(attn_plan::Error::CacheMismatch { what, spec, cache }.into());
        }
    }
    Ok(())
}
