//! A mutant as a backend: the CPU backend's memory and append, a decode of its own.

use super::Fault;
use super::attend::Attend;
use attn_backend::{
    Backend, BackendId, Capability, CpuBackend, Descriptor, Device, Error, Executor, Input, Memory,
    NormalDecode, Output, Refusal, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, SplitConfig, SplitPlan, SplitPolicy};
use cpu_reference::Arithmetic;
use half::{bf16, f16};
use kv_quant::{CacheBuffers, CacheLayout, FloatSlice, FloatSliceMut, PageCopy, PlaneId, ScaleType, Side};

/// A backend with one fault.
#[derive(Clone, Copy, Debug)]
pub struct MutantBackend(pub Fault);

struct MutantExecutor<'a> {
    fault: Fault,
    layout: CacheLayout,
    num_calls: u64,
    inner: Box<dyn Executor + 'a>,
    /// What the first decode returned.
    first: Option<(Vec<f32>, Vec<f32>)>,
}

impl Backend for MutantBackend {
    fn id(&self) -> BackendId {
        BackendId::named(format!("mutant {:?}", self.0))
    }

    fn probe(&self) -> Result<Device, Refusal> {
        CpuBackend.probe()
    }

    fn capability(&self) -> Capability {
        Capability::everything()
    }

    fn rank(&self, _: &Descriptor) -> u32 {
        1
    }

    fn split_config(&self, descriptor: &Descriptor) -> SplitConfig {
        // Small tiles: more edges in the same tokens.
        SplitConfig { tile_len: 16, ..CpuBackend.split_config(descriptor) }
    }

    fn arithmetic(&self, spec: &DecodeSpec, plan: &SplitPlan) -> Arithmetic {
        Arithmetic::f32(spec, plan)
    }

    fn open<'a>(
        &self,
        descriptor: &Descriptor,
        memory: Memory<'a>,
        stream: Option<Stream>,
    ) -> Result<Box<dyn Executor + 'a>, Error> {
        let inner = CpuBackend.open(descriptor, memory, stream)?;
        let layout = descriptor.layout.clone();
        Ok(Box::new(MutantExecutor { fault: self.0, layout, num_calls: 0, inner, first: None }))
    }
}

impl MutantExecutor<'_> {
    fn cache(&mut self) -> Result<CacheBuffers, Error> {
        let mut cache = CacheBuffers::zeroed(&self.layout)?;
        for (buffer_idx, buffer) in cache.as_mut_vecs().iter_mut().enumerate() {
            self.inner.read_bytes(buffer_idx, 0, buffer)?;
        }
        Ok(cache)
    }

    fn store(&mut self, cache: &mut CacheBuffers) -> Result<(), Error> {
        for (buffer_idx, buffer) in cache.as_mut_vecs().iter().enumerate() {
            self.inner.write_bytes(buffer_idx, 0, buffer)?;
        }
        Ok(())
    }

    /// The rule of the format, broken.
    fn append_wrong(&mut self, k: FloatSlice<'_>, v: FloatSlice<'_>, slots: &[i64]) -> Result<(), Error> {
        let mut cache = self.cache()?;
        let layout = self.layout.clone();
        let format = *layout.format();
        let (heads, head_dim) = (format.num_kv_heads() as usize, format.head_dim() as usize);
        let last = slots.len().saturating_sub(1);
        for (token, &slot) in slots.iter().enumerate() {
            let slot = match (self.fault, slot) {
                (Fault::AppendSkippedGoesToSlotZero, -1) => 0,
                (Fault::AppendDropsLastToken, _) if token == last => continue,
                (_, -1) => continue,
                (_, slot) => slot as u64,
            };
            for head in 0..heads {
                for (side, x) in [(Side::K, &k), (Side::V, &v)] {
                    let mut values = vec![0f32; head_dim];
                    x.widen((token * heads + head) * head_dim, &mut values);
                    let group_len = format.group_len(side) as usize;
                    let (mut codes, mut scales) = (Vec::new(), Vec::new());
                    for group in values.chunks_exact(group_len) {
                        self.group(group, format.scale_type(), &mut codes, &mut scales);
                    }
                    for (id, bytes) in [(PlaneId::Codes(side), codes), (PlaneId::Scales(side), scales)] {
                        let (buffer_idx, range) = layout.row_bytes(id, slot, head as u32);
                        cache.view_mut().bytes_mut(buffer_idx, range).copy_from_slice(&bytes);
                    }
                }
            }
        }
        self.store(&mut cache)
    }

    fn group(&self, group: &[f32], scale_type: ScaleType, codes: &mut Vec<u8>, scales: &mut Vec<u8>) {
        let finite = |x: f32| if x.is_finite() { x } else { 0.0 };
        let amax = group.iter().fold(0f32, |amax, &x| amax.max(finite(x).abs()));
        let mut stored = kv_quant::round_scale_up(amax, scale_type).expect("the suite's values fit");
        if self.fault == Fault::AppendScaleNearest {
            let (value, bits) = match scale_type {
                ScaleType::F16 => {
                    (f16::from_f32(amax / 127.0).to_f32(), u32::from(f16::from_f32(amax / 127.0).to_bits()))
                }
                ScaleType::Bf16 => {
                    (bf16::from_f32(amax / 127.0).to_f32(), u32::from(bf16::from_f32(amax / 127.0).to_bits()))
                }
                ScaleType::F32 => (amax / 127.0, (amax / 127.0).to_bits()),
            };
            (stored.value, stored.bits) = (value, bits);
        }
        for &x in group {
            let x = finite(x);
            let y = match self.fault {
                Fault::AppendByReciprocal => x * (1.0 / stored.value),
                _ => x / stored.value,
            };
            let code = match self.fault {
                _ if stored.value == 0.0 => 0.0,
                Fault::AppendTruncates => y.trunc(),
                Fault::AppendHalfAwayFromZero => y.round(),
                Fault::AppendWritesLowestCode => (y - 0.499).round_ties_even(),
                _ => y.round_ties_even(),
            };
            codes.push(code.clamp(-128.0, 127.0) as i8 as u8);
        }
        scales.extend(&stored.bits.to_le_bytes()[..scale_type.bytes()]);
    }
}

/// Rounds toward zero instead of to nearest.
fn narrow_truncating(out: &mut FloatSliceMut<'_>, start: usize, values: &[f32]) {
    let toward_zero =
        |x: f32, near: f32, step: fn(f32) -> f32| if near.abs() > x.abs() { step(near) } else { near };
    let values: Vec<f32> = match out {
        FloatSliceMut::F16(_) => {
            let step = |x: f32| f16::from_bits(f16::from_f32(x).to_bits() - 1).to_f32();
            values.iter().map(|&x| toward_zero(x, f16::from_f32(x).to_f32(), step)).collect()
        }
        FloatSliceMut::Bf16(_) => {
            let step = |x: f32| bf16::from_bits(bf16::from_f32(x).to_bits() - 1).to_f32();
            values.iter().map(|&x| toward_zero(x, bf16::from_f32(x).to_f32(), step)).collect()
        }
        FloatSliceMut::F32(_) => values.to_vec(),
    };
    out.narrow(start, &values);
}

impl Executor for MutantExecutor<'_> {
    fn append(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        match (self.fault, k, v) {
            (
                Fault::AppendTruncates
                | Fault::AppendHalfAwayFromZero
                | Fault::AppendScaleNearest
                | Fault::AppendByReciprocal
                | Fault::AppendSkippedGoesToSlotZero
                | Fault::AppendWritesLowestCode
                | Fault::AppendNonFiniteAsZero
                | Fault::AppendDropsLastToken,
                Input::Host(k),
                Input::Host(v),
            ) => self.append_wrong(k, v, slots),
            _ => self.inner.append(k, v, slots),
        }
    }

    fn plan(&mut self, request: &DecodeRequest<'_>, plan: &SplitPlan) -> Result<(), Error> {
        self.inner.plan(request, plan)
    }

    fn normal_decode(&mut self, step: NormalDecode<'_>) -> Result<(), Error> {
        let (Input::Host(q), Output::Host(mut out)) = (step.q, step.out) else {
            unreachable!("the suite passes host memory")
        };
        let mut lse = match step.lse {
            Some(Output::Host(FloatSliceMut::F32(lse))) => Some(lse),
            _ => None,
        };
        let mut cache = self.cache()?;
        let spec = step.request.spec;
        let other_plan = match step.plan.config() {
            Some(config) if self.fault == Fault::SplitsByBatch && step.request.batch() > 1 => {
                let policy = SplitPolicy::BatchInvariant { split_len: config.tile_len };
                Some(SplitPlan::new(spec, step.request.kv_lens, &config.with_policy(policy))?)
            }
            _ => None,
        };
        let attend = Attend {
            fault: self.fault,
            layout: &self.layout,
            cache: &cache,
            request: &step.request,
            plan: other_plan.as_ref().unwrap_or(step.plan),
            q,
            num_calls: self.num_calls,
        };
        let (heads, head_dim) = (spec.num_q_heads as usize, spec.head_dim as usize);
        for row in 0..step.request.batch() * spec.q_len as usize * heads {
            let request = row / (spec.q_len as usize * heads);
            let Some((o, l)) = attend.row(request, (row / heads % spec.q_len as usize) as u32, row % heads)
            else {
                continue;
            };
            match self.fault {
                Fault::OutputTruncated => narrow_truncating(&mut out, row * head_dim, &o),
                _ => out.narrow(row * head_dim, &o),
            }
            if let Some(lse) = lse.as_deref_mut().filter(|_| self.fault != Fault::LseNotWritten) {
                lse[row] = l;
            }
        }
        self.num_calls += 1;
        self.after(&mut cache, out, lse)
    }

    fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        let dropped = match self.fault {
            Fault::CopyWithoutScales => [PlaneId::Scales(Side::K), PlaneId::Scales(Side::V)],
            Fault::CopyWithoutV => [PlaneId::Codes(Side::V), PlaneId::Scales(Side::V)],
            _ => return self.inner.copy_pages(copies),
        };
        let before = self.cache()?;
        self.inner.copy_pages(copies)?;
        let (mut after, page_len) = (self.cache()?, u64::from(self.layout.page_len()));
        for copy in copies {
            for slot in copy.dst * page_len..(copy.dst + 1) * page_len {
                for (id, head) in dropped
                    .iter()
                    .flat_map(|id| (0..self.layout.format().num_kv_heads()).map(move |h| (id, h)))
                {
                    let (buffer_idx, range) = self.layout.row_bytes(*id, slot, head);
                    let old = before.view().bytes(buffer_idx, range.clone()).to_vec();
                    after.view_mut().bytes_mut(buffer_idx, range).copy_from_slice(&old);
                }
            }
        }
        self.store(&mut after)
    }

    fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.inner.read_bytes(buffer_idx, offset, bytes)
    }

    fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.inner.write_bytes(buffer_idx, offset, bytes)
    }
}

impl MutantExecutor<'_> {
    /// Faults of state, after an honest decode.
    fn after(
        &mut self,
        cache: &mut CacheBuffers,
        mut out: FloatSliceMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        match self.fault {
            Fault::StaleOnSecondCall => {
                if let (FloatSliceMut::F32(out), Some(lse)) = (&mut out, lse) {
                    match &self.first {
                        Some((first, first_lse)) if first.len() == out.len() => {
                            out.copy_from_slice(first);
                            lse.copy_from_slice(first_lse);
                        }
                        _ => self.first = Some((out.to_vec(), lse.to_vec())),
                    }
                }
            }
            Fault::CacheTouched => {
                let slots = cache.as_mut_vecs();
                if let Some(byte) = slots.first_mut().and_then(|buffer| buffer.last_mut()) {
                    *byte ^= 1;
                }
                self.store(cache)?;
            }
            _ => {}
        }
        Ok(())
    }
}
