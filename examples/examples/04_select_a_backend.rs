//! Lesson 4: who computes, and why not the others. Nothing falls back in silence.
//!
//! `cargo run -p attn-examples --example 04_select_a_backend`
#![allow(clippy::print_stdout, clippy::expect_used, reason = "a lesson prints")]

use attn_backend::{BackendId, Descriptor, Registry, SelectOptions, select};
use attn_plan::DecodeSpec;
use kv_quant::{CacheFormat, CacheLayout, ScaleType};

fn main() -> anyhow::Result<()> {
    // The backends of this build.
    let registry = Registry::builtin();
    println!("registered: {:?}", registry.backend_ids());

    // What is asked: the cache as it will lie in memory, and the step as it will be run.
    let format = CacheFormat::new(8, 128, 32, 32, ScaleType::F16)?;
    let layout = CacheLayout::nhd(format, 256, 16)?;
    let descriptor = Descriptor::new(layout, DecodeSpec::new(32, 8, 128));
    println!("asked: {descriptor}\n");

    // Candidates are filtered by capability, then the best of them decodes this very descriptor once and is compared
    // with the oracle. The outcome names the winner and every other candidate's reason.
    let selection = select(&registry, &descriptor, &SelectOptions::default())?;
    println!("{selection}");
    if let Some(evidence) = &selection.evidence {
        println!("evidence: {evidence:?}");
    }

    // An override by argument (or by the variable KV8_BACKEND). A name that does not exist is an error that lists
    // those that do.
    let misspelt = SelectOptions::named(BackendId::named("cdua"));
    let error = select(&registry, &descriptor, &misspelt).expect_err("no such backend");
    println!("\nasking for `cdua`: {error}");

    // So is a step that means nothing: 30 query heads do not share 8 kv heads.
    let odd = Descriptor { spec: DecodeSpec::new(30, 8, 128), ..descriptor };
    let error = select(&registry, &odd, &SelectOptions::default()).expect_err("30 is no multiple of 8");
    println!("30 query heads: {error}");
    Ok(())
}
