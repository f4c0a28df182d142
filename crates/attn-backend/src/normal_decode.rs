//! The ordinary decode path: each request reads its own tokens. One entry: everything that decodes comes through here.

use crate::{
    Descriptor, Error, Executor, NormalDecode, Registry, SelectError, SelectOptions, Selection, Session,
};

/// Selects a backend for the descriptor and opens a session on it, cache memory owned by the backend.
///
/// ```
/// use attn_backend::{Descriptor, Registry, SelectOptions, normal_decode};
/// # use attn_plan::DecodeSpec;
/// # use kv_quant::{CacheFormat, CacheLayout, ScaleType};
/// # let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16)?;
/// let descriptor = Descriptor::new(CacheLayout::native(format, 8, 16)?, DecodeSpec::new(6, 2, 64));
/// let (session, selection) = normal_decode::open(&Registry::builtin(), &descriptor, &SelectOptions::default())?;
/// assert_eq!(session.backend(), &selection.backend);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`crate::select()`] and [`Session::open`].
pub fn open(
    registry: &Registry,
    descriptor: &Descriptor,
    options: &SelectOptions,
) -> Result<(Session<'static>, Selection), SelectError> {
    let selection = crate::select(registry, descriptor, options)?;
    let session = Session::open(&selection, Default::default())
        .map_err(|error| SelectError::Open { backend: selection.backend.clone(), error })?;
    Ok((session, selection))
}

/// Runs a checked step.
pub(crate) fn normal_decode(executor: &mut dyn Executor, step: NormalDecode<'_>) -> Result<(), Error> {
    executor.normal_decode(step)
}
