//! Checks of device memory, with a backend that offers it and never touches it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure is the point")]

use attn_backend::{
    Array, Backend, BackendId, Capability, CpuBackend, Descriptor, Device, DeviceSlice, DeviceView, Error,
    Executor, FormatKey, Input, Memory, MemoryKind, NormalDecode, Operation, OperationKey, Refusal, Registry,
    SelectOptions, Session, SessionOptions, Stream, TrialMode, select,
};
use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitConfig, SplitPlan};
use cpu_reference::Arithmetic;
use kv_quant::{CacheFormat, CacheLayout, FloatType, PageCopy, ScaleType};
use std::sync::Arc;

/// Accepts every checked call.
#[derive(Debug)]
struct Paper;

impl Backend for Paper {
    fn id(&self) -> BackendId {
        BackendId::named("paper")
    }

    fn probe(&self) -> Result<Device, Refusal> {
        CpuBackend.probe()
    }

    fn capability(&self) -> Capability {
        Capability {
            memory: vec![MemoryKind::Owned, MemoryKind::Device],
            device_arrays: true,
            ..Capability::everything()
        }
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        1
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        CpuBackend.split_config(descriptor)
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        CpuBackend.arithmetic(spec, plan)
    }

    fn open<'a>(
        &self,
        _: &Descriptor,
        _: Memory<'a>,
        _: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        Ok(Box::new(Paper))
    }
}

impl Executor for Paper {
    fn append(&mut self, _: Input<'_>, _: Input<'_>, _: &[i64]) -> Result<(), Error> {
        Ok(())
    }

    fn plan(&mut self, _: &DecodeRequest<'_>, _: &SplitPlan) -> Result<(), Error> {
        Ok(())
    }

    fn normal_decode(&mut self, _: NormalDecode<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn copy_pages(&mut self, _: &[PageCopy]) -> Result<(), Error> {
        Ok(())
    }

    fn read_bytes(&mut self, _: usize, _: u64, _: &mut [u8]) -> Result<(), Error> {
        Ok(())
    }

    fn write_bytes(&mut self, _: usize, _: u64, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }
}

fn view(address: u64, len_bytes: u64) -> DeviceView {
    // SAFETY: nothing ever reads or writes through it; the backend above drops what it is given.
    unsafe { DeviceView::from_raw(address, len_bytes) }
}

fn slice(address: u64, elements: u64, float_type: FloatType) -> DeviceSlice {
    DeviceSlice::new(view(address, elements * float_type.bytes() as u64), float_type)
}

fn descriptor() -> Descriptor {
    let format = CacheFormat::new(2, 64, 32, 32, ScaleType::F16).unwrap();
    let spec = DecodeSpec { want_lse: true, ..DecodeSpec::new(6, 2, 64) };
    Descriptor::new(CacheLayout::lightllm(format, 64).unwrap(), spec)
}

fn open(backend: Arc<dyn Backend>, memory: Memory<'static>) -> Result<Session<'static>, Error> {
    let mut registry = Registry::empty();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    registry.register(key, backend);
    let options =
        SelectOptions { trial: TrialMode::Skip, read_environment: false, ..SelectOptions::default() };
    let selection = select(&registry, &descriptor(), &options).unwrap();
    Session::open(&selection, SessionOptions { memory, ..SessionOptions::default() })
}

/// Bytes of codes and of scales: 64 slots, 4 heads, 64 channels, groups of 32.
const CODES: u64 = 64 * 4 * 64;
const SCALES: u64 = 64 * 4 * 2 * 2;

#[test]
fn the_callers_cache_is_checked_at_opening() {
    let open = |views: Vec<DeviceView>| open(Arc::new(Paper), Memory::Device(views)).map(|_| ());
    let good = vec![view(0x1000, CODES), view(0x10_0000, SCALES)];
    assert_eq!(open(good), Ok(()));
    let one = vec![view(0x1000, CODES)];
    assert_eq!(open(one), Err(Error::Cache(kv_quant::Error::BufferCount { got: 1, want: 2 })));
    let short = vec![view(0x1000, CODES), view(0x10_0000, SCALES - 1)];
    let want = kv_quant::Error::BufferLen { buffer_idx: 1, got: SCALES - 1, want: SCALES };
    assert_eq!(open(short), Err(Error::Cache(want)));
    let null = vec![view(0, CODES), view(0x10_0000, SCALES)];
    assert_eq!(open(null), Err(Error::Address { array: Array::Cache(0), address: 0, align: 16 }));
    let odd = vec![view(0x1000, CODES), view(0x10_0008, SCALES)];
    assert_eq!(open(odd), Err(Error::Address { array: Array::Cache(1), address: 0x10_0008, align: 16 }));
    let overlap = vec![view(0x1000, CODES), view(0x1000 + CODES - 16, SCALES)];
    assert_eq!(open(overlap), Err(Error::Overlap { first: Array::Cache(0), second: Array::Cache(1) }));
    let wrap = vec![view(u64::MAX - 15, CODES), view(0x10_0000, SCALES)];
    assert_eq!(open(wrap), Err(Error::SizeOverflow { array: Array::Cache(0), what: "address + bytes" }));
}

#[test]
fn arrays_of_a_step_are_checked() {
    let views = vec![view(0x1000, CODES), view(0x10_0000, SCALES)];
    let mut session = open(Arc::new(Paper), Memory::Device(views)).unwrap();
    session.plan(&[1], PageTable::padded(&[0], 1)).unwrap();
    let half = |address| slice(address, 384, FloatType::F16);
    let lse = |address| Some(slice(address, 6, FloatType::F32));
    let (q, out) = (half(0x20_0000), half(0x30_0000));
    let mut run = |q, out, lse| session.decode_on_device(q, out, lse);
    assert_eq!(run(q, out, lse(0x40_0000)), Ok(()));
    assert_eq!(run(q, out, None), Err(Error::LseMissing));
    let overlap = |first, second| Err(Error::Overlap { first, second });
    assert_eq!(run(q, half(0x20_0000 + 767), lse(0x40_0000)), {
        Err(Error::Address { array: Array::Out, address: 0x20_0000 + 767, align: 2 })
    });
    assert_eq!(run(q, half(0x20_0000 + 766), lse(0x40_0000)), overlap(Array::Q, Array::Out));
    assert_eq!(run(q, half(0x20_0000 + 768), lse(0x40_0000)), Ok(()));
    assert_eq!(run(q, out, lse(0x20_0000)), overlap(Array::Q, Array::Lse));
    assert_eq!(run(q, out, lse(0x30_0000)), overlap(Array::Out, Array::Lse));
    assert_eq!(run(q, half(0x1000), lse(0x40_0000)), overlap(Array::Out, Array::Cache(0)));
    assert_eq!(run(q, out, lse(0x10_0000 + SCALES - 4)), overlap(Array::Lse, Array::Cache(1)));
    let wrong = Some(slice(0x40_0000, 6, FloatType::F16));
    assert_eq!(
        run(q, out, wrong),
        Err(Error::Type { array: Array::Lse, got: FloatType::F16, want: FloatType::F32 })
    );
    assert_eq!(
        run(half(0), out, lse(0x40_0000)),
        Err(Error::Address { array: Array::Q, address: 0, align: 2 })
    );
}

#[test]
fn appended_arrays_are_checked() {
    let views = vec![view(0x1000, CODES), view(0x10_0000, SCALES)];
    let mut session = open(Arc::new(Paper), Memory::Device(views)).unwrap();
    let k = |address| slice(address, 128, FloatType::Bf16);
    let mut append = |k, v| session.append_on_device(k, v, &[5]);
    assert_eq!(append(k(0x20_0000), k(0x30_0000)), Ok(()));
    assert_eq!(append(k(0x20_0000), k(0x20_0000)), Ok(()), "both are read");
    let overlap = Err(Error::Overlap { first: Array::V, second: Array::Cache(0) });
    assert_eq!(append(k(0x20_0000), k(0x1000)), overlap);
    let short = slice(0x20_0000, 127, FloatType::Bf16);
    assert_eq!(append(short, k(0x30_0000)), Err(Error::Len { array: Array::K, got: 127, want: 128 }));
}

#[test]
fn a_host_backend_refuses_device_arrays_and_device_memory() {
    let mut session = open(Arc::new(CpuBackend), Memory::Owned).unwrap();
    session.plan(&[0], PageTable::padded(&[], 0)).unwrap();
    let q = slice(0x1000, 384, FloatType::F16);
    let refused = session.decode_on_device(q, slice(0x2000, 384, FloatType::F16), None);
    assert_eq!(refused, Err(Error::LseMissing));
    let lse = Some(slice(0x3000, 6, FloatType::F32));
    let refused = session.decode_on_device(q, slice(0x2000, 384, FloatType::F16), lse);
    assert_eq!(refused, Err(Error::HostOnly { array: Array::Q, backend: BackendId::CPU }));
    let views = vec![view(0x1000, CODES), view(0x10_0000, SCALES)];
    let error = open(Arc::new(CpuBackend), Memory::Device(views)).unwrap_err();
    let offered = "owned, host, host read-only".to_owned();
    assert_eq!(error, Error::Memory { got: MemoryKind::Device, backend: BackendId::CPU, offered });
}
