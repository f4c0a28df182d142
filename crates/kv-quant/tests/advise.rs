//! The advisor on made-up models: an ordinary one, and one with the key biases that make INT8 collapse.
#![allow(clippy::unwrap_used, clippy::panic)]

use kv_quant::{AdviceOptions, Error, LayerSample, Side, advise};
use rand::{Rng, SeedableRng, rngs::StdRng};

const HEADS: usize = 2;
const DIM: usize = 128;
const TOKENS: usize = 192;

/// Roughly normal.
fn normal(rng: &mut StdRng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

fn ordinary(rng: &mut StdRng) -> Vec<f32> {
    (0..TOKENS * HEADS * DIM).map(|_| normal(rng)).collect()
}

/// Keys of head 1 with a bias like that of Qwen2.5's first and last layers: hundreds on a few channels that rotate slowly.
fn biased(rng: &mut StdRng) -> Vec<f32> {
    let mut k = ordinary(rng);
    for (channel, bias) in [(60, 310.0), (62, -240.0), (127, 180.0)] {
        for token in 0..TOKENS {
            k[(token * HEADS + 1) * DIM + channel] += bias;
        }
    }
    k
}

#[test]
fn a_key_bias_is_found_and_its_layer_kept_out() {
    let mut rng = StdRng::seed_from_u64(3);
    let plain: Vec<_> = (0..4).map(|_| (ordinary(&mut rng), ordinary(&mut rng))).collect();
    let (k, v) = (biased(&mut rng), ordinary(&mut rng));
    let mut layers: Vec<_> = plain.iter().map(|(k, v)| LayerSample { k, v, q: None }).collect();
    layers.insert(0, LayerSample { k: &k, v: &v, q: None });
    let advice = advise(&layers, &AdviceOptions::new(HEADS as u32, DIM as u32)).unwrap();

    let head = &advice.layers[0].heads[1];
    assert_eq!((head.side, head.head), (Side::K, 1));
    let channels: Vec<u32> = head.outliers.iter().map(|o| o.channel).collect();
    assert_eq!(channels, [60, 62, 127]);
    assert!(head.outliers.iter().all(|o| o.constant_share > 0.99 && o.ratio > 30.0));
    let whole = head.errors.last().unwrap();
    assert!(whole.group_len == 128 && whole.error > 0.5, "collapse at one scale a head: {whole:?}");
    assert!(whole.drowned > 0.5, "most channels become 0: {whole:?}");
    assert!(whole.error_with_offset < 0.02, "an offset mends it: {whole:?}");
    assert!(head.errors[0].error < 0.3 * whole.error, "small groups contain the damage: {head:?}");
    assert_eq!(advice.layers[0].k_group_len, None);
    assert_eq!(advice.layers[0].k_group_len_with_offset, Some(128));

    assert!(head.has_key_bias());
    assert_eq!(advice.layers.iter().flat_map(|l| &l.heads).filter(|h| h.has_key_bias()).count(), 1);
    assert!(whole.error_rotated < 0.3 * whole.error, "a rotation spreads it: {whole:?}");

    let other = &advice.layers[0].heads[0];
    assert!(other.outliers.is_empty() && other.errors.iter().all(|e| e.error < 0.01));
    assert_eq!(advice.plain.unquantized_layers, [0]);
    let format = advice.plain.format.unwrap();
    assert_eq!((format.group_len(Side::K), format.group_len(Side::V)), (128, 128));
    assert!(!advice.plain.is_quantized(0) && advice.plain.is_quantized(4));
    assert_eq!(advice.plain.bytes_per_token, 4 * format.bytes_per_token() + 2 * 2 * (HEADS * DIM) as u64);
}

#[test]
fn queries_decide_which_errors_count() {
    // A query that looks away from the drowned channels does not suffer; one that looks at them does.
    let mut rng = StdRng::seed_from_u64(4);
    let (k, v) = (biased(&mut rng), ordinary(&mut rng));
    let options = AdviceOptions::new(HEADS as u32, DIM as u32);
    let error = |looks_at: std::ops::Range<usize>| {
        let mut q = vec![0f32; TOKENS * HEADS * DIM];
        for row in q.chunks_exact_mut(DIM) {
            row[looks_at.clone()].fill(1.0);
        }
        let advice = advise(&[LayerSample { k: &k, v: &v, q: Some(&q) }], &options).unwrap();
        advice.layers[0].heads[1].errors[0].error
    };
    assert!(error(0..8) < 0.01);
    assert!(error(57..60) > 0.1);
}

#[test]
fn large_channels_that_vary_call_for_a_rotation() {
    let mut rng = StdRng::seed_from_u64(6);
    let (mut k, v) = (ordinary(&mut rng), ordinary(&mut rng));
    k.iter_mut().skip(40).step_by(DIM).for_each(|x| *x *= 60.0);
    // Every direction of K counts alike without queries; let them look past the large channel, as trained ones do.
    let mut q = ordinary(&mut rng);
    q.iter_mut().skip(40).step_by(DIM).for_each(|x| *x = 0.0);
    let layer = LayerSample { k: &k, v: &v, q: Some(&q[..16 * HEADS * DIM]) };
    let advice = advise(&[layer], &AdviceOptions::new(HEADS as u32, DIM as u32)).unwrap();
    let head = &advice.layers[0].heads[0];
    assert_eq!(head.outliers.iter().map(|o| o.channel).collect::<Vec<_>>(), [40]);
    assert!(!head.has_key_bias(), "it varies: {head:?}");
    let whole = head.errors.last().unwrap();
    assert!(whole.error > 0.1 && whole.error_rotated < 0.3 * whole.error, "{whole:?}");
    assert!(whole.error_with_offset > 0.1, "no offset takes it away: {whole:?}");
}

#[test]
fn a_tight_budget_leaves_everything_alone_and_nonsense_is_refused() {
    let mut rng = StdRng::seed_from_u64(5);
    let (k, v) = (ordinary(&mut rng), ordinary(&mut rng));
    let layers = [LayerSample { k: &k, v: &v, q: None }];
    let options = AdviceOptions { budget: 1e-6, ..AdviceOptions::new(HEADS as u32, DIM as u32) };
    let advice = advise(&layers, &options).unwrap();
    for recommended in [advice.plain, advice.rotated] {
        assert_eq!((recommended.format, recommended.unquantized_layers), (None, vec![0]));
    }

    let mut bad = k.clone();
    bad[DIM * HEADS * 7 + DIM + 3] = f32::NAN;
    let error = advise(&[LayerSample { k: &bad, v: &v, q: None }], &options).unwrap_err();
    assert_eq!(error, Error::NonFinite { side: Side::K, token: 7, head: 1, channel: 3 });
    let error = advise(&[LayerSample { k: &k[1..], v: &v, q: None }], &options).unwrap_err();
    assert!(matches!(error, Error::Len { what: "k", .. }));
}
