//! Backends with one fault each, around the CPU backend, and descriptors to try them on.

use attn_backend::{
    Array, Backend, BackendId, Capability, CpuBackend, Descriptor, Device, Error, Executor, FormatKey, Input,
    Memory, NormalDecode, Operation, OperationKey, Output, Refusal, Registry, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan};
use cpu_reference::Arithmetic;
use kv_quant::{CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, PageCopy, ScaleType};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// What is wrong with a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "each test program uses some")]
pub enum Fault {
    None,
    Unavailable,
    NoWindow,
    ProbePanics,
    Panics,
    Hangs,
    Errs,
    Nan,
    Unwritten,
    OneElementOff,
    LastTokenDropped,
    FirstTokenDropped,
    NeighboursPage,
    HeadsSwapped,
    WindowIgnored,
    SinkIgnored,
    LseOff,
    AppendTruncates,
    AppendStrays,
    AppendWritesSkipped,
    CopyForgetsScales,
}

/// The CPU backend under another name, with a fault.
#[derive(Debug)]
pub struct Faulty {
    pub name: &'static str,
    pub fault: Fault,
    pub rank: u32,
    pub opened: AtomicUsize,
}

impl Faulty {
    #[allow(dead_code, reason = "each test program uses some")]
    pub fn new(name: &'static str, fault: Fault, rank: u32) -> Arc<Self> {
        Arc::new(Self { name, fault, rank, opened: AtomicUsize::new(0) })
    }
}

impl Backend for Faulty {
    fn id(&self) -> BackendId {
        BackendId::named(self.name)
    }

    fn probe(&self) -> Result<Device, Refusal> {
        match self.fault {
            Fault::Unavailable => Err(Refusal::Unavailable { reason: "no driver".to_owned() }),
            Fault::ProbePanics => panic!("the probe panics on purpose"),
            _ => CpuBackend.probe(),
        }
    }

    fn capability(&self) -> Capability {
        Capability { window: self.fault != Fault::NoWindow, ..CpuBackend.capability() }
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        self.rank
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        CpuBackend.split_config(descriptor)
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        CpuBackend.arithmetic(spec, plan)
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        memory: Memory<'a>,
        stream: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let inner = CpuBackend.open(descriptor, memory, stream)?;
        Ok(Box::new(FaultyExecutor { fault: self.fault, layout: descriptor.layout.clone(), inner }))
    }
}

struct FaultyExecutor<'a> {
    fault: Fault,
    layout: CacheLayout,
    inner: Box<dyn Executor + 'a>,
}

fn step_failed() -> Error {
    Error::Device { backend: BackendId::named("faulty"), what: "on purpose".to_owned(), is_lost: false }
}

impl FaultyExecutor<'_> {
    /// Decodes another problem than was asked.
    fn decode_other(
        &mut self,
        step: NormalDecode<'_>,
        change: impl FnOnce(&mut DecodeSpec, &mut Vec<u32>, &mut Vec<i32>, &[u64]),
    ) -> Result<(), Error> {
        let mut spec = step.request.spec.clone();
        let mut kv_lens = step.request.kv_lens.to_vec();
        let mut pages = step.request.page_table.pages.to_vec();
        let PageRows::Starts(starts) = step.request.page_table.rows else {
            panic!("a session gives row starts")
        };
        change(&mut spec, &mut kv_lens, &mut pages, starts);
        let plan = SplitPlan::new(&spec, &kv_lens, step.plan.config().unwrap()).unwrap();
        let page_table = PageTable { pages: &pages, rows: step.request.page_table.rows };
        let request = DecodeRequest { spec: &spec, kv_lens: &kv_lens, page_table };
        self.inner.normal_decode(NormalDecode { request, plan: &plan, ..step })
    }
}

fn f32s<'a>(out: &'a mut Output<'_>) -> &'a mut [f32] {
    match out {
        Output::Host(FloatSliceMut::F32(x)) => x,
        _ => panic!("the faults are for f32 outputs"),
    }
}

impl Executor for FaultyExecutor<'_> {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        match (self.fault, k, v) {
            (Fault::AppendTruncates, Input::Host(FloatSlice::F32(k)), Input::Host(v)) => {
                // A value that rounds up under the rule now rounds down.
                let k: Vec<f32> = k.iter().map(|x| x * 0.997).collect();
                self.inner.append(Input::Host(FloatSlice::F32(&k)), Input::Host(v), slots)
            }
            (
                Fault::AppendWritesSkipped,
                Input::Host(FloatSlice::F32(k)),
                Input::Host(FloatSlice::F32(v)),
            ) => {
                let [k, v] =
                    [k, v].map(|x| x.iter().map(|x| if x.is_nan() { 0.0 } else { *x }).collect::<Vec<_>>());
                let free: Vec<i64> =
                    (0..self.layout.num_slots() as i64).filter(|s| !slots.contains(s)).collect();
                let mut free = free.into_iter();
                let slots: Vec<i64> =
                    slots.iter().map(|s| if *s < 0 { free.next().unwrap() } else { *s }).collect();
                self.inner.append(Input::Host(FloatSlice::F32(&k)), Input::Host(FloatSlice::F32(&v)), &slots)
            }
            (Fault::AppendStrays, k, v) => {
                self.inner.append(k, v, slots)?;
                let end = self.layout.buffer_bytes()[0];
                self.inner.write_bytes(0, end - 1, &[7])
            }
            (_, k, v) => self.inner.append(k, v, slots),
        }
    }

    fn plan(&mut self, request: &DecodeRequest<'_>, plan: &SplitPlan) -> Result<(), Error> {
        self.inner.plan(request, plan)
    }

    fn normal_decode(&mut self, mut step: NormalDecode<'_>) -> Result<(), Error> {
        let page_len = self.layout.page_len();
        match self.fault {
            Fault::Panics => panic!("the decode panics on purpose"),
            Fault::Hangs => {
                std::thread::sleep(Duration::from_secs(20));
                self.inner.normal_decode(step)
            }
            Fault::Errs => Err(step_failed()),
            Fault::Nan => {
                f32s(&mut step.out)[3] = f32::NAN;
                let mut copy = f32s(&mut step.out).to_vec();
                let out = Output::Host(FloatSliceMut::F32(&mut copy));
                self.inner.normal_decode(NormalDecode { out, ..step })
            }
            Fault::Unwritten => Ok(()),
            Fault::OneElementOff | Fault::HeadsSwapped | Fault::LseOff => {
                let mut out = f32s(&mut step.out).to_vec();
                let mut lse = step.lse.as_mut().map(|lse| f32s(lse).to_vec());
                let inner = NormalDecode {
                    out: Output::Host(FloatSliceMut::F32(&mut out)),
                    lse: lse.as_mut().map(|lse| Output::Host(FloatSliceMut::F32(lse))),
                    ..step
                };
                let dim = inner.request.spec.head_dim as usize;
                self.inner.normal_decode(inner)?;
                match self.fault {
                    Fault::OneElementOff => out[1] *= 1.001,
                    Fault::LseOff => lse.as_mut().unwrap()[0] += 0.001,
                    _ => {
                        let (a, b) = out.split_at_mut(dim);
                        a.swap_with_slice(&mut b[..dim]);
                    }
                }
                f32s(&mut step.out).copy_from_slice(&out);
                if let (Some(to), Some(from)) = (&mut step.lse, lse) {
                    f32s(to).copy_from_slice(&from);
                }
                Ok(())
            }
            Fault::LastTokenDropped => self.decode_other(step, |_, kv_lens, _, _| {
                kv_lens.iter_mut().for_each(|len| *len = len.saturating_sub(1));
            }),
            Fault::FirstTokenDropped => self.decode_other(step, |spec, kv_lens, _, _| {
                // The window of the longest request but one token.
                let longest = kv_lens.iter().copied().max().unwrap_or(0);
                spec.window = Some(spec.window.map_or(longest - 1, |window| window - 1));
            }),
            Fault::NeighboursPage => self.decode_other(step, |_, kv_lens, pages, starts| {
                // The last page of the longest request is taken from another one.
                let (i, len) = kv_lens.iter().enumerate().max_by_key(|(_, len)| **len).unwrap();
                let last = starts[i] as usize + (len - 1) as usize / page_len as usize;
                let other = if i == 0 { pages[pages.len() - 1] } else { pages[0] };
                pages[last] = other;
            }),
            Fault::WindowIgnored => self.decode_other(step, |spec, _, _, _| spec.window = None),
            Fault::SinkIgnored => self.decode_other(step, |spec, _, _, _| spec.sinks = None),
            _ => self.inner.normal_decode(step),
        }
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        if self.fault == Fault::CopyForgetsScales {
            return Ok(());
        }
        self.inner.copy_pages(copies)
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.inner.read_bytes(buffer_idx, offset, bytes)
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.inner.write_bytes(buffer_idx, offset, bytes)
    }
}

/// f32 in and out, so that faults can reach into the arrays; window, sinks and lse on.
#[allow(dead_code, reason = "each test program uses some")]
pub fn descriptor() -> Descriptor {
    let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16).unwrap();
    let spec = DecodeSpec {
        window: Some(100),
        sinks: Some((0..6).map(|head| head as f32 * 0.25).collect()),
        want_lse: true,
        q_type: FloatType::F32,
        out_type: FloatType::F32,
        ..DecodeSpec::new(6, 2, 64)
    };
    Descriptor::new(CacheLayout::native(format, 1 << 20, 16).unwrap(), spec)
}

#[allow(dead_code, reason = "each test program uses some")]
pub fn key() -> OperationKey {
    OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode }
}

/// A registry of these backends alone.
#[allow(dead_code, reason = "each test program uses some")]
pub fn registry(backends: &[Arc<Faulty>]) -> Registry {
    let mut registry = Registry::empty();
    for backend in backends {
        registry.register(key(), Arc::clone(backend) as Arc<dyn Backend>);
    }
    registry
}

/// So that `Array` is in scope for tests that match on it.
#[allow(dead_code, reason = "each test program uses some")]
pub const OUT: Array = Array::Out;
