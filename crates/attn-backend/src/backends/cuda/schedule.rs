//! How steps are cut on a CUDA device: the profiles that fit it, and a chooser for each kernel.

use attn_kernels::DeviceView;
use attn_kernels::device::{Decoder, PlanArgs};
use attn_kernels::image;
use attn_kernels::probe::DeviceFacts;
use attn_plan::{DecodeSpec, SplitPlan, SplitPolicy};
use attn_tune::{Chooser, Decision, Level, Machine, Shape, StaticKey, Tuner};
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

/// How a plan is launched. `arrays`: its items, the workers' first items and the requests' first partials.
pub(super) fn plan_args(
    decoder: &Decoder,
    spec: &DecodeSpec,
    plan: &SplitPlan,
    arrays: [DeviceView; 3],
) -> PlanArgs {
    let [items, worker_starts, request_partials] = arrays;
    let (mut heads_per_block, mut num_shares, mut wide) = (1, 0, false);
    if let Some(config) = plan.config() {
        heads_per_block = decoder.heads_per_block(config.heads_per_block, spec.num_kv_heads);
        num_shares = decoder.num_shares(config);
        wide = decoder.takes_wide_blocks(config, plan.num_busy_workers(), spec.num_kv_heads);
    }
    PlanArgs {
        items,
        worker_starts,
        request_partials,
        num_workers: plan.num_busy_workers(),
        heads_per_block,
        wide,
        num_shares,
        // Shares are merged where they are made.
        has_partials: num_shares == 0 && plan.num_partials() > 0,
    }
}

/// A decision in words, and what is launched by it: `Decoder::deal` may have other workers, and each kind of plan a kernel of its own.
/// `any`: some memory of the device, which nothing reads.
///
/// # Errors
/// A step that no plan is made for.
pub fn explain_cuda(
    decoder: &Decoder,
    chooser: &Chooser,
    decision: &Decision,
    policy: SplitPolicy,
    step: (&DecodeSpec, &[u32]),
    any: DeviceView,
) -> Result<String, attn_plan::Error> {
    let (spec, kv_lens) = step;
    let split = decision.choice.split(policy, spec.num_kv_heads, chooser.shape().row_blocks);
    let plan = SplitPlan::new(spec, kv_lens, &decoder.deal(split, spec.num_kv_heads))?;
    let args = plan_args(decoder, spec, &plan, [any; 3]);
    let symbol = decoder.symbol_for(&args);
    Ok(match args.num_shares {
        0 => {
            let (items, partials) = (plan.items().len(), plan.num_partials());
            let (workers, heads) = (args.num_workers, args.heads_per_block);
            format!(
                "{decision}; launched: {workers} workers of {heads} heads a block, {items} items, {partials} partials, {symbol}"
            )
        }
        shares => {
            let heads = args.heads_per_block;
            format!("{decision}; launched: {shares} shares of {heads} heads a block, {symbol}")
        }
    })
}
