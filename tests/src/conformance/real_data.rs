//! Real attention data: three layers of a small language model over 1056 tokens of text, embedded in the binary.

use crate::case::Case;
use crate::compare;
use crate::numbers::Numbers;
use crate::poison::{self, Fill};
use crate::problem::{Step, Tokens};
use crate::subject::{Route, Subject};
use crate::values::Values;
use attn_backend::Descriptor;
use cpu_reference::oracle;
use half::f16;
use kv_quant::{FloatType, LayoutKind, ScaleType};
use safetensors::SafeTensors;

/// `tests/fixtures/README.md` says where it comes from.
const FILE: &[u8] = include_bytes!("../../fixtures/smollm2_gpl3_layers.safetensors");
const NUM_TOKENS: u32 = 1056;
/// The last positions have queries.
const NUM_QUERIES: u32 = 32;
const NUM_Q_HEADS: u32 = 9;
const NUM_KV_HEADS: u32 = 3;
const HEAD_DIM: u32 = 64;

fn tensor(file: &SafeTensors<'_>, name: &str, rows: u32, heads: u32) -> Result<Vec<f16>, String> {
    let tensor = file.tensor(name).map_err(|error| error.to_string())?;
    let want = [rows, heads, HEAD_DIM].map(|n| n as usize);
    if tensor.shape() != want {
        return Err(format!("{name} is {:?}, expected {want:?}", tensor.shape()));
    }
    Ok(tensor.data().chunks_exact(2).map(|x| f16::from_le_bytes([x[0], x[1]])).collect())
}

/// Every layer in every group length that divides 64, decoded as 32 requests of one new token or as 4 requests of 8, all
/// over the same shuffled pages.
///
/// # Errors
/// The first element that is beyond the bound.
pub fn real_data(subject: &Subject) -> Result<(), String> {
    let file = SafeTensors::deserialize(FILE).map_err(|error| error.to_string())?;
    for layer in [0, 14, 29] {
        let [k, v] =
            ["k", "v"].map(|x| tensor(&file, &format!("layer{layer}.{x}"), NUM_TOKENS, NUM_KV_HEADS));
        let q = tensor(&file, &format!("layer{layer}.q"), NUM_QUERIES, NUM_Q_HEADS)?;
        let (k, v) = (Values::F16(k?), Values::F16(v?));
        for (i, group_len) in [8, 16, 32, 64].into_iter().enumerate() {
            let case = Case {
                head_dim: HEAD_DIM,
                k_group_len: group_len,
                v_group_len: group_len,
                scale_type: if layer == 29 { ScaleType::Bf16 } else { ScaleType::F16 },
                layout: [LayoutKind::Native, LayoutKind::Hnd, LayoutKind::Nhd][i % 3],
                num_kv_heads: NUM_KV_HEADS,
                gqa_group: NUM_Q_HEADS / NUM_KV_HEADS,
                q_len: if (i as u64 + layer).is_multiple_of(2) { 1 } else { 8 },
                in_type: FloatType::F16,
                q_type: FloatType::F16,
                seed: layer,
                ..Case::plain(subject.tile_len(), 0)
            };
            one(subject, &case, &k, &v, &q)
                .map_err(|error| format!("layer {layer}: {error}\n  in {case:?}"))?;
        }
    }
    Ok(())
}

fn one(subject: &Subject, case: &Case, k: &Values, v: &Values, q: &[f16]) -> Result<(), String> {
    let num_pages = NUM_TOKENS.div_ceil(case.page_len);
    let (layout, spec) = (case.layout_of(u64::from(num_pages)), case.bare_spec());
    if let Err(reason) = subject.covers(&Descriptor::new(layout.clone(), spec.clone())) {
        subject.ledger.skipped(&subject.name, &reason);
        return Ok(());
    }
    let mut pages: Vec<i32> = (0..num_pages as i32).collect();
    Numbers::new(case.seed, 8).shuffle(&mut pages);
    let slot = |t: u32| {
        i64::from(pages[(t / case.page_len) as usize]) * i64::from(case.page_len)
            + i64::from(t % case.page_len)
    };
    let tokens = Tokens { k: k.clone(), v: v.clone(), slots: (0..NUM_TOKENS).map(slot).collect() };
    let mut image = poison::dead_cache(&layout, Fill::Poison);
    let mut opened = subject.open(&layout, &spec, case.config, Route::Session)?;
    opened.write_image(&image)?;
    opened.append(&tokens)?;
    kv_quant::append(&layout, &mut image.view_mut(), k.as_slice(), v.as_slice(), &tokens.slots)
        .map_err(|error| error.to_string())?;
    opened.compare_image(&image)?;
    let batch = NUM_QUERIES / case.q_len;
    let step = Step {
        kv_lens: (1..=batch).map(|i| NUM_TOKENS - NUM_QUERIES + i * case.q_len).collect(),
        row_starts: vec![0; batch as usize],
        pages,
        stride: None,
        q: Values::F16(q.to_vec()),
    };
    let run = opened.decode(&step)?;
    let request = step.request(&spec);
    let expected = oracle::decode_request(&layout, &image.view(), &request, step.q.as_slice())
        .map_err(|error| error.to_string())?;
    let arithmetic = subject.backend.arithmetic(&spec, &opened.split_plan(&step)?);
    let worst = compare::with_oracle(&spec, &expected, &arithmetic, &run)?;
    subject.ledger.error_ratio(&subject.name, worst, || format!("real data, group {}", case.k_group_len));
    subject.ledger.ran(&subject.name, "real data", u64::from(batch));
    Ok(())
}
