//! Cases that random ones seldom hit: every edge, every shape, every extreme.

use super::judge::judge;
use crate::case::{Case, Data, Rows};
use crate::subject::Subject;
use kv_quant::{FloatType, LayoutKind, ScaleType};

/// Judges each case; the first that is wrong ends it.
fn all(subject: &Subject, suite: &str, cases: impl IntoIterator<Item = Case>) -> Result<(), String> {
    for (seed, case) in cases.into_iter().enumerate() {
        judge(subject, suite, &Case { seed: case.seed + seed as u64, ..case })?;
    }
    Ok(())
}

/// A case by every schedule: throughput over many workers, three shares a request, and splits of one tile.
fn each_schedule(mut case: Case) -> [Case; 3] {
    case.config.num_workers = 16;
    [case.clone(), case.clone().shared_out(3), case.batch_invariant(1)]
}

/// Requests of no tokens: alone, among others, with sinks, with more new tokens than tokens, and batches of nothing.
///
/// # Errors
/// The first case that is wrong.
pub fn empty(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let batches: [&[u32]; 8] =
        [&[], &[0], &[0, 0, 0], &[0, 1], &[1, 0], &[3, 0, tile + 1], &[0, 2 * tile, 0, 0], &[1, 2, 3]];
    let mut cases = Vec::new();
    for kv_lens in batches {
        for (q_len, sinks, out_type) in [
            (1, false, FloatType::F32),
            (1, true, FloatType::F16),
            (3, false, FloatType::Bf16),
            (8, true, FloatType::F32),
        ] {
            let case = Case {
                kv_lens: kv_lens.to_vec(),
                q_len,
                sinks,
                out_type,
                gqa_group: 3,
                ..Case::plain(tile, 0)
            };
            cases.extend(each_schedule(case.clone()));
            cases.extend(each_schedule(Case { window: Some(2), alibi: true, num_kv_heads: 2, ..case }));
        }
    }
    all(subject, "empty", cases)
}

/// Every length from 0 to three tiles and two tokens, by every schedule.
///
/// # Errors
/// The first case that is wrong.
pub fn lengths(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let cases = (0..=3 * tile + 2).flat_map(|kv_len| {
        let page_len = [1, 2, 5, 16, 64][kv_len as usize % 5];
        each_schedule(Case { page_len, ..Case::small(tile, kv_len) })
    });
    all(subject, "lengths", cases)
}

/// A needle at the first and last token, at every edge of a tile, split and page, one before and one after; a decoy
/// behind the last token.
///
/// # Errors
/// The first case that is wrong.
pub fn needles(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let mut cases = Vec::new();
    for (kv_len, page_len) in [(4 * tile + 7, 16), (3 * tile, subject.page_len(5, 4)), (2 * tile + 1, 1)] {
        let mut at = vec![0, 1, kv_len / 2, kv_len - 2, kv_len - 1];
        let edges = (1..=kv_len / tile).map(|n| n * tile).chain((1..6).map(|n| n * page_len));
        at.extend(edges.flat_map(|edge| [edge - 1, edge, edge + 1]).filter(|t| *t < kv_len));
        at.sort_unstable();
        at.dedup();
        for token in at {
            let case = Case {
                page_len,
                gqa_group: 2,
                num_kv_heads: 2,
                head_dim: 64,
                layout: if token % 2 == 0 { LayoutKind::Native } else { LayoutKind::Nhd },
                // Multiples of three have no decoy but poison.
                seed: 1,
                ..Case::plain(tile, kv_len)
            };
            cases.extend(each_schedule(case.with_data(Data::NeedleAt(token))));
        }
    }
    all(subject, "needles", cases)
}

/// Windows whose edge lies on, before and behind a needle, over tile and page edges.
///
/// # Errors
/// The first case that is wrong.
pub fn windows(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let kv_len = 3 * tile + 3;
    let mut cases = Vec::new();
    for window in
        [1, 2, 3, tile - 1, tile, tile + 1, tile + 3, 2 * tile + 3, kv_len - 1, kv_len, kv_len + 1, u32::MAX]
    {
        for needle in
            [kv_len.saturating_sub(window.saturating_add(1)), kv_len.saturating_sub(window), kv_len - 1]
        {
            for q_len in [1, 3] {
                let case = Case { window: Some(window), q_len, page_len: 4, ..Case::small(tile, kv_len) };
                cases.extend(each_schedule(case.with_data(Data::NeedleAt(needle))));
            }
        }
    }
    all(subject, "windows", cases)
}

/// Every format: head dimension, group length, scale type; and K and V groups that differ.
///
/// # Errors
/// The first case that is wrong.
pub fn formats(subject: &Subject) -> Result<(), String> {
    let profile = subject.profile();
    let mut cases = Vec::new();
    for &(head_dim, _) in &profile.head_dims {
        let groups = profile.groups_of(head_dim);
        for (i, &k_group_len) in groups.iter().enumerate() {
            for (j, &scale_type) in profile.scale_types.iter().enumerate() {
                let v_group_len = if j == 0 { k_group_len } else { groups[(i + j) % groups.len()] };
                let layout = [LayoutKind::Native, LayoutKind::Hnd, LayoutKind::Nhd][(i + j) % 3];
                let case = Case {
                    head_dim,
                    k_group_len,
                    v_group_len,
                    scale_type,
                    layout,
                    ..Case::plain(profile.tile_len, 70)
                };
                cases.push(Case { gqa_group: 1 + i as u32 % 5, num_kv_heads: 2, ..case.clone() });
                cases.push(Case { data: Data::Raw, ..case });
            }
        }
    }
    all(subject, "formats", cases)
}

/// Every GQA group with every number of new tokens.
///
/// # Errors
/// The first case that is wrong.
pub fn heads(subject: &Subject) -> Result<(), String> {
    let profile = subject.profile();
    let mut cases = Vec::new();
    for gqa_group in profile.gqa_groups.iter().copied().chain(9..=11) {
        for q_len in profile.q_lens.clone() {
            let case = Case {
                gqa_group,
                q_len,
                num_kv_heads: 1 + gqa_group % 3,
                ..Case::small(profile.tile_len, 30)
            };
            let masked = gqa_group % 2 == 0;
            cases.push(Case { alibi: masked, sinks: q_len % 2 == 0, window: masked.then_some(17), ..case });
        }
    }
    all(subject, "heads", cases)
}

/// Every combination of element types, with data that use their range.
///
/// # Errors
/// The first case that is wrong.
pub fn types(subject: &Subject) -> Result<(), String> {
    let profile = subject.profile();
    let mut cases = Vec::new();
    for in_type in FloatType::ALL {
        for &q_type in &profile.q_types {
            for &out_type in &profile.out_types {
                for scale_type in ScaleType::ALL {
                    for data in [Data::Normal(1.0), Data::Normal(1e-4), Data::Normal(300.0)] {
                        let case = Case {
                            in_type,
                            q_type,
                            out_type,
                            scale_type,
                            gqa_group: 3,
                            ..Case::small(profile.tile_len, 21)
                        };
                        cases.push(case.with_data(data));
                    }
                }
            }
        }
    }
    all(subject, "types", cases)
}

/// Every layout with every page length, both forms of the page table.
///
/// # Errors
/// The first case that is wrong.
pub fn layouts(subject: &Subject) -> Result<(), String> {
    let profile = subject.profile();
    let mut cases = Vec::new();
    for &layout in &profile.layouts {
        for &page_len in &profile.page_lens {
            for rows in [Rows::Padded, Rows::Scattered] {
                let page_len = if layout == LayoutKind::LightLlm { 1 } else { page_len };
                let kv_lens = vec![page_len, 2 * page_len + 1, page_len - 1, 33];
                let case = Case {
                    layout,
                    page_len,
                    rows,
                    kv_lens,
                    num_kv_heads: 2,
                    gqa_group: 2,
                    ..Case::small(profile.tile_len, 0)
                };
                cases.push(Case { shares_prefix: true, ..case.clone() });
                cases.push(Case { window: Some(page_len), ..case });
            }
        }
    }
    all(subject, "layouts", cases)
}

/// Every mask and scale feature alone and all together, over lengths that are split.
///
/// # Errors
/// The first case that is wrong.
pub fn masks(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let mut cases = Vec::new();
    for bits in 0..16u32 {
        for scale_factor in [1.0, -1.0, 0.0, 5.0] {
            for q_len in [1, 4] {
                let case = Case {
                    window: (bits & 1 != 0).then_some(tile + 5),
                    soft_cap: (bits & 2 != 0).then_some(if q_len == 1 { 2.0 } else { 50.0 }),
                    alibi: bits & 4 != 0,
                    sinks: bits & 8 != 0,
                    scale_factor,
                    q_len,
                    num_kv_heads: 2,
                    gqa_group: 3,
                    kv_lens: vec![2 * tile + 9, 3, 0],
                    ..Case::small(tile, 0)
                };
                cases.extend(each_schedule(case));
            }
        }
    }
    all(subject, "masks", cases)
}

/// Batches of many requests, most of them short.
///
/// # Errors
/// The first case that is wrong.
pub fn batches(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let cases = [2usize, 31, 64, 65, 257].into_iter().flat_map(|batch| {
        let ragged = |i: usize| if i % 13 == 5 { 2 * tile + i as u32 } else { (i as u32 * 7) % 23 };
        each_schedule(Case {
            kv_lens: (0..batch).map(ragged).collect(),
            gqa_group: 2,
            ..Case::small(tile, 0)
        })
    });
    all(subject, "batches", cases)
}

/// Fixed cuts of one, two and four tiles in groups of 8, dealt to so few workers that pieces follow each other in one: to a last piece that is
/// whole, shorter, and of one token.
///
/// # Errors
/// The first case that is wrong.
pub fn runs(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let kv_lens = vec![8 * tile, 3 * tile + 5, 1, 0, 8 * tile + 1, tile - 1];
    let case = Case { kv_lens, gqa_group: 3, k_group_len: 8, v_group_len: 8, ..Case::plain(tile, 0) };
    let mut cases = Vec::new();
    for tiles in [1, 2, 4] {
        for layout in [LayoutKind::Native, LayoutKind::Hnd] {
            for num_workers in [1, 2, 3] {
                let mut case = Case { layout, ..case.clone() }.batch_invariant(tiles);
                case.config.num_workers = num_workers;
                cases.push(case);
            }
        }
    }
    all(subject, "runs", cases)
}

/// Lengths beyond 8192 and 131072, and 1,048,576 if `has_longest`.
///
/// # Errors
/// The first case that is wrong.
pub fn long(subject: &Subject, has_longest: bool) -> Result<(), String> {
    let tile = subject.tile_len();
    let mut lens = vec![8191, 8192, 8193, 131_073];
    if has_longest {
        lens.push(1_048_576);
    }
    let cases = lens.into_iter().flat_map(|kv_len| {
        let mut case = Case { page_len: 16, ..Case::small(tile, kv_len) };
        case.config.num_workers = 132;
        let needle = case.clone().batch_invariant(2048 / tile).with_data(Data::Needle(1.0));
        if kv_len > 10_000 { vec![needle] } else { vec![case, needle] }
    });
    all(subject, "long", cases)
}
