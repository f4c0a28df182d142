//! A backend that chooses another split for every step: the session asks it, unless the caller has said how to cut.
#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use attn_backend::{
    Backend, BackendId, Capability, CpuBackend, Descriptor, Device, Error, Executor, Expect, FormatKey,
    Input, Memory, NormalDecode, Operation, OperationKey, Refusal, Registry, SelectOptions, Session,
    SessionOptions, Stream, select,
};
use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitConfig, SplitPlan};
use attn_tune::Level;
use cpu_reference::Arithmetic;
use kv_quant::{CacheFormat, CacheLayout, PageCopy, ScaleType};
use std::sync::{Arc, Mutex};

/// As many workers as the step has requests.
#[derive(Debug, Default)]
struct Stepwise {
    levels: Arc<Mutex<Vec<Level>>>,
}

const ID: &str = "stepwise";

impl Backend for Stepwise {
    fn id(&self) -> BackendId {
        BackendId::named(ID)
    }

    fn probe(&self) -> Result<Device, Refusal> {
        CpuBackend.probe()
    }

    fn capability(&self) -> Capability {
        CpuBackend.capability()
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        1000
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
        let inner = CpuBackend.open(descriptor, memory, stream)?;
        Ok(Box::new(StepwiseExecutor { inner, levels: Arc::clone(&self.levels) }))
    }
}

struct StepwiseExecutor<'a> {
    inner: Box<dyn Executor + 'a>,
    levels: Arc<Mutex<Vec<Level>>>,
}

impl Executor for StepwiseExecutor<'_> {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        self.inner.append(k, v, slots)
    }

    fn tune(&mut self, level: Level, _: Option<&Expect>) -> Result<(), Error> {
        self.levels.lock().unwrap().push(level);
        Ok(())
    }

    fn split_config(&mut self, _: &DecodeSpec, kv_lens: &[u32]) -> Option<SplitConfig> {
        Some(SplitConfig::throughput(kv_lens.len() as u32))
    }

    fn explain_split(&mut self, _: &DecodeSpec, kv_lens: &[u32]) -> Option<String> {
        Some(format!("{} requests", kv_lens.len()))
    }

    fn plan(&mut self, request: &DecodeRequest<'_>, plan: &SplitPlan) -> Result<(), Error> {
        self.inner.plan(request, plan)
    }

    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        self.inner.normal_decode(step)
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        self.inner.copy_pages(copies)
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.inner.read_bytes(buffer_idx, offset, bytes)
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.inner.write_bytes(buffer_idx, offset, bytes)
    }
}

/// A session on that backend, and the levels that it was told.
fn open(options: SessionOptions<'static>) -> (Session<'static>, Arc<Mutex<Vec<Level>>>) {
    let backend = Stepwise::default();
    let levels = Arc::clone(&backend.levels);
    let mut registry = Registry::empty();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    registry.register(key, Arc::new(backend));
    let format = CacheFormat::new(1, 64, 8, 8, ScaleType::F16).unwrap();
    let layout = CacheLayout::native(format, 64, 16).unwrap();
    let descriptor = Descriptor::new(layout, DecodeSpec::new(2, 1, 64));
    let options_of_select = SelectOptions { read_environment: false, ..SelectOptions::default() };
    let selection = select(&registry, &descriptor, &options_of_select).unwrap();
    assert_eq!(selection.backend, BackendId::named(ID));
    // The trial's sessions were told levels too.
    levels.lock().unwrap().clear();
    (Session::open(&selection, options).unwrap(), levels)
}

fn workers_of_steps(session: &mut Session<'_>) -> [usize; 2] {
    [&[100][..], &[70, 1, 200]].map(|kv_lens| {
        let pages: Vec<i32> = (0..39).collect();
        session.plan(kv_lens, PageTable::padded(&pages, 13)).unwrap();
        let workers = session.split_plan().worker_starts().len() - 1;
        assert_eq!(session.split().num_workers as usize, workers);
        workers
    })
}

#[test]
fn each_step_is_cut_as_the_backend_chooses() {
    let (mut session, levels) = open(SessionOptions { tune: Some(Level::Off), ..SessionOptions::default() });
    assert_eq!(*levels.lock().unwrap(), [Level::Off]);
    assert_eq!(session.explain_split(), None, "there is no plan");
    assert_eq!(workers_of_steps(&mut session), [1, 3]);
    assert_eq!(session.explain_split().as_deref(), Some("3 requests"));
    session.set_split(SplitConfig::throughput(5)).unwrap();
    assert_eq!(workers_of_steps(&mut session), [5, 5]);
    assert_eq!(session.explain_split(), None, "the caller decides");
}

#[test]
fn a_split_that_the_caller_gave_stays() {
    let split = Some(SplitConfig::throughput(7));
    let (mut session, levels) = open(SessionOptions { split, ..SessionOptions::default() });
    assert!(levels.lock().unwrap().is_empty(), "nothing is measured for a split that is fixed");
    assert_eq!(workers_of_steps(&mut session), [7, 7]);
}
