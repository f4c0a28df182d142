//! An image that is named at run time, in the place of the embedded one: kernels with a seeded bug, for one build of the
//! tests. It must be built from the same sources, since the parameter structs go with them.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use super::{Image, ImageError, Unit};

/// The environment variable that names the folder.
const VARIABLE: &str = "KV8_IMAGE_DIR";
/// As the build script aligns the embedded one.
const ALIGN: usize = 64;

/// The image that the environment names, read once; `None` if it names none.
pub fn image(sources: &'static str) -> Option<Result<Image, ImageError>> {
    static IMAGE: OnceLock<Option<Result<Image, ImageError>>> = OnceLock::new();
    IMAGE
        .get_or_init(|| {
            let folder = std::env::var_os(VARIABLE)?;
            Some(read(Path::new(&folder), sources))
        })
        .clone()
}

fn read(folder: &Path, sources: &'static str) -> Result<Image, ImageError> {
    let unusable = |reason: String| ImageError::Unusable { folder: folder.display().to_string(), reason };
    let text =
        std::fs::read_to_string(folder.join("manifest.json")).map_err(|error| unusable(error.to_string()))?;
    let bytes = std::fs::read(folder.join("kv8.fatbin")).map_err(|error| unusable(error.to_string()))?;
    // It lives as long as the process, as the embedded one does.
    let manifest: &'static str = text.leak();
    let value: Value = serde_json::from_str(manifest).map_err(|error| unusable(error.to_string()))?;
    let built_from = value["source_hash"].as_str().unwrap_or_default().to_owned().leak();
    if built_from != sources {
        return Err(ImageError::Stale { built_from, sources });
    }
    let units: Option<Vec<Unit>> = value["units"].as_array().into_iter().flatten().map(unit).collect();
    let units = units.filter(|units| units.iter().all(|unit| unit.range.end <= bytes.len()));
    let units = units.ok_or_else(|| unusable("its manifest's units are not in order".to_owned()))?;
    Ok(Image { bytes: aligned(&bytes), units: units.leak(), manifest })
}

fn unit(value: &Value) -> Option<Unit> {
    let number = |key: &str| value[key].as_u64().and_then(|number| usize::try_from(number).ok());
    let (offset, len) = (number("offset")?, number("bytes")?);
    let mut symbols: Vec<&'static str> = Vec::new();
    for symbol in value["symbols"].as_array()? {
        symbols.push(symbol.as_str()?.to_owned().leak());
    }
    let name: &'static str = value["name"].as_str()?.to_owned().leak();
    Some(Unit { name, range: offset..offset.checked_add(len)?, symbols: symbols.leak() })
}

fn aligned(bytes: &[u8]) -> &'static [u8] {
    let room: &'static mut [u8] = vec![0; bytes.len() + ALIGN].leak();
    let skip = room.as_ptr().align_offset(ALIGN).min(ALIGN);
    let Some(place) = room.get_mut(skip..skip + bytes.len()) else { return &[] };
    place.copy_from_slice(bytes);
    place
}
