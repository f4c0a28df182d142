//! Random damage to a valid call: either it is refused with a typed error and nothing changed, or it was no damage and
//! the result is the oracle's. Never a panic.

use super::bench::{Bench, Seen};
use crate::compare::{self, Run};
use crate::count::{Ledger, persistence};
use crate::values::Values;
use attn_backend::{Backend, CpuBackend, Session, SessionOptions};
use attn_plan::SplitPolicy;
use cpu_reference::oracle;
use kv_quant::{CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, PlaneId, ScaleType};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};

/// One change to a call.
#[derive(Clone, Debug)]
enum Damage {
    NumQHeads(u32),
    NumKvHeads(u32),
    HeadDim(u32),
    QLen(u32),
    Scale(f32),
    Window(u32),
    SoftCap(f32),
    Slopes(Vec<f32>),
    Sinks(Vec<f32>),
    KvLen(usize, u32),
    Page(usize, i32),
    Stride(u64),
    Starts(Vec<u64>),
    Workers(u32),
    Tile(u32),
    Split(u32),
    Q(usize),
    Out(usize),
    Lse(usize),
    Format([u32; 4]),
    Planes(usize, [u64; 4], usize),
}

fn edge() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(2),
        0u32..70,
        Just(255),
        Just(256),
        Just(65536),
        Just(u32::MAX),
        any::<u32>()
    ]
}

fn wide() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..600, 1 => Just(u64::MAX), 1 => Just(1 << 62), 1 => any::<u64>()]
}

fn number() -> impl Strategy<Value = f32> {
    prop_oneof![4 => -4.0f32..4.0, 1 => Just(f32::NAN), 1 => Just(f32::INFINITY), 1 => Just(0.0), 1 => Just(-0.0)]
}

fn damage() -> impl Strategy<Value = Damage> {
    let page = prop_oneof![0i32..9, Just(-1), any::<i32>()];
    let group = || prop_oneof![proptest::sample::select(vec![8u32, 16, 32]), edge()];
    prop_oneof![
        edge().prop_map(Damage::NumQHeads),
        edge().prop_map(Damage::NumKvHeads),
        edge().prop_map(Damage::HeadDim),
        prop_oneof![1u32..9, edge()].prop_map(Damage::QLen),
        number().prop_map(Damage::Scale),
        edge().prop_map(Damage::Window),
        number().prop_map(Damage::SoftCap),
        prop::collection::vec(number(), 0..7).prop_map(Damage::Slopes),
        prop::collection::vec(number(), 0..7).prop_map(Damage::Sinks),
        (0usize..3, prop_oneof![0u32..14, edge()]).prop_map(|(i, n)| Damage::KvLen(i, n)),
        (0usize..9, page).prop_map(|(i, page)| Damage::Page(i, page)),
        prop_oneof![0u64..12, wide()].prop_map(Damage::Stride),
        prop::collection::vec(prop_oneof![0u64..9, wide()], 2..5).prop_map(Damage::Starts),
        edge().prop_map(Damage::Workers),
        edge().prop_map(Damage::Tile),
        edge().prop_map(Damage::Split),
        (380usize..390).prop_map(Damage::Q),
        (380usize..390).prop_map(Damage::Out),
        (9usize..15).prop_map(Damage::Lse),
        (1u32..4, edge(), group(), group()).prop_map(|(h, d, k, v)| Damage::Format([h, d, k, v])),
        (0usize..4, [wide(), wide(), wide(), wide()], 0usize..6)
            .prop_map(|(p, s, b)| Damage::Planes(p, s, b)),
    ]
}

/// Applies one change; layouts that cannot be made are refused here already.
fn apply(bench: &mut Bench, damage: &Damage) -> Option<Seen> {
    match damage.clone() {
        Damage::NumQHeads(n) => bench.spec.num_q_heads = n,
        Damage::NumKvHeads(n) => bench.spec.num_kv_heads = n,
        Damage::HeadDim(n) => bench.spec.head_dim = n,
        Damage::QLen(n) => bench.spec.q_len = n,
        Damage::Scale(x) => bench.spec.softmax_scale = x,
        Damage::Window(n) => bench.spec.window = Some(n),
        Damage::SoftCap(x) => bench.spec.soft_cap = Some(x),
        Damage::Slopes(x) => bench.spec.alibi_slopes = Some(x),
        Damage::Sinks(x) => bench.spec.sinks = Some(x),
        Damage::KvLen(i, n) => bench.kv_lens[i] = n,
        Damage::Page(i, page) => bench.pages[i] = page,
        Damage::Stride(n) => bench.page_stride = n,
        Damage::Starts(starts) => bench.page_starts = Some(starts),
        Damage::Workers(n) => bench.config.num_workers = n,
        Damage::Tile(n) => bench.config.tile_len = n,
        Damage::Split(split_len) => bench.config.policy = SplitPolicy::BatchInvariant { split_len },
        Damage::Q(n) => bench.q.resize(n, 0.5),
        Damage::Out(n) => bench.out.resize(n, 0.0),
        Damage::Lse(n) => bench.lse.resize(n, 0.0),
        Damage::Format([heads, dim, k, v]) => match CacheFormat::new(heads, dim, k, v, ScaleType::F16) {
            Err(error) => return Some(Seen::Quant(error)),
            // Valid, but of another cache than the spec's unless nothing changed.
            Ok(format) => match CacheLayout::hnd(format, 8, 4) {
                Err(error) => return Some(Seen::Quant(error)),
                Ok(layout) if layout.buffer_bytes() == bench.layout.buffer_bytes() => bench.layout = layout,
                Ok(layout) => return Some(bench.request().check(&layout).into()),
            },
        },
        Damage::Planes(which, strides, buffer_idx) => {
            let mut planes = PlaneId::ALL.map(|id| *bench.layout.plane(id));
            let [offset, page_stride, slot_stride, head_stride] = strides;
            planes[which] = kv_quant::Plane { buffer_idx, offset, page_stride, slot_stride, head_stride };
            match CacheLayout::custom(*bench.layout.format(), 8, 4, planes) {
                Err(error) => return Some(Seen::Quant(error)),
                // Valid, and larger than the bench's buffers.
                Ok(layout) => return Some(bench.cache.view().check(&layout).into()),
            }
        }
    }
    None
}

/// Opens, plans and decodes as the bench stands.
fn decode(bench: &mut Bench) -> Result<Run, Seen> {
    let refused = |seen: Seen| seen;
    let selection = bench.select(&bench.descriptor()).map_err(|error| refused(Err::<(), _>(error).into()))?;
    let options = SessionOptions { split: Some(bench.config), ..Default::default() };
    let mut session = Session::open(&selection, options).map_err(|error| Seen::from(Err::<(), _>(error)))?;
    for (buffer_idx, bytes) in crate::subject::buffers(&bench.layout, &bench.cache).into_iter().enumerate() {
        session.write_bytes(buffer_idx, 0, bytes).map_err(|error| Seen::from(Err::<(), _>(error)))?;
    }
    let launches = bench.launches();
    let seen: Seen = session.plan(&bench.kv_lens, bench.request().page_table).into();
    if !matches!(seen, Seen::Accepted) {
        assert_eq!(launches, bench.launches(), "refused and yet planned");
        return Err(seen);
    }
    let launches = bench.launches();
    let (q, out) = (FloatSlice::F32(&bench.q), FloatSliceMut::F32(&mut bench.out));
    let seen: Seen = session.decode(q, out, Some(&mut bench.lse)).into();
    if !matches!(seen, Seen::Accepted) {
        assert_eq!(launches, bench.launches(), "refused and yet launched");
        return Err(seen);
    }
    Ok(Run { out: Values::F32(bench.out.clone()), lse: Some(Values::F32(bench.lse.clone())) })
}

fn one(damages: &[Damage], ledger: &Ledger) -> Result<(), String> {
    let mut bench = Bench::new();
    for damage in damages {
        match apply(&mut bench, damage) {
            Some(Seen::Accepted) => return Ok(()),
            Some(_) => {
                ledger.tally("damaged calls refused", 1);
                return Ok(());
            }
            None => {}
        }
    }
    let before = bench.snapshot();
    match decode(&mut bench) {
        Err(Seen::Accepted) => Err("refused without an error".to_owned()),
        Err(seen) => {
            if seen.to_string().len() < 10 {
                return Err(format!("the error says nothing: {seen}"));
            }
            if bench.snapshot() != before {
                return Err(format!("refused ({seen}), but outputs changed"));
            }
            ledger.tally("damaged calls refused", 1);
            Ok(())
        }
        Ok(run) => {
            let request = bench.request();
            let expected = oracle::decode_request(
                &bench.layout,
                &bench.cache.view(),
                &request,
                FloatSlice::F32(&bench.q),
            )
            .map_err(|error| format!("accepted, but the oracle refuses: {error}"))?;
            let plan = attn_plan::SplitPlan::new(&bench.spec, &bench.kv_lens, &bench.config)
                .map_err(|error| format!("accepted, but the plan refuses: {error}"))?;
            let arithmetic = CpuBackend.arithmetic(&bench.spec, &plan);
            compare::with_oracle(&bench.spec, &expected, &arithmetic, &run)?;
            ledger.tally("damaged calls that were still valid, and right", 1);
            Ok(())
        }
    }
}

/// Damages `num_cases` calls.
///
/// # Errors
/// The smallest damage that was neither refused nor computed right.
pub fn fuzz(ledger: &Ledger, num_cases: u32) -> Result<(), String> {
    let config =
        Config { cases: num_cases, failure_persistence: persistence("malformed"), ..Config::default() };
    let outcome = TestRunner::new(config).run(&prop::collection::vec(damage(), 1..4), |damages| {
        one(&damages, ledger).map_err(TestCaseError::fail)
    });
    outcome.map_err(|error| match error {
        TestError::Fail(reason, damages) => format!("{reason}\n  shrunk to {damages:?}"),
        TestError::Abort(reason) => format!("aborted: {reason}"),
    })
}
