//! Lesson 3: how a step is cut into work. A plan is a value: it can be printed, compared and stored.
//!
//! `cargo run -p attn-examples --example 03_inspect_a_plan`
#![allow(clippy::print_stdout, reason = "a lesson prints")]

use attn_plan::{DecodeSpec, SplitConfig, SplitPlan, SplitPolicy, WorkspaceSize};

fn main() -> anyhow::Result<()> {
    let spec = DecodeSpec::new(32, 8, 128);
    let kv_lens = [5000, 130, 0, 1500];

    // Throughput: the token axes lie end to end and are cut into equal loads, wherever that falls.
    let config = SplitConfig::throughput(4);
    let plan = SplitPlan::new(&spec, &kv_lens, &config)?;
    print!("{plan}");
    let size = WorkspaceSize::of(&spec, &plan)?;
    println!("workspace: {} bytes for {} partial states\n", size.bytes(), plan.num_partials());

    // The long request was cut, and its pieces meet in stage 2; the empty one still has an item, which writes zeros.
    assert!(plan.request_partials()[1] >= 2);
    assert!(plan.items().iter().any(|item| item.request_idx == 2 && item.num_tokens() == 0));

    // A sliding window makes most of a long request invisible, and the plan does not read it.
    let windowed = DecodeSpec { window: Some(256), ..spec.clone() };
    let plan = SplitPlan::new(&windowed, &kv_lens, &config)?;
    print!("window of 256 tokens, {plan}");
    let read: u32 = plan.items().iter().map(|item| item.num_tokens()).sum();
    println!("{read} of {} tokens are read\n", kv_lens.iter().sum::<u32>());

    // Batch-invariant: a request is cut at fixed places, so that its bits do not depend on its neighbours.
    let fixed = config.with_policy(SplitPolicy::BatchInvariant { split_len: 1024 });
    let alone = SplitPlan::new(&spec, &kv_lens[..1], &fixed)?;
    let together = SplitPlan::new(&spec, &kv_lens, &fixed)?;
    print!("{together}");
    let cuts = |plan: &SplitPlan| -> Vec<(u32, u32)> {
        let of_first = plan.items().iter().filter(|item| item.request_idx == 0);
        of_first.map(|item| (item.token_start, item.token_end)).collect()
    };
    assert_eq!(cuts(&alone), cuts(&together));
    println!("request 0 is cut at the same places alone and in the batch: {:?}", cuts(&alone));
    Ok(())
}
