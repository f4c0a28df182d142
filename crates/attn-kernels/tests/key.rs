//! The table of variants: symbols, choice, and what a miss says.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use std::collections::BTreeSet;

use attn_kernels::abi::{PagedCache, Plane};
use attn_kernels::key::{
    Arithmetic, Groups, INSTANCES, KernelKey, KernelKind, KeyMiss, KeyQuery, Scales, check_append, items_of,
    select, shares_of,
};
use kv_quant::ScaleType;

/// A cache of `[page, slot, head, ...]` planes in buffers of their own.
fn cache(head_dim: u32, k_group_len: u32, v_group_len: u32, scale_type: ScaleType) -> PagedCache {
    let (heads, page_len) = (4_u64, 16_u64);
    let plane = |base: u64, row: u64| Plane {
        base,
        page_stride: page_len * heads * row,
        slot_stride: heads * row,
        head_stride: row,
    };
    PagedCache {
        k_codes: plane(1 << 20, head_dim.into()),
        v_codes: plane(2 << 20, head_dim.into()),
        k_scales: plane(3 << 20, (head_dim / k_group_len).into()),
        v_scales: plane(4 << 20, (head_dim / v_group_len).into()),
        num_pages: 64,
        page_len: page_len as u32,
        num_kv_heads: heads as u32,
        head_dim,
        k_group_len,
        v_group_len,
        scale_type: scale_type as u32,
        ..PagedCache::default()
    }
}

fn query(num_rows: u32) -> KeyQuery {
    KeyQuery { kind: KernelKind::Stage1, num_rows, arithmetic: Arithmetic::Mma, shared_bytes: 227 * 1024 }
}

#[test]
fn symbols_are_unique() {
    let symbols: BTreeSet<String> = INSTANCES.iter().map(|instance| instance.key.to_string()).collect();
    assert_eq!(symbols.len(), INSTANCES.len());
    for instance in INSTANCES {
        assert_eq!(instance.key.instance(), Ok(instance));
    }
}

/// `src/instances.rs` is written from `instances.toml`; `cargo xtask kernels` brings it up to date.
#[test]
fn the_rust_table_is_that_of_instances_toml() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/instances.toml");
    let Ok(text) = std::fs::read_to_string(path) else {
        println!("skipped: no instances.toml here (it is not part of a packaged crate)");
        return;
    };
    let table: toml::Table = text.parse().unwrap();
    let rows = table["instance"].as_array().unwrap();
    assert_eq!(rows.len(), INSTANCES.len());
    for (row, instance) in rows.iter().zip(INSTANCES) {
        let number = |name: &str| row[name].as_integer().unwrap() as u32;
        assert_eq!(number("head_dim"), instance.key.head_dim);
        assert_eq!(number("row_tiles"), instance.key.row_tiles);
        assert_eq!(number("shared_bytes"), instance.shared_bytes);
        assert_eq!(number("min_ctas"), instance.min_ctas);
        assert_eq!(number("max_heads"), instance.max_heads);
        assert_eq!(number("stages"), instance.stages);
        let symbol = instance.key.to_string();
        for part in ["kernel", "groups", "scales"] {
            assert!(symbol.contains(row[part].as_str().unwrap()), "{symbol}: {part}");
        }
        assert_eq!(symbol.ends_with("_f32"), row["arithmetic"].as_str() == Some("f32"), "{symbol}");
        let archs: Vec<&str> =
            row["archs"].as_array().unwrap().iter().map(|arch| arch.as_str().unwrap()).collect();
        assert_eq!(archs, instance.archs);
    }
}

#[test]
fn every_format_of_the_promise_has_a_variant() {
    for head_dim in [64, 96, 128, 192, 256] {
        for k_group_len in [8, 16, 32, 64, 128, head_dim] {
            for v_group_len in [8, 16, 32, 64, 128, head_dim] {
                if head_dim % k_group_len != 0 || head_dim % v_group_len != 0 {
                    continue;
                }
                for scale_type in ScaleType::ALL {
                    let cache = cache(head_dim, k_group_len, v_group_len, scale_type);
                    check_append(&cache).unwrap();
                    for arithmetic in [Arithmetic::Mma, Arithmetic::F32] {
                        for num_rows in [1, 8, 9, 16, 17, 64, 512] {
                            select(&cache, &KeyQuery { arithmetic, ..query(num_rows) }).unwrap();
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_special_variant_comes_before_the_general_one() {
    let key = |cache: &PagedCache, num_rows| select(cache, &query(num_rows)).unwrap().key;
    let g8 = key(&cache(128, 8, 8, ScaleType::F16), 4);
    assert_eq!((g8.groups, g8.scales, g8.row_tiles), (Groups::G8, Scales::F16, 1));
    assert_eq!(g8.to_string(), "kv8_stage1_d128_g8_sf16_n1");
    let g32 = key(&cache(128, 32, 64, ScaleType::F16), 4);
    assert_eq!((g32.groups, g32.scales), (Groups::G16, Scales::F16));
    let mixed = key(&cache(128, 8, 64, ScaleType::F32), 4);
    assert_eq!((mixed.groups, mixed.scales), (Groups::Any, Scales::Any));
    assert_eq!(key(&cache(128, 8, 8, ScaleType::F16), 9).row_tiles, 2, "one block of 16 rows");
    let whole = |scale_type, num_rows| key(&cache(128, 128, 128, scale_type), num_rows);
    assert_eq!(whole(ScaleType::F16, 4).to_string(), "kv8_stage1_d128_gw_sx_n1");
    assert_eq!(whole(ScaleType::F32, 16).to_string(), "kv8_stage1_d128_gw_sx_n2");
    assert_eq!(whole(ScaleType::F16, 32).to_string(), "kv8_stage1_d128_g16_sf16_n4", "one block of 32 rows");
    // Scale rows that are not aligned to 16 bytes go to the general variant.
    let mut odd = cache(128, 8, 8, ScaleType::F16);
    odd.k_scales.base += 2;
    assert_eq!(key(&odd, 4).groups, Groups::Any);
}

#[test]
fn a_miss_says_what_there_is() {
    let good = cache(128, 8, 8, ScaleType::F16);
    let miss = |cache: PagedCache| select(&cache, &query(4)).unwrap_err();
    let KeyMiss::HeadDim { head_dim, existing } = miss(cache(80, 8, 8, ScaleType::F16)) else { panic!() };
    assert_eq!((head_dim, existing), (80, vec![64, 96, 128, 192, 256]));
    assert_eq!(miss(PagedCache { page_len: 48, ..good }), KeyMiss::PageLen(48));
    let mut odd = good;
    odd.v_codes.slot_stride = 520;
    let text = miss(odd).to_string();
    assert!(text.contains("V codes") && text.contains("slot_stride is 520"), "{text}");
    let mut huge = good;
    huge.num_pages = u32::MAX;
    assert!(matches!(miss(huge), KeyMiss::Span { plane: "K codes", .. }));
    let small = KeyQuery { shared_bytes: 16 * 1024, ..query(4) };
    let text = select(&good, &small).unwrap_err().to_string();
    assert!(text.contains("kv8_stage1_d128_g8_sf16_n1"), "{text}");
    let key = KernelKey { row_tiles: 77, ..select(&good, &query(4)).unwrap().key };
    assert!(matches!(key.instance(), Err(KeyMiss::NoKey { .. })));
}

#[test]
fn each_kernel_of_eight_warps_stands_in_for_a_variant_of_stage_1() {
    let shares: Vec<_> = INSTANCES.iter().filter(|row| row.key.kind == KernelKind::Shares).collect();
    assert!(!shares.is_empty());
    for row in shares {
        let stage1 = KernelKey { kind: KernelKind::Stage1, ..row.key }.instance().unwrap();
        assert_eq!(shares_of(&stage1.key), Some(row));
        assert_eq!(row.key.to_string(), stage1.key.to_string().replace("stage1", "shares"));
        // Two blocks of 128 registers and the inbox beside each, up to 16 shares of all its rows.
        let inbox = 16 + (row.key.rows() * row.key.head_dim / 4).next_multiple_of(16) * 24;
        assert!(row.min_ctas * (row.shared_bytes + inbox + 1024) <= 228 * 1024, "{}", row.key);
    }
    for row in INSTANCES.iter().filter(|row| row.key.kind == KernelKind::Items) {
        let shares = KernelKey { kind: KernelKind::Shares, ..row.key }.instance().unwrap();
        let stage1 = KernelKey { kind: KernelKind::Stage1, ..row.key }.instance().unwrap();
        assert_eq!(items_of(&stage1.key), Some(row));
        assert_eq!(row.key.to_string(), stage1.key.to_string().replace("stage1", "items"));
        // The same rings, and no addresses to send to but a run's 32 bytes.
        assert_eq!((row.min_ctas, row.stages), (shares.min_ctas, shares.stages), "{}", row.key);
        let addresses = row.key.rows() * row.key.head_dim / 4 * 8;
        assert_eq!(row.shared_bytes - 32, shares.shared_bytes - addresses, "{}", row.key);
    }
    let f32 = KernelKey {
        arithmetic: Arithmetic::F32,
        groups: Groups::Any,
        scales: Scales::Any,
        ..INSTANCES[0].key
    };
    assert_eq!((shares_of(&f32), items_of(&f32)), (None, None));
}
