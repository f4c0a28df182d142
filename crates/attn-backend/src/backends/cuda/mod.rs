//! CUDA: device memory, owned or the caller's, on a stream of its own or the caller's. Adapter of
//! `attn_kernels::device`.

mod errors;
mod executor;
mod schedule;
mod transfer;
mod warm_up;

pub use schedule::{cuda_chooser, cuda_tuner};

use crate::{
    Backend, BackendId, Capability, Descriptor, Device, Error, Executor, Isolation, Memory, MemoryKind,
    Missing, Refusal, Stream,
};
use attn_kernels::abi::{PagedCache, Plane};
use attn_kernels::key::{self, INSTANCES, Instance, KernelKind, KeyMiss, KeyQuery};
use attn_kernels::probe;
use attn_plan::{DecodeSpec, SplitConfig, SplitPlan, SplitPolicy};
use cpu_reference::Arithmetic;
use kv_quant::{CacheLayout, FloatType, PlaneId, Side};

/// Decode on one CUDA device. Nothing of the driver is touched before [`Backend::probe`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaBackend {
    /// The driver's number of the device.
    pub ordinal: u32,
}

/// Tokens at which items are cut: what the warps of a block take at a time.
const TILE_LEN: u32 = 64;
/// Bases of planes are taken for aligned to this when a layout is looked at before there is memory.
const ASSUMED_BASE: u64 = 1 << 20;

impl Backend for CudaBackend {
    fn id(&self) -> BackendId {
        BackendId::CUDA
    }

    fn probe(&self) -> Result<Device, Refusal> {
        let facts = probe::probe(self.ordinal).map_err(|reason| unavailable(&reason))?;
        let build = schedule::build().map_err(|reason| unavailable(&reason))?;
        let version = facts.driver_version;
        Ok(Device {
            name: facts.name,
            driver: format!("for CUDA {}.{}", version / 1000, version % 1000 / 10),
            build,
        })
    }

    fn capability(&self) -> Capability {
        let mut head_dims: Vec<u32> = INSTANCES.iter().map(|instance| instance.key.head_dim).collect();
        head_dims.sort_unstable();
        head_dims.dedup();
        let memory = vec![MemoryKind::Owned, MemoryKind::Device];
        Capability { head_dims, memory, device_arrays: true, ..Capability::everything() }
    }

    /// The capability, and for what it cannot say (alignment, page lengths, spans) the kernel table's own answer.
    fn missing(&self, descriptor: &Descriptor) -> Vec<Missing> {
        let mut missing = self.capability().missing(descriptor);
        if missing.is_empty() {
            let misses = descriptor.specs().filter_map(|spec| instance(&descriptor.layout, spec).err());
            missing.extend(misses.map(|miss| Missing::new("kernel", "", miss)));
            missing.dedup();
        }
        missing
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        100
    }

    /// As many workers a kv head as the device holds blocks at once; a session chooses better step by step.
    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        let num_sms = probe::probe(self.ordinal).map_or(1, |facts| facts.num_sms);
        let spec = &descriptor.spec;
        let blocks = instance(&descriptor.layout, spec).map_or(1, |instance| {
            let row_blocks = (spec.gqa_group() * spec.q_len).div_ceil(instance.key.rows());
            num_sms * instance.min_ctas / (spec.num_kv_heads * row_blocks).max(1)
        });
        let tile_len = match descriptor.split {
            SplitPolicy::BatchInvariant { split_len } => TILE_LEN.min(1 << split_len.trailing_zeros().min(6)),
            _ => TILE_LEN,
        };
        SplitConfig { tile_len, ..SplitConfig::throughput(blocks.max(1)).with_policy(descriptor.split) }
    }

    /// f16 operands on the tensor cores, sums in f32 that may be truncated, an approximate base-2 exponential; for
    /// caches whose scales are at most 1 (operands of larger ones lose more in absolute terms).
    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        let half = FloatType::F16.unit_roundoff();
        let tokens = f64::from(plan.items().iter().map(|item| item.num_tokens()).max().unwrap_or(0));
        let splits = plan.request_partials().windows(2).map(|pair| match *pair {
            [start, end] => end - start,
            _ => 0,
        });
        let splits = f64::from(splits.max().unwrap_or(0));
        let steps = tokens / 16.0 + splits + 8.0;
        let rounded_q = if spec.q_type == FloatType::F32 { half } else { 0.0 };
        Arithmetic {
            q_unit: rounded_q,
            q_amax_unit: (-39f64).exp2(),
            // Code times scale, and the scale itself where it is f32.
            k_unit: 2.0 * half,
            k_tiny: (-24f64).exp2(),
            // A tensor core truncates: four units a step of 16 channels.
            dot_roundings: 4.0 * (f64::from(spec.head_dim) / 16.0 + 4.0),
            logit_roundings: 8.0,
            tanh_tiny: (-20f64).exp2(),
            exp_unit: (-18f64).exp2(),
            rescales: steps,
            p_unit: half,
            p_tiny: (-31f64).exp2(),
            v_unit: 2.0 * half,
            v_tiny: (-23f64).exp2(),
            sum_roundings: 4.0 * steps + tokens + 3.0 * splits + 40.0,
            ..Arithmetic::f32(spec, plan)
        }
    }

    fn isolation(&self) -> Isolation {
        Isolation::Process
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        memory: Memory<'a>,
        stream: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        let executor = executor::CudaExecutor::open(self.ordinal, descriptor, memory, stream);
        Ok(Box::new(executor.map_err(|error| errors::of_device(error, &descriptor.layout))?))
    }
}

fn unavailable(reason: &dyn std::fmt::Display) -> Refusal {
    Refusal::Unavailable { reason: reason.to_string() }
}

/// The kernel for a layout and a spec, before there is memory.
fn instance(layout: &CacheLayout, spec: &DecodeSpec) -> Result<&'static Instance, KeyMiss> {
    let cache = assumed_cache(layout);
    key::check_append(&cache)?;
    let query = KeyQuery {
        kind: KernelKind::Stage1,
        num_rows: spec.gqa_group() * spec.q_len,
        arithmetic: key::Arithmetic::Mma,
        shared_bytes: u32::MAX,
    };
    key::select(&cache, &query)
}

fn assumed_cache(layout: &CacheLayout) -> PagedCache {
    let plane = |id: PlaneId| {
        let plane = layout.plane(id);
        Plane {
            base: ASSUMED_BASE + plane.offset * layout.element_bytes(id),
            page_stride: plane.page_stride,
            slot_stride: plane.slot_stride,
            head_stride: plane.head_stride,
        }
    };
    let format = layout.format();
    PagedCache {
        k_codes: plane(PlaneId::Codes(Side::K)),
        v_codes: plane(PlaneId::Codes(Side::V)),
        k_scales: plane(PlaneId::Scales(Side::K)),
        v_scales: plane(PlaneId::Scales(Side::V)),
        num_pages: u32::try_from(layout.num_pages()).unwrap_or(u32::MAX),
        page_len: layout.page_len(),
        num_kv_heads: format.num_kv_heads(),
        head_dim: format.head_dim(),
        k_group_len: format.group_len(Side::K),
        v_group_len: format.group_len(Side::V),
        scale_type: format.scale_type() as u32,
        ..PagedCache::default()
    }
}
