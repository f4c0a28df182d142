//! How steps are cut on a CUDA device: the profiles that fit it, and a chooser for each kernel.

use attn_kernels::device::Decoder;
use attn_kernels::image;
use attn_kernels::probe::DeviceFacts;
use attn_plan::{DecodeSpec, SplitPolicy};
use attn_tune::{Chooser, Level, Machine, Shape, StaticKey, Tuner};
use kv_quant::CacheLayout;

/// Share of the memory's nominal bandwidth that a streaming read reaches, where no profile has measured it.
const READ_SHARE: f64 = 0.93;
/// For devices that do not say how fast their memory is.
const UNKNOWN_GB_PER_S: f64 = 1000.0;
/// Characters of the source hash that tell one build from another.
const BUILD_LEN: usize = 12;

/// What of the image's manifest is asked for.
#[derive(serde::Deserialize)]
struct Manifest {
    source_hash: String,
}

/// The build of the embedded kernels: their source hash, shortened.
pub(super) fn build() -> Result<String, String> {
    let image = image::embedded().map_err(|reason| reason.to_string())?;
    let manifest: Manifest = serde_json::from_str(image.manifest).map_err(|reason| reason.to_string())?;
    Ok(manifest.source_hash.chars().take(BUILD_LEN).collect())
}

/// The profiles that fit a device and the embedded kernels. What cannot be used is logged as a warning.
pub fn cuda_tuner(facts: &DeviceFacts, level: Level) -> Tuner {
    let nominal = if facts.memory_gb_per_s > 0.0 { facts.memory_gb_per_s } else { UNKNOWN_GB_PER_S };
    let machine = Machine {
        device: facts.name.clone(),
        arch: format!("sm_{}", facts.sm),
        // Without an image nothing is launched.
        build: build().unwrap_or_default(),
        num_sms: facts.num_sms,
        l2_bytes: u64::from(facts.l2_bytes),
        read_gb_per_s: READ_SHARE * nominal,
    };
    let tuner = Tuner::for_user(machine, level);
    for warning in tuner.warnings() {
        tracing::warn!("{warning}");
    }
    tuner
}

/// The look-up for the steps of a decoder.
pub fn cuda_chooser(
    tuner: &Tuner,
    layout: &CacheLayout,
    spec: &DecodeSpec,
    policy: SplitPolicy,
    decoder: &Decoder,
) -> Chooser {
    let key = StaticKey::of(layout, spec, policy);
    let instance = decoder.instance();
    let shape = Shape::new(layout, &key, decoder.blocks_per_sm(), instance.max_heads, instance.key.rows());
    tuner.chooser(key, shape.with_shares(decoder.most_shares()).with_share_blocks(decoder.share_blocks()))
}
