//! Indices that no host has looked at: pages and slots out of range are masked, reported, and never followed.

use super::text;
use crate::case::Case;
use crate::compare::{self, Run};
use crate::count::Ledger;
use crate::guarded::Guarded;
use crate::numbers::Numbers;
use crate::problem::{Problem, Tokens};
use crate::subject::buffers;
use crate::values::Values;
use attn_backend::{Backend, CudaBackend, Descriptor, Error, Executor, Input, NormalDecode, Output};
use attn_kernels::key::Arithmetic;
use attn_plan::SplitPlan;
use cpu_reference::oracle;
use kv_quant::{FloatType, LayoutKind};

/// Tables with bad pages in the first, the last and middle places of a row, and appends to bad slots.
///
/// # Errors
/// What was followed, not reported, or reported as something else.
pub fn bad_indices(ledger: &Ledger) -> Result<(), String> {
    for arithmetic in [Arithmetic::Mma, Arithmetic::F32] {
        let guarded = Guarded { arithmetic, heads_per_block: None };
        let plain = CudaBackend { arithmetic, ..CudaBackend::default() };
        for (seed, (layout, page_len)) in [
            (LayoutKind::LightLlm, 1u32),
            (LayoutKind::Native, 16),
            (LayoutKind::Native, 1),
            (LayoutKind::Hnd, 64),
            (LayoutKind::Nhd, 4),
        ]
        .into_iter()
        .enumerate()
        {
            let mut case = Case {
                layout,
                page_len,
                num_kv_heads: 4,
                gqa_group: 3,
                k_group_len: 8,
                v_group_len: 8,
                kv_lens: vec![200, 90],
                seed: seed as u64,
                ..Case::plain(64, 0)
            };
            case.config.num_workers = 5;
            for (turn, bad) in [-1, i32::MIN, i32::MAX, 0x4000_0000, -2].into_iter().enumerate() {
                // By workers and in shares, in turn.
                case.config.num_shares = [0, 3][turn % 2];
                bad_page(&guarded, &plain, &case, bad).map_err(|error| format!("{error}\n  in {case:?}"))?;
                ledger.ran("gpu", "page tables with bad indices", 1);
            }
            for bad in [-2, i64::MIN, i64::MAX, 1 << 32] {
                bad_slot(&[&guarded, &plain], &case, bad)
                    .map_err(|error| format!("{error}\n  in {case:?}"))?;
                ledger.ran("gpu", "appends to bad slots", 1);
            }
        }
    }
    Ok(())
}

fn open(backend: &dyn Backend, problem: &Problem) -> Result<Box<dyn Executor>, String> {
    let descriptor = Descriptor::new(problem.layout.clone(), problem.spec.clone());
    backend.open(&descriptor, Default::default(), None).map_err(text)
}

fn write_image(executor: &mut dyn Executor, problem: &Problem) -> Result<(), String> {
    let mut images = buffers(&problem.layout, &problem.image).into_iter().enumerate();
    images.try_for_each(|(buffer, bytes)| executor.write_bytes(buffer, 0, bytes)).map_err(text)
}

/// Decodes with some pages of request 0 out of range: the other tokens decide its result, request 1 has its own.
fn bad_page(guarded: &Guarded, plain: &CudaBackend, case: &Case, bad: i32) -> Result<(), String> {
    let mut problem = Problem::new(case);
    let mut numbers = Numbers::new(case.seed, 11);
    let first = problem.step.row_starts[0] as usize;
    let num_entries = case.kv_lens[0].div_ceil(case.page_len) as usize;
    let mut entries = vec![0, num_entries - 1, numbers.below(num_entries)];
    entries.dedup();
    entries.truncate(num_entries.div_ceil(2));
    let kept: Vec<u32> =
        (0..case.kv_lens[0]).filter(|t| !entries.contains(&((t / case.page_len) as usize))).collect();
    let expected = expected(&problem, &kept)?;
    for &entry in &entries {
        problem.step.pages[first + entry] = bad;
    }
    let plan = SplitPlan::new(&problem.spec, &case.kv_lens, &case.config).map_err(text)?;
    let spec = &problem.spec;
    let decode = |backend: &dyn Backend| -> Result<(Error, Run), String> {
        let mut executor = open(backend, &problem)?;
        write_image(executor.as_mut(), &problem)?;
        let request = problem.request();
        executor.plan(&request, &plan).map_err(text)?;
        let mut out = Values::untouched(FloatType::F32, spec.q_elements(2));
        let mut lse = Values::untouched(FloatType::F32, spec.lse_elements(2));
        let (out_len, lse_len) = (out.len(), lse.len());
        let step = NormalDecode {
            request,
            plan: &plan,
            q: Input::Host(problem.step.q.as_slice()),
            out: Output::Host(out.part_mut(0..out_len)),
            lse: Some(Output::Host(lse.part_mut(0..lse_len))),
        };
        match executor.normal_decode(step) {
            Ok(()) => Err(format!("page {bad} was not reported")),
            Err(error) => {
                for (buffer, want) in buffers(&problem.layout, &problem.image).into_iter().enumerate() {
                    let mut got = vec![0; want.len()];
                    executor.read_bytes(buffer, 0, &mut got).map_err(text)?;
                    if got != want {
                        return Err(format!("page {bad}: the cache has changed"));
                    }
                }
                Ok((error, Run { out, lse: Some(lse) }))
            }
        }
    };
    let (_, run) = decode(guarded)?;
    let arithmetic = guarded.arithmetic(spec, &plan);
    compare::with_oracle(spec, &expected, &arithmetic, &run)
        .map_err(|error| format!("page {bad}: {error}"))?;
    match decode(plain)?.0 {
        Error::Plan(attn_plan::Error::PageOutOfRange { request: 0, page, num_pages, position })
            if page == bad
                && num_pages == problem.layout.num_pages()
                && entries.contains(&(position as usize)) =>
        {
            Ok(())
        }
        other => Err(format!("page {bad} was reported as {other:?}")),
    }
}

/// The oracle over the tokens of request 0 that can be reached, and over request 1.
fn expected(problem: &Problem, kept: &[u32]) -> Result<Vec<oracle::OracleOutput>, String> {
    let request = problem.request();
    let row = problem.layout.format().row_elements();
    let per_request = problem.spec.q_elements(1);
    (0..2usize)
        .map(|idx| {
            let (mut k, mut v) =
                oracle::gather(&problem.layout, &problem.image.view(), &request, idx).map_err(text)?;
            if idx == 0 {
                let keep = |x: &[f64]| -> Vec<f64> {
                    kept.iter().flat_map(|&t| &x[t as usize * row..][..row]).copied().collect()
                };
                (k, v) = (keep(&k), keep(&v));
            }
            let q: Vec<f64> =
                (idx * per_request..(idx + 1) * per_request).map(|i| problem.step.q.get(i)).collect();
            oracle::decode(&problem.spec, (k.len() / row) as u32, &q, &k, &v).map_err(text)
        })
        .collect()
}

/// Appends tokens of which some have bad slots: the others are written, nothing else is, and the error names the slot.
fn bad_slot(backends: &[&dyn Backend], case: &Case, bad: i64) -> Result<(), String> {
    let problem = Problem::new(case);
    let Some(Tokens { k, v, slots }) = &problem.tokens else { return Err("the case has tokens".to_owned()) };
    let mut numbers = Numbers::new(case.seed, 12);
    let row = problem.layout.format().row_elements();
    // Extra tokens of finite values, so that the slot is all that is wrong with them.
    let at = numbers.below(slots.len() + 1);
    let with = |x: &Values| -> Values {
        let mut values: Vec<f32> = (0..x.len()).map(|i| x.get(i) as f32).collect();
        values.splice(at * row..at * row, std::iter::repeat_n(0.5, row));
        Values::from_f32(x.float_type(), &values)
    };
    let (k, v) = (with(k), with(v));
    let mut slots = slots.clone();
    slots.insert(at, bad);
    for backend in backends {
        let mut executor = open(*backend, &problem)?;
        for (buffer, bytes) in buffers(&problem.layout, &problem.dead).into_iter().enumerate() {
            executor.write_bytes(buffer, 0, bytes).map_err(text)?;
        }
        let appended = executor.append(Input::Host(k.as_slice()), Input::Host(v.as_slice()), &slots);
        match appended.and_then(|()| executor.synchronize()) {
            Err(Error::Cache(kv_quant::Error::SlotOutOfRange { token, slot, .. }))
                if token == at && slot == bad => {}
            other => return Err(format!("{}: slot {bad} gave {other:?}", backend.id())),
        }
        for (buffer, want) in buffers(&problem.layout, &problem.image).into_iter().enumerate() {
            let mut got = vec![0; want.len()];
            executor.read_bytes(buffer, 0, &mut got).map_err(text)?;
            if got != want {
                return Err(format!("{}: slot {bad}: buffer {buffer} has other bytes", backend.id()));
            }
        }
    }
    Ok(())
}
