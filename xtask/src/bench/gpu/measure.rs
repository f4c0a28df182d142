//! Graphs of launches over rotating tables, timed by events.

use crate::bench::case::Case;
use crate::bench::inputs::{self, Patterns, gaussians};
use anyhow::{Context, Result};
use attn_backend::cuda_tuner;
use attn_kernels::device::{
    AppendArgs, CacheArgs, CudaDevice, DeviceBuffer, DeviceError, ErrorReport, Event, Graph, Kernels, Stream,
    StreamKernels,
};
use attn_tune::{Level, Tuner};
use cpu_reference::case::Rng;
use kv_quant::FloatType;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of the streams that measure bandwidth.
const STREAM_BYTES: usize = 4 << 30;

/// A device ready to be measured.
pub struct Bench<'a> {
    pub device: &'a CudaDevice,
    pub kernels: &'a Kernels,
    pub stream: &'a Stream,
    pub streams: StreamKernels,
    /// Timed replays of a case.
    pub num_samples: usize,
    pub tuner: Tuner,
    pub gpu: String,
    /// Shared, so that inputs can be made while the device is measured.
    pub patterns: Arc<Patterns>,
    pub read_gb_per_s: f64,
    pub copy_gb_per_s: f64,
}

/// What one case gave.
pub struct Measured {
    pub microseconds: Vec<f64>,
    pub copy_only_microseconds: Vec<f64>,
    pub bytes: f64,
    pub relative_error: Option<f64>,
    pub plan: String,
}

impl<'a> Bench<'a> {
    pub fn new(
        device: &'a CudaDevice,
        kernels: &'a Kernels,
        stream: &'a Stream,
        num_samples: usize,
    ) -> Result<Self> {
        let mut bench = Self {
            device,
            kernels,
            stream,
            streams: kernels.stream_kernels()?,
            num_samples,
            gpu: device.facts().name.clone(),
            patterns: Arc::default(),
            tuner: cuda_tuner(device.facts(), Level::from_env()?),
            read_gb_per_s: 0.0,
            copy_gb_per_s: 0.0,
        };
        let (src, dst) = (device.alloc(STREAM_BYTES)?, device.alloc(STREAM_BYTES)?);
        let mut rng = Rng::new(3);
        let block: Vec<u64> = (0..1 << 20).map(|_| rng.bits()).collect();
        for offset in (0..STREAM_BYTES).step_by(size_of_val(&block[..])) {
            src.write(offset, &block)?;
        }
        let read =
            bench.time(4, num_samples, |_, stream| bench.streams.read(src.view(), dst.view(), stream))?;
        let copy =
            bench.time(4, num_samples, |_, stream| bench.streams.copy(src.view(), dst.view(), stream))?;
        let median = |samples: Vec<f64>| super::quantiles(&mut samples.clone()).0;
        bench.read_gb_per_s = STREAM_BYTES as f64 / median(read) / 1e3;
        bench.copy_gb_per_s = 2.0 * STREAM_BYTES as f64 / median(copy) / 1e3;
        Ok(bench)
    }

    /// Microseconds a launch: one sample a replay of a graph of `launches` launches.
    pub fn time(
        &self,
        launches: usize,
        num_samples: usize,
        launch: impl Fn(usize, &Stream) -> Result<(), DeviceError>,
    ) -> Result<Vec<f64>> {
        let graph = self.capture(launches, launch)?;
        self.replay(&graph, launches, 3, num_samples, Duration::MAX)
    }

    /// A graph of `launches` launches.
    pub fn capture(
        &self,
        launches: usize,
        launch: impl Fn(usize, &Stream) -> Result<(), DeviceError>,
    ) -> Result<Graph> {
        Ok(Graph::capture(self.stream, |stream| (0..launches).try_for_each(|i| launch(i, stream)))?)
    }

    /// Microseconds a launch: one sample a replay, after replays that do not count. Past the limit those taken so far do.
    pub fn replay(
        &self,
        graph: &Graph,
        launches: usize,
        num_uncounted: usize,
        num_samples: usize,
        limit: Duration,
    ) -> Result<Vec<f64>> {
        let begun = Instant::now();
        let (start, end) = (Event::new(self.device)?, Event::new(self.device)?);
        let mut samples = Vec::with_capacity(num_samples);
        for sample in 0..num_samples + num_uncounted {
            start.record(self.stream)?;
            graph.launch(self.stream)?;
            end.record(self.stream)?;
            end.synchronize()?;
            // The first replays upload the graph and warm the clocks.
            if sample >= num_uncounted {
                samples.push(end.microseconds_since(&start)? / launches as f64);
            }
            if !samples.is_empty() && begun.elapsed() >= limit {
                break;
            }
        }
        Ok(samples)
    }

    /// How many launches a graph takes, and how many tables they rotate through.
    pub fn launches(&self, bytes: f64) -> (usize, u64) {
        inputs::launches(bytes, u64::from(self.device.facts().l2_bytes), self.read_gb_per_s)
    }

    /// Appends of `tokens` tokens to the slots of shuffled pages, a page's in a row, inputs and slots rotating.
    pub fn append(&self, case: &Case, tokens: u32) -> Result<Measured> {
        let spec = &case.spec;
        let row = spec.num_kv_heads as usize * spec.head_dim as usize;
        let input_bytes = 2 * tokens as usize * row * FloatType::Bf16.bytes();
        let per_token = case.layout_of(1)?.format().bytes_per_token();
        let bytes = input_bytes as f64 + (u64::from(tokens) * per_token) as f64;
        let (launches, rotations) = self.launches(bytes);
        let slots_in_all = (u64::from(tokens) * rotations).next_multiple_of(u64::from(case.page_len));
        let layout = case.layout_of(slots_in_all / u64::from(case.page_len))?;
        let buffers = layout
            .buffer_bytes()
            .iter()
            .map(|&bytes| self.device.alloc(usize::try_from(bytes).unwrap_or(usize::MAX)))
            .collect::<Result<Vec<_>, _>>()?;
        let views: Vec<_> = buffers.iter().map(DeviceBuffer::view).collect();
        let page_len = i64::from(case.page_len);
        let mut pages: Vec<i64> = (0..slots_in_all as i64 / page_len).collect();
        Rng::new(5).shuffle(&mut pages);
        let slots: Vec<i64> = pages.iter().flat_map(|page| page * page_len..(page + 1) * page_len).collect();
        let slots = self.device.upload(&slots)?;
        let input = gaussians(FloatType::Bf16, tokens as usize * row, 6);
        let side_bytes = (input_bytes / 2) as u64;
        let inputs = self.device.alloc(input_bytes * rotations as usize)?;
        for half in 0..2 * rotations as usize {
            inputs.write(half * side_bytes as usize, input.as_slice().as_bytes())?;
        }
        let cache_kernels = self.kernels.cache_kernels()?;
        let mut report = ErrorReport::new(self.device)?;
        let microseconds = self.time(launches, self.num_samples, |i, stream| {
            let rotation = i as u64 % rotations;
            let part = |buffer: &DeviceBuffer, offset: u64, len: u64| {
                buffer
                    .view()
                    .slice(offset, len)
                    .ok_or_else(|| DeviceError::Launch { what: "a slice".to_owned() })
            };
            let args = AppendArgs {
                cache: CacheArgs { layout: &layout, buffers: &views, pages: None },
                k: part(&inputs, 2 * rotation * side_bytes, side_bytes)?,
                v: part(&inputs, (2 * rotation + 1) * side_bytes, side_bytes)?,
                k_token_stride: row as u64,
                v_token_stride: row as u64,
                slot_mapping: part(&slots, rotation * u64::from(tokens) * 8, u64::from(tokens) * 8)?,
                num_tokens: tokens,
                input_type: FloatType::Bf16,
                error: report.view(),
            };
            cache_kernels.append(&args, stream)
        })?;
        report.take(self.stream).context("the kernel reports bad data")?;
        // The floor of an append is a copy of as many bytes.
        let floor = bytes / self.copy_gb_per_s / 1e3;
        Ok(Measured {
            copy_only_microseconds: vec![floor],
            microseconds,
            bytes,
            relative_error: None,
            plan: "append; copy-only is the copy bandwidth of this run".to_owned(),
        })
    }
}
