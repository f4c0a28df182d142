//! `cargo xtask tune --explain`: how the library cuts a step on this GPU, and why.

use super::Args;
use crate::bench::case::Case;
use anyhow::{Context, Result, ensure};
use attn_backend::{cuda_chooser, cuda_tuner, explain_cuda};
use attn_kernels::device::{CacheArgs, CudaDevice, Kernels};
use attn_kernels::key::Arithmetic;
use attn_tune::{Level, RunKey};
use kv_quant::LayoutKind;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let device = CudaDevice::open(args.device).context("no CUDA device to ask for")?;
    let kernels = Kernels::embedded(&device)?;
    let level = Level::from_env()?;
    let tuner = cuda_tuner(device.facts(), level);
    for warning in tuner.warnings() {
        println!("warning: {warning}");
    }
    println!("{}, level {level}: {} keys are measured", device.facts().name, tuner.keys().count());
    let first = |named: &[u32], default: u32| named.first().copied().unwrap_or(default);
    let (gqa_group, num_kv_heads) = (first(&args.gqa, 4), 8);
    let heads = (gqa_group * num_kv_heads, num_kv_heads, first(&args.head_dim, 128));
    for lengths in &args.explain {
        let kv_lens = parse(lengths)?;
        for (layout, page_len) in [(LayoutKind::Native, 16), (LayoutKind::LightLlm, 1)] {
            let case = Case {
                kv_lens: kv_lens.clone(),
                group_len: first(&args.group_len, 8),
                ..Case::new(heads, 1, 64, layout, page_len)
            };
            let layout = case.layout_of(u64::from(16 / page_len))?;
            let buffers = layout
                .buffer_bytes()
                .iter()
                .map(|&bytes| device.alloc(usize::try_from(bytes)?).map_err(Into::into));
            let buffers = buffers.collect::<Result<Vec<_>>>()?;
            let views: Vec<_> = buffers.iter().map(|buffer| buffer.view()).collect();
            let params = CacheArgs { layout: &layout, buffers: &views, pages: None }.params()?;
            let decoder = kernels.decoder(&params, &case.spec, Arithmetic::Mma)?;
            let chooser = cuda_chooser(&tuner, &layout, &case.spec, case.policy, &decoder);
            let run = RunKey::of_step(&case.spec, &case.kv_lens);
            let decision = chooser.choose(&run);
            let any = *views.first().context("a cache has buffers")?;
            let step = (&case.spec, &case.kv_lens[..]);
            let what = explain_cuda(&decoder, &chooser, &decision, case.policy, step, any)?;
            println!("{run}, {}\n    {what}", chooser.key());
        }
    }
    Ok(())
}

/// "8x4096" or "100,2000,30000".
fn parse(lengths: &str) -> Result<Vec<u32>> {
    let number = |text: &str| {
        text.trim().parse::<u32>().with_context(|| format!("{text:?} is no length; {lengths:?}"))
    };
    let kv_lens = match lengths.split_once('x') {
        Some((batch, kv_len)) => vec![number(kv_len)?; number(batch)? as usize],
        None => lengths.split(',').map(number).collect::<Result<_>>()?,
    };
    ensure!(!kv_lens.is_empty(), "{lengths:?} names no request");
    Ok(kv_lens)
}
