//! The kernel image that `cargo xtask kernels` built, embedded with its manifest.
//!
//! The build script looked for it and compared its source hash; here are the answers as values.

use thiserror::Error;

/// Why there is no image to load.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageError {
    /// The crate was built before the kernels were.
    #[error("kernel image not built: run `cargo xtask kernels`, then build again")]
    NotBuilt,
    /// The sources (and with them perhaps the parameter structs) have changed since the image was built.
    #[error(
        "kernel image is stale: built from sources {built_from:.12}, now {sources:.12}; run `cargo xtask kernels`, then build again"
    )]
    Stale {
        /// Hash of the sources that the image was built from.
        built_from: &'static str,
        /// Hash of the sources now.
        sources: &'static str,
    },
    /// The image lacks a kernel, as one built for a part of the sources does.
    #[error("the kernel image has no {symbol}")]
    NoSuchKernel {
        /// What was asked for.
        symbol: String,
    },
    /// The folder that `KV8_IMAGE_DIR` names has no image that can be used (feature `image-from-env`).
    #[error("no kernel image in {folder}: {reason}")]
    Unusable {
        /// The folder.
        folder: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The embedded image.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Fatbins one after the other, a unit each. Of a unit's machine codes and PTX the driver picks what fits.
    pub bytes: &'static [u8],
    /// Where the units lie and which kernels they have.
    pub units: &'static [Unit],
    /// `manifest.json` as text: source hash, flags, registers, spills and shared memory of every kernel.
    pub manifest: &'static str,
}

impl Image {
    /// Whether some unit has this kernel.
    #[must_use]
    pub fn has(&self, symbol: &str) -> bool {
        self.units.iter().any(|unit| unit.symbols.contains(&symbol))
    }
}

/// One fatbin of the image: the kernels of one source file, loaded when the first of them is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Name of the source file, without its extension.
    pub name: &'static str,
    /// Bytes of the image.
    pub range: core::ops::Range<usize>,
    /// Its kernels.
    pub symbols: &'static [&'static str],
}

/// What the image asks of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Lowest driver version, major * 1000 + minor * 10.
    pub driver_version: u32,
    /// The same, for a device that only the PTX in the image serves.
    pub driver_version_for_ptx: u32,
    /// Lowest compute capability, major * 10 + minor.
    pub lowest_sm: u32,
    /// What the image holds, such as "sm_80, sm_89, sm_90a, compute_80".
    pub supported: String,
}

#[cfg(feature = "cuda")]
#[allow(
    dead_code,
    reason = "without an image nobody asks for its units; the sources' hash is for images given later"
)]
mod facts {
    use super::Unit;

    include!(concat!(env!("OUT_DIR"), "/image_facts.rs"));
}

/// The driver reads 8-byte fields of each unit; units start at multiples of 64.
#[cfg(kv8_image)]
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[cfg(kv8_image)]
static BYTES: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("KV8_FATBIN")));

#[cfg(feature = "image-from-env")]
mod from_env;

/// The embedded image, if it was built from the sources as they were when this crate was compiled.
///
/// # Errors
/// [`ImageError`]; its text says which command mends it.
#[cfg(feature = "cuda")]
pub fn embedded() -> Result<Image, ImageError> {
    #[cfg(feature = "image-from-env")]
    if let Some(image) = from_env::image(facts::SOURCES) {
        return image;
    }
    if let Some((built_from, sources)) = facts::STALE {
        return Err(ImageError::Stale { built_from, sources });
    }
    #[cfg(kv8_image)]
    return Ok(Image { bytes: &BYTES.0, units: facts::UNITS, manifest: include_str!(env!("KV8_MANIFEST")) });
    #[cfg(not(kv8_image))]
    Err(ImageError::NotBuilt)
}

/// What the embedded image asks of a machine; without one, what an image would ask at least.
///
/// Machine code of one CUDA major version loads on every driver of that major version or a later one. PTX needs the
/// exact version or a later one, but is only used on devices newer than every machine code in the image.
#[cfg(feature = "cuda")]
#[must_use]
pub fn needs() -> Needs {
    if facts::ARCHS.is_empty() {
        return Needs {
            driver_version: LOWEST_CUDA,
            driver_version_for_ptx: LOWEST_CUDA,
            lowest_sm: LOWEST_SM,
            supported: "sm_80 and later".to_owned(),
        };
    }
    let sm = |arch: &&str| arch.strip_prefix("sm_").and_then(|sm| sm.trim_end_matches('a').parse().ok());
    Needs {
        driver_version: facts::CUDA_VERSION.0 * 1000,
        driver_version_for_ptx: facts::CUDA_VERSION.0 * 1000 + facts::CUDA_VERSION.1 * 10,
        lowest_sm: facts::ARCHS.iter().filter_map(sm).min().unwrap_or(LOWEST_SM),
        supported: facts::ARCHS.join(", "),
    }
}

/// The kernels use `cp.async` and bf16 arithmetic, which start here.
#[cfg(feature = "cuda")]
const LOWEST_SM: u32 = 80;
/// The first CUDA version whose driver calls are all used here.
#[cfg(feature = "cuda")]
const LOWEST_CUDA: u32 = 11_040;
