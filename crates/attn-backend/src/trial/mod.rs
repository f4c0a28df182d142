//! The trial of a candidate: a real decode of the caller's own descriptor, judged by the oracle's a-priori bound.
//!
//! The caller's formats, strides, page length, heads, masks and types, over a small cache: lengths on both sides of
//! tiles, splits, pages and windows, needles at their edges, poison in every slot that holds no token. Append is
//! compared byte for byte with the format's rule, the bytes around it included.
//!
//! A trial runs in a thread or in a child process, under a time limit:
//!
//! | what a candidate does | thread | child process |
//! |---|---|---|
//! | wrong numbers, NaN, stray writes to the cache | refused | refused |
//! | returns an error, panics | refused | refused |
//! | hangs | refused; the hung thread stays behind | refused and killed |
//! | crashes (segmentation fault, abort), exhausts memory | takes this process along | refused |
//! | poisons its device context | later calls in this process fail | refused; this process's context is untouched |
//!
//! A build with `panic = "abort"` has no protection against panics in a thread; use a process there.

mod case;
mod child;
mod floats;
mod judge;
mod shrink;
mod thread;
mod wire;

pub use child::answer;
pub(crate) use child::{find_binary, run_in_child};
pub(crate) use thread::{panic_text, run_in_thread};
pub(crate) use wire::verdict_key;

use crate::{Array, Backend, Descriptor, Isolation, Session, SessionOptions};
use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitConfig, SplitPolicy};
use case::Case;
use kv_quant::{CacheBuffers, CacheLayout, PageCopy};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// What a passed trial showed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Output elements compared with the oracle.
    pub num_compared: u64,
    /// The largest error as a share of its bound, 0 to 1.
    pub worst_share: f64,
    /// Where it ran.
    pub isolation: Isolation,
    /// Time it took.
    pub elapsed: Duration,
    /// Whether the verdict is an earlier one for the same device, driver, build and descriptor.
    pub is_cached: bool,
}

/// How a trial failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum TrialFailure {
    /// An output element is off by more than the bound, or not a number.
    #[error(
        "{array} of request {request} ({kv_len} tokens), row {row}, head {head}, channel {channel} is {got:e}; \
         expected {want:e} within {bound:e}"
    )]
    Wrong {
        /// out or lse.
        array: Array,
        /// Request of the trial batch.
        request: usize,
        /// Its length.
        kv_len: u32,
        /// Query row of the request.
        row: u32,
        /// Query head.
        head: u32,
        /// Channel; 0 for lse.
        channel: u32,
        /// What the backend computed.
        #[serde(with = "wire::text")]
        got: f64,
        /// What the oracle computed.
        #[serde(with = "wire::text")]
        want: f64,
        /// The a-priori error bound.
        #[serde(with = "wire::text")]
        bound: f64,
    },
    /// Append or a page copy left other bytes in the cache than the format's rule says.
    #[error(
        "after {after}, byte {offset} of cache buffer {buffer_idx} is {got:#04x}; the format says {want:#04x}"
    )]
    Bytes {
        /// "append" or "copy_pages".
        after: String,
        /// Which buffer.
        buffer_idx: usize,
        /// Which byte.
        offset: u64,
        /// What the backend wrote (or touched).
        got: u8,
        /// What it should be.
        want: u8,
    },
    /// The backend returned an error.
    #[error("{0}")]
    Error(String),
    /// The backend panicked.
    #[error("panic: {0}")]
    Panic(String),
    /// No verdict within the time limit.
    #[error("no verdict within {0:?}")]
    TimeLimit(Duration),
    /// The child process could not be used, died, or answered nonsense.
    #[error("child process: {0}")]
    Child(String),
}

impl From<crate::Error> for TrialFailure {
    fn from(error: crate::Error) -> Self {
        TrialFailure::Error(error.to_string())
    }
}

impl From<kv_quant::Error> for TrialFailure {
    fn from(error: kv_quant::Error) -> Self {
        TrialFailure::Error(error.to_string())
    }
}

/// Counts of one trial.
#[derive(Default)]
struct Tally {
    num_compared: u64,
    worst_share: f64,
}

/// Runs the trial in this thread, with no protection but the verdict.
pub(crate) fn run(backend: &dyn Backend, descriptor: &Descriptor) -> Result<Evidence, TrialFailure> {
    let start = Instant::now();
    let mut tally = Tally::default();
    for spec in descriptor.specs() {
        try_spec(backend, descriptor, spec, &mut tally)?;
    }
    Ok(Evidence {
        num_compared: tally.num_compared,
        worst_share: tally.worst_share,
        isolation: Isolation::Thread,
        elapsed: start.elapsed(),
        is_cached: false,
    })
}

fn try_spec(
    backend: &dyn Backend,
    descriptor: &Descriptor,
    spec: &DecodeSpec,
    tally: &mut Tally,
) -> Result<(), TrialFailure> {
    let split = backend.split_config(descriptor);
    let case = Case::new(&descriptor.layout, spec, &split)?;
    let mut expected = CacheBuffers::zeroed(&case.layout)?;
    poison(&case.layout, &mut expected);

    let small = Descriptor {
        layout: case.layout.clone(),
        spec: spec.clone(),
        also: Vec::new(),
        ..descriptor.clone()
    };
    let mut session = Session::on(backend, &small, SessionOptions::default())?;
    for (buffer_idx, buffer) in expected.as_mut_vecs().iter().enumerate() {
        session.write_bytes(buffer_idx, 0, buffer)?;
    }
    for tokens in case.appends() {
        let (k, v, slots) = case.tokens(tokens);
        kv_quant::append(&case.layout, &mut expected.view_mut(), k, v, slots)?;
        session.append(k, v, slots)?;
    }
    compare_bytes("append", &mut session, &mut expected)?;

    for split in [split, finer(&split)] {
        session.set_split(split)?;
        let table = PageTable::padded(&case.pages, case.stride);
        session.plan(&case.kv_lens, table)?;
        let mut out = case.out();
        let mut lse = case.lse();
        session.decode(case.q.slice(), out.slice_mut(), lse.as_deref_mut())?;
        let request = DecodeRequest { spec, kv_lens: &case.kv_lens, page_table: table };
        let arithmetic = backend.arithmetic(spec, session.split_plan());
        judge::judge(
            &case.layout,
            &expected.view(),
            &request,
            &case.q,
            &out,
            lse.as_deref(),
            &arithmetic,
            tally,
        )?;
    }

    if let Some((src, dst)) = case.copy {
        let copy = PageCopy { src, dst };
        expected.copy_page(&case.layout, src, dst)?;
        session.copy_pages(&[copy])?;
        compare_bytes("copy_pages", &mut session, &mut expected)?;
    }
    Ok(())
}

/// The same policy over more workers and smaller pieces, so that merging is exercised on few tokens.
fn finer(split: &SplitConfig) -> SplitConfig {
    match split.policy {
        SplitPolicy::Throughput => {
            let dealt = SplitConfig { num_shares: 0, item_tiles: 0, ..*split };
            SplitConfig { num_workers: 7, item_overhead: 0, min_split_tiles: 1, ..dealt }
        }
        // The cuts are fixed; only the dealing may differ.
        SplitPolicy::BatchInvariant { .. } => SplitConfig { num_workers: 3, ..*split },
    }
}

/// Code -128 everywhere, NaN in every scale (and in every value of a format that stores floats): what no token has
/// written must not be read.
fn poison(layout: &CacheLayout, buffers: &mut CacheBuffers) {
    use kv_quant::{PlaneId, ScaleType, Side};
    let is_int8 = layout.element_bytes(PlaneId::Codes(Side::K)) == 1;
    buffers.as_mut_vecs().iter_mut().for_each(|buffer| buffer.fill(if is_int8 { 0x80 } else { 0xff }));
    let nan: &[u8] = match layout.format().scale_type() {
        ScaleType::F16 => &[0x00, 0x7e],
        ScaleType::Bf16 => &[0xc0, 0x7f],
        ScaleType::F32 => &[0x00, 0x00, 0xc0, 0x7f],
    };
    let mut view = buffers.view_mut();
    for side in [Side::K, Side::V] {
        for slot in 0..layout.num_slots() {
            for head in 0..layout.format().num_kv_heads() {
                let (buffer_idx, range) = layout.row_bytes(PlaneId::Scales(side), slot, head);
                let row = view.bytes_mut(buffer_idx, range);
                row.chunks_exact_mut(nan.len()).for_each(|scale| scale.copy_from_slice(nan));
            }
        }
    }
}

fn compare_bytes(
    after: &str,
    session: &mut Session<'_>,
    expected: &mut CacheBuffers,
) -> Result<(), TrialFailure> {
    for (buffer_idx, want) in expected.as_mut_vecs().iter().enumerate() {
        let mut got = vec![0u8; want.len()];
        session.read_bytes(buffer_idx, 0, &mut got)?;
        if let Some((offset, (&got, &want))) =
            got.iter().zip(want).enumerate().find(|(_, (got, want))| got != want)
        {
            return Err(TrialFailure::Bytes {
                after: after.to_owned(),
                buffer_idx,
                offset: offset as u64,
                got,
                want,
            });
        }
    }
    Ok(())
}
