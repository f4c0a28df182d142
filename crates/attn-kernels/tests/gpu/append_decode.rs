//! One walk along the data flow: append, decode, dequantize, against plain arithmetic on the host. The conformance suite
//! does the rest; this one says that the launches carry the right numbers.

use attn_kernels::abi::{ErrorKind, Ready};
use attn_kernels::device::{
    AppendArgs, CacheArgs, DecodeArgs, DequantizeArgs, DeviceBuffer, DeviceError, DeviceView, ErrorReport,
    Graph, Kernels, PageRowsArgs, PageTableArgs, PlanArgs, Stream,
};
use attn_kernels::key::Arithmetic;
use attn_plan::{DecodeSpec, SplitConfig, SplitPlan, WorkspaceSize};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatType, ScaleType};

use crate::kernels;

const PAGE_LEN: u32 = 16;
const NUM_PAGES: u64 = 64;

/// Numbers in (-1, 1) without a crate for them.
fn noise(len: usize, mut seed: u64) -> Vec<f32> {
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 40) as f32) / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

struct Case {
    kernels: Kernels,
    stream: Stream,
    layout: CacheLayout,
    spec: DecodeSpec,
    kv_lens: Vec<u32>,
    /// `[batch, 16]`, shuffled.
    pages: Vec<i32>,
    buffers: Vec<DeviceBuffer>,
    report: ErrorReport,
}

impl Case {
    fn new(layout: CacheLayout, spec: DecodeSpec, kv_lens: Vec<u32>) -> Option<Self> {
        let kernels = kernels()?;
        let device = kernels.device().clone();
        let row_len = 16;
        let pages =
            (0..kv_lens.len() * row_len).map(|idx| ((idx * 37 + 5) % NUM_PAGES as usize) as i32).collect();
        let buffers = layout.buffer_bytes().iter().map(|len| device.alloc(*len as usize).unwrap()).collect();
        let (stream, report) = (Stream::new(&device).unwrap(), ErrorReport::new(&device).unwrap());
        Some(Self { kernels, stream, layout, spec, kv_lens, pages, buffers, report })
    }

    fn slot(&self, request: usize, token: u32) -> i64 {
        let page = self.pages[request * 16 + (token / PAGE_LEN) as usize];
        i64::from(page) * i64::from(PAGE_LEN) + i64::from(token % PAGE_LEN)
    }
}

#[test]
fn append_decode_dequantize_agree_with_the_host() {
    for (head_dim, group_len, scale_type, native) in [
        (128, 8, ScaleType::F16, true),
        (128, 8, ScaleType::F16, false),
        (64, 32, ScaleType::F32, false),
        (96, 96, ScaleType::Bf16, true),
        (256, 64, ScaleType::F16, false),
    ] {
        let format = CacheFormat::new(2, head_dim, group_len, group_len, scale_type).unwrap();
        let layout = if native {
            CacheLayout::native(format, NUM_PAGES, PAGE_LEN).unwrap()
        } else {
            CacheLayout::hnd(format, NUM_PAGES, PAGE_LEN).unwrap()
        };
        let spec = DecodeSpec {
            q_type: FloatType::F32,
            out_type: FloatType::F32,
            want_lse: true,
            ..DecodeSpec::new(6, 2, head_dim)
        };
        // 13 pages and 3 pages; the shuffle above keeps the first rows of both apart.
        let Some(mut case) = Case::new(layout, spec, vec![200, 33]) else { return };
        check(&mut case);
    }
}

fn check(case: &mut Case) {
    let device = case.kernels.device().clone();
    let (heads, dim) = (2_usize, case.spec.head_dim as usize);
    let slots: Vec<i64> = (0..case.kv_lens.len())
        .flat_map(|request| (0..case.kv_lens[request]).map(move |token| (request, token)))
        .map(|(request, token)| case.slot(request, token))
        .collect();
    let num_tokens = slots.len();
    let k = noise(num_tokens * heads * dim, 1);
    let v = noise(num_tokens * heads * dim, 2);

    // Append on the device and on the host: the same bytes.
    let cache_kernels = case.kernels.cache_kernels().unwrap();
    let (k_device, v_device) = (device.upload(&k).unwrap(), device.upload(&v).unwrap());
    let slots_device = device.upload(&slots).unwrap();
    for buffer in &case.buffers {
        buffer.fill(0, &case.stream).unwrap();
    }
    let views: Vec<DeviceView> = case.buffers.iter().map(DeviceBuffer::view).collect();
    let pages_device = device.upload(&case.pages).unwrap();
    let cache = CacheArgs {
        layout: &case.layout,
        buffers: &views,
        pages: Some(PageTableArgs { indices: pages_device.view(), rows: PageRowsArgs::Stride(16) }),
    };
    let append = AppendArgs {
        cache,
        k: k_device.view(),
        v: v_device.view(),
        k_token_stride: (heads * dim) as u64,
        v_token_stride: (heads * dim) as u64,
        slot_mapping: slots_device.view(),
        num_tokens: num_tokens as u32,
        input_type: FloatType::F32,
        error: case.report.view(),
    };
    cache_kernels.append(&append, &case.stream).unwrap();
    case.report.take(&case.stream).unwrap();
    let mut host = CacheBuffers::zeroed(&case.layout).unwrap();
    kv_quant::append(&case.layout, &mut host.view_mut(), FloatSlice::F32(&k), FloatSlice::F32(&v), &slots)
        .unwrap();
    let host_views = host.view();
    for (idx, buffer) in case.buffers.iter().enumerate() {
        let mut bytes = vec![0_u8; buffer.len_bytes()];
        buffer.read(0, &mut bytes).unwrap();
        assert!(bytes == host_views.buffer(idx), "buffer {idx} of {:?}", case.layout.kind());
    }

    // Decode against f64 arithmetic over the dequantized rows.
    let batch = case.kv_lens.len();
    let q = noise(batch * 6 * dim, 3);
    let decoder = case.kernels.decoder(&cache.params().unwrap(), &case.spec, Arithmetic::F32).unwrap();
    let mut plan = SplitPlan::default();
    plan.update(&case.spec, &case.kv_lens, &SplitConfig::throughput(7)).unwrap();
    let size = WorkspaceSize::of(&case.spec, &plan).unwrap();
    let items: Vec<u32> = plan
        .items()
        .iter()
        .flat_map(|item| [item.request_idx, item.token_start, item.token_end, item.partial_idx])
        .collect();
    let q_device = device.upload(&q).unwrap();
    let out = device.alloc_zeroed(q.len() * 4).unwrap();
    let lse = device.alloc_zeroed(batch * 6 * 4).unwrap();
    let kv_lens = device.upload(&case.kv_lens).unwrap();
    let items = device.upload(&items).unwrap();
    let worker_starts = device.upload(plan.worker_starts()).unwrap();
    let request_partials = device.upload(plan.request_partials()).unwrap();
    let partial_o = device.alloc(size.o_elements * 4).unwrap();
    let partial_ml = device.alloc(size.ml_elements * 4).unwrap();
    let args = DecodeArgs {
        spec: &case.spec,
        cache,
        batch: batch as u32,
        q: q_device.view(),
        out: out.view(),
        lse: Some(lse.view()),
        kv_lens: kv_lens.view(),
        plan: PlanArgs {
            items: items.view(),
            worker_starts: worker_starts.view(),
            request_partials: request_partials.view(),
            num_workers: 7,
            num_shares: 0,
            wide: false,
            heads_per_block: 1,
            has_partials: plan.num_partials() > 0,
        },
        ready: Ready::History,
        partial_o: partial_o.view(),
        partial_ml: partial_ml.view(),
        alibi_slopes: None,
        sinks: None,
        error: case.report.view(),
    };
    decoder.run(&args, &case.stream).unwrap();
    case.report.take(&case.stream).unwrap();
    let mut got = vec![0_f32; q.len()];
    out.read(0, &mut got).unwrap();
    let mut got_lse = vec![0_f32; batch * 6];
    lse.read(0, &mut got_lse).unwrap();

    let row = |side, slot: i64, head: u32| {
        let mut row = vec![0_f32; dim];
        kv_quant::dequantize_row(&case.layout, &host_views, side, slot as u64, head, &mut row).unwrap();
        row
    };
    for request in 0..batch {
        for head in 0..6 {
            let q_row = &q[(request * 6 + head) * dim..][..dim];
            let kv_head = (head / 3) as u32;
            let tokens: Vec<i64> =
                (0..case.kv_lens[request]).map(|token| case.slot(request, token)).collect();
            let logits: Vec<f64> = tokens
                .iter()
                .map(|slot| {
                    let k = row(kv_quant::Side::K, *slot, kv_head);
                    let dot: f64 = q_row.iter().zip(&k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(case.spec.softmax_scale)
                })
                .collect();
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let mut expected = vec![0_f64; dim];
            for (slot, logit) in tokens.iter().zip(&logits) {
                let v = row(kv_quant::Side::V, *slot, kv_head);
                for (sum_of, value) in expected.iter_mut().zip(&v) {
                    *sum_of += logit.exp() / sum * f64::from(*value);
                }
            }
            for (channel, expected) in expected.iter().enumerate() {
                let got = f64::from(got[(request * 6 + head) * dim + channel]);
                assert!(
                    (got - expected).abs() < 1e-5,
                    "request {request} head {head}: {got} instead of {expected}"
                );
            }
            let got = f64::from(got_lse[request * 6 + head]);
            assert!((got - sum.ln()).abs() < 1e-5, "lse {got} instead of {}", sum.ln());
        }
    }

    // The same, captured: the same bits.
    out.fill(0xff, &case.stream).unwrap();
    let graph = Graph::capture(&case.stream, |stream| decoder.run(&args, stream)).unwrap();
    for _ in 0..3 {
        graph.launch(&case.stream).unwrap();
    }
    case.stream.synchronize().unwrap();
    let mut replayed = vec![0_f32; q.len()];
    out.read(0, &mut replayed).unwrap();
    assert!(got == replayed);

    // Dequantize: code * scale.
    let len = 33 * heads * dim;
    let (k_out, v_out) = (device.alloc(len * 4).unwrap(), device.alloc(len * 4).unwrap());
    let dequantize = DequantizeArgs {
        cache,
        k: k_out.view(),
        v: v_out.view(),
        request_idx: 1,
        token_start: 0,
        token_end: 33,
        out_type: FloatType::F32,
        error: case.report.view(),
    };
    cache_kernels.dequantize(&dequantize, &case.stream).unwrap();
    case.report.take(&case.stream).unwrap();
    let mut dense = vec![0_f32; len];
    v_out.read(0, &mut dense).unwrap();
    for token in 0..33 {
        for head in 0..heads {
            let expected = row(kv_quant::Side::V, case.slot(1, token), head as u32);
            assert!(
                dense[(token as usize * heads + head) * dim..][..dim] == expected,
                "token {token} head {head}"
            );
        }
    }

    // Bad data comes back as a type and is taken: the next call is clean.
    let mut bad = k.clone();
    bad[dim + 3] = f32::NAN;
    k_device.write(0, &bad).unwrap();
    cache_kernels.append(&append, &case.stream).unwrap();
    match case.report.take(&case.stream).unwrap_err() {
        DeviceError::Reported(report) => {
            assert_eq!(report.kind, Some(ErrorKind::NonFinite), "{report}");
            assert_eq!((report.record.request_idx, report.record.head_idx, report.record.channel), (0, 1, 3));
        }
        other => panic!("{other}"),
    }
    k_device.write(0, &k).unwrap();
    cache_kernels.append(&append, &case.stream).unwrap();
    case.report.take(&case.stream).unwrap();

    // Views that are too short never reach the device.
    let short = DecodeArgs { q: q_device.view().slice(0, 16).unwrap(), ..args };
    assert!(matches!(decoder.run(&short, &case.stream), Err(DeviceError::Launch { .. })));
}
