//! CUDA: device memory, owned or the caller's, on a stream of its own or the caller's. Adapter of
//! `attn_kernels::device`.

mod arithmetic;
mod errors;
mod executor;
mod schedule;
mod transfer;
mod warm_up;

pub use schedule::{cuda_chooser, cuda_tuner, explain_cuda};

use crate::{
    Backend, BackendId, Capability, Descriptor, Device, Error, Executor, Isolation, Memory, MemoryKind,
    Missing, Refusal, Stream,
};
use attn_kernels::abi::{PagedCache, Plane};
use attn_kernels::key::{self, INSTANCES, Instance, KernelKind, KeyMiss, KeyQuery};
use attn_kernels::{image, probe};
use attn_plan::{DecodeSpec, SplitConfig, SplitPlan, SplitPolicy};
use attn_tune::Choice;
use cpu_reference::Arithmetic;
use kv_quant::{CacheLayout, PlaneId, Side};

/// Decode on one CUDA device. Nothing of the driver is touched before [`Backend::probe`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaBackend {
    /// The driver's number of the device.
    pub ordinal: u32,
    /// Which variants of the kernels: the tensor cores, or the plain f32 that tests compare them with.
    pub arithmetic: key::Arithmetic,
}

/// Bases of planes are taken for aligned to this when a layout is looked at before there is memory.
const ASSUMED_BASE: u64 = 1 << 20;

impl Backend for CudaBackend {
    fn id(&self) -> BackendId {
        match self.arithmetic {
            key::Arithmetic::Mma => BackendId::CUDA,
            key::Arithmetic::F32 => BackendId::named("cuda-f32"),
        }
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
            // Without an image the probe has refused already.
            let image = image::embedded().ok();
            for spec in descriptor.specs() {
                match self.instance(&descriptor.layout, spec) {
                    Err(miss) => missing.push(Missing::new("kernel", "", miss)),
                    Ok(instance) => {
                        let symbol = instance.key.to_string();
                        if image.is_some_and(|image| !image.has(&symbol)) {
                            missing.push(Missing::new("kernel", symbol, "an image of a part of the sources"));
                        }
                    }
                }
            }
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
        let (num_blocks, row_blocks) = self.instance(&descriptor.layout, spec).map_or((1, 1), |instance| {
            let row_blocks = (spec.gqa_group() * spec.q_len).div_ceil(instance.key.rows());
            // Fixed cuts are dealt to blocks of eight warps where there are clusters, and so such a kernel.
            let wide = key::items_of(&instance.key).filter(|_| {
                let has_clusters = || probe::probe(self.ordinal).is_ok_and(|facts| facts.sm >= 90);
                descriptor.split != SplitPolicy::Throughput && has_clusters()
            });
            (num_sms * wide.unwrap_or(instance).min_ctas, row_blocks)
        });
        let full = Choice::dealt(num_blocks);
        // Plans of a captured graph keep their number of workers.
        SplitConfig { item_tiles: 0, ..full.split(descriptor.split, spec.num_kv_heads, row_blocks) }
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        arithmetic::of(self.arithmetic, spec, plan)
    }

    fn variant(&self, descriptor: &Descriptor) -> Option<String> {
        let instance = self.instance(&descriptor.layout, &descriptor.spec).ok()?;
        Some(instance.key.to_string())
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
        let executor = executor::CudaExecutor::open(*self, descriptor, memory, stream);
        Ok(Box::new(executor.map_err(|error| errors::of_device(error, &descriptor.layout))?))
    }
}

fn unavailable(reason: &dyn std::fmt::Display) -> Refusal {
    Refusal::Unavailable { reason: reason.to_string() }
}

impl CudaBackend {
    /// The kernel for a layout and a spec, before there is memory.
    fn instance(&self, layout: &CacheLayout, spec: &DecodeSpec) -> Result<&'static Instance, KeyMiss> {
        let cache = assumed_cache(layout);
        key::check_append(&cache)?;
        let query = KeyQuery {
            kind: KernelKind::Stage1,
            num_rows: spec.gqa_group() * spec.q_len,
            arithmetic: self.arithmetic,
            shared_bytes: u32::MAX,
        };
        key::select(&cache, &query)
    }
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
