//! Where profiles stand: those that ship with the crate, and the user's own.

use crate::Profile;
use etcetera::BaseStrategy;
use std::path::{Path, PathBuf};

/// The environment variable that names the folder of the user's profiles.
pub const PROFILE_DIR_VARIABLE: &str = "KV8_PROFILE_DIR";

/// Profiles that ship with the crate: file name and text.
pub(crate) const SHIPPED: &[(&str, &str)] = &[
    ("nvidia-h100-80gb-hbm3.toml", include_str!("../profiles/nvidia-h100-80gb-hbm3.toml")),
    ("nvidia-h200.toml", include_str!("../profiles/nvidia-h200.toml")),
];

/// The profiles that ship with the crate: file name and text.
pub fn shipped() -> &'static [(&'static str, &'static str)] {
    SHIPPED
}

/// The folder of the user's profiles: [`PROFILE_DIR_VARIABLE`], else `kv8/profiles` in the platform's configuration
/// folder; `None` where the platform has none.
pub fn user_dir() -> Option<PathBuf> {
    let named = std::env::var_os(PROFILE_DIR_VARIABLE).filter(|name| !name.is_empty());
    named.map(PathBuf::from).or_else(|| {
        let base = etcetera::choose_base_strategy().ok()?;
        Some(base.config_dir().join("kv8").join("profiles"))
    })
}

/// The name of a device's profile.
/// ```
/// assert_eq!(attn_tune::file_name("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3.toml");
/// ```
pub fn file_name(device: &str) -> String {
    let mut slug = String::with_capacity(device.len() + 5);
    for c in device.chars() {
        match c.is_ascii_alphanumeric() {
            true => slug.push(c.to_ascii_lowercase()),
            false if slug.ends_with('-') || slug.is_empty() => {}
            false => slug.push('-'),
        }
    }
    let slug = slug.trim_end_matches('-');
    format!("{}.toml", if slug.is_empty() { "device" } else { slug })
}

impl Profile {
    /// Writes the profile under `dir` by its device's name, whole or not at all, and says where.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, dir: &Path) -> std::io::Result<PathBuf> {
        std::fs::create_dir_all(dir)?;
        let file = dir.join(file_name(&self.device));
        let unfinished = file.with_extension("toml.part");
        std::fs::write(&unfinished, self.to_string())?;
        std::fs::rename(&unfinished, &file)?;
        Ok(file)
    }
}
