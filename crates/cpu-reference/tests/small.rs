//! Small cases through every path of stage 1 and append, quick enough for an interpreter (Miri) and in buffers of exactly
//! the right size for a sanitizer. How to run both: `docs/cpu-performance.md`. Miri, which takes ten seconds for a case and more, has fewer.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

use cpu_reference::case::CaseConfig;
use cpu_reference::{Arithmetic, DotProduct, Isa, Workspace};
use kv_quant::{FloatSlice, LayoutKind, ScaleType};

/// Appends to slots in disorder, then decodes, on every instruction set.
fn run(config: &CaseConfig) {
    let mut case = config.build().unwrap();
    let slots = case.slots(0, 2);
    let slots: Vec<i64> = slots.into_iter().rev().chain([-1]).collect();
    let row = case.spec.num_kv_heads as usize * case.spec.head_dim as usize;
    let x: Vec<f32> = (0..slots.len() * row).map(|i| (i % 19) as f32 - 9.0).collect();
    let (layout, empty) = (case.layout.clone(), case.cache.clone());
    for isa in Isa::available() {
        case.cache = empty.clone();
        let x = FloatSlice::F32(&x);
        cpu_reference::append_on(isa, &layout, &mut case.cache.view_mut(), x, x, &slots).unwrap();
        let expected = case.expected().unwrap();
        for dot in [DotProduct::F32, DotProduct::Int8] {
            let mut workspace = Workspace::for_isa(isa).unwrap().with_dot(dot);
            let (out, lse) = case.run(&mut workspace).unwrap();
            let arithmetic = match dot {
                DotProduct::F32 => case.host_arithmetic(),
                _ => Arithmetic::host_int8(&case.spec, &case.plan),
            };
            case.check_against(&expected, &out, Some(&lse), &arithmetic)
                .unwrap_or_else(|error| panic!("{isa}, {dot:?}: {error}; {config:?}"));
        }
    }
}

#[test]
fn every_count_of_rows() {
    for gqa_group in if cfg!(miri) { vec![3, 9] } else { (1..=9).collect() } {
        run(&CaseConfig { gqa_group, num_kv_heads: 1, kv_lens: vec![3], ..CaseConfig::default() });
    }
}

#[test]
fn every_way_to_make_a_chunk() {
    let shapes =
        [(17, 17, 17), (24, 8, 24), (40, 8, 8), (64, 32, 64), (64, 16, 8), (72, 72, 8), (128, 128, 32)];
    let (shapes, scale_types) =
        if cfg!(miri) { (&shapes[1..3], &ScaleType::ALL[..1]) } else { (&shapes[..], &ScaleType::ALL[..]) };
    for &(head_dim, k_group_len, v_group_len) in shapes {
        for &scale_type in scale_types {
            let config =
                CaseConfig { head_dim, k_group_len, v_group_len, scale_type, ..CaseConfig::default() };
            run(&CaseConfig { num_kv_heads: 1, kv_lens: vec![5], ..config });
        }
    }
}

#[test]
fn several_tiles_items_and_heads() {
    let layouts = [LayoutKind::Native, LayoutKind::LightLlm, LayoutKind::Hnd];
    for &layout in if cfg!(miri) { &layouts[..1] } else { &layouts[..] } {
        let page_len = if layout == LayoutKind::LightLlm { 1 } else { 16 };
        let config = CaseConfig { layout, page_len, kv_lens: vec![70, 0, 2], ..CaseConfig::default() };
        let (head_dim, group_len) = if cfg!(miri) { (16, 8) } else { (config.head_dim, config.k_group_len) };
        let config = CaseConfig { head_dim, k_group_len: group_len, v_group_len: group_len, ..config };
        run(&CaseConfig { num_kv_heads: 2, gqa_group: 2, ..config });
    }
}
