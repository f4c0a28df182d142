//! A descriptor as JSON: what a child process is told, and the key of a verdict.

use super::TrialFailure;
use crate::{BackendId, Descriptor, MemoryKind, Operation};
use attn_plan::{DecodeSpec, SplitPolicy};
use kv_quant::{CacheFormat, CacheLayout, FloatType, LayoutKind, Plane, PlaneId, ScaleType, Side};
use serde::{Deserialize, Serialize};

/// Floats as text: JSON has no NaN and no infinity, and a wrong number is often one of them.
pub(super) mod text {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What a child process is asked.
#[derive(Serialize, Deserialize)]
pub(super) struct WireTask {
    pub backend: String,
    pub descriptor: WireDescriptor,
}

#[derive(Serialize, Deserialize)]
pub(super) struct WireDescriptor {
    operation: String,
    memory: String,
    /// The format as it prints itself: a child that reads another one from the numbers below says so.
    format: String,
    num_kv_heads: u32,
    head_dim: u32,
    k_group_len: u32,
    v_group_len: u32,
    scale_type: String,
    layout: String,
    num_pages: u64,
    page_len: u32,
    /// `[buffer_idx, offset, page_stride, slot_stride, head_stride]` of each plane; of custom layouts only.
    planes: Vec<[u64; 5]>,
    split_len: Option<u32>,
    specs: Vec<WireSpec>,
}

#[derive(Serialize, Deserialize)]
struct WireSpec {
    num_q_heads: u32,
    q_len: u32,
    softmax_scale: f32,
    window: Option<u32>,
    soft_cap: Option<f32>,
    alibi_slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    q_type: String,
    out_type: String,
    want_lse: bool,
}

const LAYOUTS: [LayoutKind; 5] =
    [LayoutKind::LightLlm, LayoutKind::Hnd, LayoutKind::Nhd, LayoutKind::Native, LayoutKind::Custom];
const MEMORY: [MemoryKind; 4] =
    [MemoryKind::Owned, MemoryKind::Host, MemoryKind::HostReadOnly, MemoryKind::Device];

impl WireTask {
    pub(super) fn new(backend: &BackendId, descriptor: &Descriptor) -> Self {
        Self { backend: backend.to_string(), descriptor: WireDescriptor::new(descriptor) }
    }
}

impl WireDescriptor {
    fn new(descriptor: &Descriptor) -> Self {
        let (layout, format) = (&descriptor.layout, descriptor.layout.format());
        let planes = PlaneId::ALL.iter().filter(|_| layout.kind() == LayoutKind::Custom);
        Self {
            operation: descriptor.operation.to_string(),
            memory: descriptor.memory.to_string(),
            format: format.to_string(),
            num_kv_heads: format.num_kv_heads(),
            head_dim: format.head_dim(),
            k_group_len: format.group_len(Side::K),
            v_group_len: format.group_len(Side::V),
            scale_type: format.scale_type().to_string(),
            layout: layout.kind().to_string(),
            num_pages: layout.num_pages(),
            page_len: layout.page_len(),
            planes: planes
                .map(|&id| {
                    let plane = layout.plane(id);
                    let buffer_idx = plane.buffer_idx as u64;
                    [buffer_idx, plane.offset, plane.page_stride, plane.slot_stride, plane.head_stride]
                })
                .collect(),
            split_len: match descriptor.split {
                SplitPolicy::Throughput => None,
                SplitPolicy::BatchInvariant { split_len } => Some(split_len),
            },
            specs: descriptor.specs().map(WireSpec::new).collect(),
        }
    }

    /// The descriptor, or what is wrong with the JSON.
    pub(super) fn parse(&self) -> Result<Descriptor, String> {
        let format = CacheFormat::new(
            self.num_kv_heads,
            self.head_dim,
            self.k_group_len,
            self.v_group_len,
            by_name(&ScaleType::ALL, &self.scale_type)?,
        );
        let format = format.map_err(|error| error.to_string())?;
        if format.to_string() != self.format {
            return Err(format!("format `{}` is unknown", self.format));
        }
        let layout = match by_name(&LAYOUTS, &self.layout)? {
            LayoutKind::LightLlm => CacheLayout::lightllm(format, self.num_pages),
            LayoutKind::Hnd => CacheLayout::hnd(format, self.num_pages, self.page_len),
            LayoutKind::Nhd => CacheLayout::nhd(format, self.num_pages, self.page_len),
            LayoutKind::Native => CacheLayout::native(format, self.num_pages, self.page_len),
            LayoutKind::Custom => {
                let planes: Vec<Plane> = self.planes.iter().map(plane).collect();
                let planes = planes.try_into().map_err(|_| "a custom layout has four planes".to_owned())?;
                CacheLayout::custom(format, self.num_pages, self.page_len, planes)
            }
        };
        let mut specs = Vec::new();
        for spec in &self.specs {
            specs.push(spec.parse(&format)?);
        }
        let mut specs = specs.into_iter();
        Ok(Descriptor {
            operation: by_name(&[Operation::NormalDecode], &self.operation)?,
            memory: by_name(&MEMORY, &self.memory)?,
            layout: layout.map_err(|error| error.to_string())?,
            spec: specs.next().ok_or("no spec")?,
            also: specs.collect(),
            split: self
                .split_len
                .map_or(SplitPolicy::Throughput, |split_len| SplitPolicy::BatchInvariant { split_len }),
        })
    }
}

fn plane(&[buffer_idx, offset, page_stride, slot_stride, head_stride]: &[u64; 5]) -> Plane {
    Plane { buffer_idx: buffer_idx as usize, offset, page_stride, slot_stride, head_stride }
}

impl WireSpec {
    fn new(spec: &DecodeSpec) -> Self {
        Self {
            num_q_heads: spec.num_q_heads,
            q_len: spec.q_len,
            softmax_scale: spec.softmax_scale,
            window: spec.window,
            soft_cap: spec.soft_cap,
            alibi_slopes: spec.alibi_slopes.clone(),
            sinks: spec.sinks.clone(),
            q_type: spec.q_type.to_string(),
            out_type: spec.out_type.to_string(),
            want_lse: spec.want_lse,
        }
    }

    fn parse(&self, format: &CacheFormat) -> Result<DecodeSpec, String> {
        Ok(DecodeSpec {
            q_len: self.q_len,
            softmax_scale: self.softmax_scale,
            window: self.window,
            soft_cap: self.soft_cap,
            alibi_slopes: self.alibi_slopes.clone(),
            sinks: self.sinks.clone(),
            q_type: by_name(&FloatType::ALL, &self.q_type)?,
            out_type: by_name(&FloatType::ALL, &self.out_type)?,
            want_lse: self.want_lse,
            ..DecodeSpec::new(self.num_q_heads, format.num_kv_heads(), format.head_dim())
        })
    }
}

fn by_name<T: Copy + std::fmt::Display>(all: &[T], name: &str) -> Result<T, String> {
    all.iter().copied().find(|value| value.to_string() == name).ok_or_else(|| format!("`{name}` is unknown"))
}

/// Equal for descriptors that have the same trial: everything but the size of the cache.
pub(crate) fn verdict_key(descriptor: &Descriptor) -> Result<String, TrialFailure> {
    let wire = WireDescriptor { num_pages: 0, ..WireDescriptor::new(descriptor) };
    serde_json::to_string(&wire).map_err(|error| TrialFailure::Error(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_survives_the_wire() {
        let format = CacheFormat::new(2, 96, 8, 32, ScaleType::Bf16).unwrap();
        let native = CacheLayout::native(format, 5, 16).unwrap();
        let planes = PlaneId::ALL.map(|id| *native.plane(id));
        let custom = CacheLayout::custom(format, 5, 16, planes).unwrap();
        let spec = DecodeSpec {
            window: Some(7),
            soft_cap: Some(0.1),
            alibi_slopes: Some(vec![-0.3, 1e-30, 2.0, f32::MIN_POSITIVE]),
            sinks: Some(vec![0.5; 4]),
            q_type: FloatType::Bf16,
            want_lse: true,
            ..DecodeSpec::new(4, 2, 96)
        };
        for layout in [native, custom] {
            let descriptor = Descriptor::new(layout, spec.clone())
                .also(DecodeSpec { q_len: 8, ..spec.clone() })
                .with_split(SplitPolicy::BatchInvariant { split_len: 96 });
            let json = serde_json::to_string(&WireDescriptor::new(&descriptor)).unwrap();
            let parsed: WireDescriptor = serde_json::from_str(&json).unwrap();
            assert_eq!(parsed.parse().unwrap(), descriptor);
        }
    }
}
