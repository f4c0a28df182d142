"""Times the kernels with graph replays over pools rotated beyond the L2 cache."""

import math
import struct

import numpy as np
import torch

from launch import DEV, FLOATS, Cache, Decode, pick, plan_fixed, plan_stream, visible_start


def median_us(launches, per_graph=1, replays=15):
    """launches: functions; captured in order into one graph. Microseconds a launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
        for _ in range(2):
            graph.replay()
        times = []
        for _ in range(replays):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b) * 1e3 / (len(launches) * per_graph))
    return float(np.median(times))


def bandwidth(kernels):
    size = 4 << 30
    src = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device=DEV)
    dst = torch.empty_like(src)
    params = struct.pack("<3Q", src.data_ptr(), dst.data_ptr(), size // 16)
    read = min(median_us([lambda: kernels.launch("kv8_stream_read", (132 * k, 1, 1), (512, 1, 1), params)]) for k in (2, 4, 8))
    copy = min(median_us([lambda: kernels.launch("kv8_stream_copy", (132 * k, 1, 1), (512, 1, 1), params)]) for k in (2, 4, 8))
    return size / read / 1e3, 2 * size / copy / 1e3


def bench_case(kernels, lens, *, heads=8, gqa=4, dim=128, k_group=8, scale="f16", layout="native", page_len=16, q_len=1,
               ctas=None, workers=None, reader=True, force=None, shuffled=True, window=0, soft_cap=0.0, sinks=False, fixed=0,
               q_type="bf16", pool_bytes=330e6, heads_per_cta=1):
    batch, tokens = len(lens), sum(lens)
    unit = 4 if scale == "f32" else 2
    row_bytes = dim + dim // k_group * unit
    bytes_ = 2 * heads * tokens * row_bytes
    copies = max(1, min(24, math.ceil(pool_bytes / bytes_)))
    per_page = [-(-n // page_len) for n in lens]
    pages = sum(per_page)
    cache = Cache(layout, pages * copies, page_len, heads, dim, k_group, k_group, scale, poison=False)
    for i in range(2):
        flat = cache.codes[i]
        for lo in range(0, flat.shape[0], 1 << 16):
            part = flat[lo : lo + (1 << 16)]
            part.copy_(torch.randint(-127, 128, part.shape, device=DEV, dtype=torch.int8))
        cache.scales[i].copy_((torch.rand(cache.scales[i].shape, device=DEV, dtype=torch.float16 if scale == "f16" else torch.float32) * 0.02))
    order = (torch.randperm(pages * copies, device=DEV) if shuffled else torch.arange(pages * copies, device=DEV)).to(torch.int32)
    q = torch.randn((batch, q_len, heads * gqa, dim), device=DEV).to(FLOATS[q_type][1])
    sink = torch.randn(heads * gqa, device=DEV) if sinks else None
    rows = gqa * q_len
    symbol = force or pick(kernels, cache, rows)
    info = kernels.by_symbol[symbol]
    blocks = -(-rows // (8 * info["row_tiles"]))
    count = workers or max(1, 132 * (ctas or info["min_ctas"]) * heads_per_cta // heads // blocks)
    plan = plan_fixed(lens, q_len, window, count, fixed) if fixed else plan_stream(lens, q_len, window, count)
    decodes, partials = [], None
    stride = max(per_page)
    for c in range(copies):
        part = order[c * pages : (c + 1) * pages]
        table = torch.zeros((batch, stride), dtype=torch.int32, device=DEV)
        at = 0
        for r, n in enumerate(per_page):
            table[r, :n] = part[at : at + n]
            at += n
        decode = Decode(kernels, cache, table, lens, q, q_type, plan, row_stride=stride, force=symbol, partials=partials,
                        window=window, soft_cap=soft_cap, sinks=sink, lse=False, heads_per_cta=heads_per_cta)
        partials = (decode.partial_o, decode.partial_ml)
        decodes.append(decode)
    repeat = max(1, 16 // copies)
    full = median_us([d.run for d in decodes] * repeat)
    alone = median_us([d.stage1 for d in decodes] * repeat)
    floor = None
    name = f"kv8_reader_d{dim}_{'g8' if k_group == 8 else 'g16'}_sf16"
    if reader and scale == "f16" and name in kernels.by_symbol:
        grid, block = (decodes[0].grid[0], 1, 1), decodes[0].block
        floor = median_us([(lambda d=d: kernels.launch(name, grid, block, d.params)) for d in decodes] * repeat)
    seen = 2 * heads * row_bytes * sum(n - visible_start(n, q_len, window) for n in lens)
    result = dict(us=full, stage1_us=alone, reader_us=floor, mb=seen / 1e6, gb_per_s=seen / full / 1e3, symbol=symbol,
                  workers=decodes[0].num_workers)
    del decodes, cache
    return result


def bench(kernels, cases, read):
    rows = []
    for name, lens, options in cases:
        try:
            r = bench_case(kernels, lens, **options)
        except torch.OutOfMemoryError:
            print(f"{name:42s} out of memory")
            torch.cuda.empty_cache()
            continue
        floor = f"{r['reader_us']:8.1f} {r['reader_us'] / r['us'] * 100:5.1f}%" if r["reader_us"] else " " * 15
        print(f"{name:42s} {r['mb']:8.1f} MB {r['us']:8.1f} us  stage1 {r['stage1_us']:8.1f}  reader {floor}  "
              f"{r['gb_per_s']:6.0f} GB/s {r['gb_per_s'] / read * 100:5.1f}% of read  w{r['workers']}", flush=True)
        rows.append(dict(case=name, **r))
        torch.cuda.empty_cache()
    return rows


def log_normal_lens(count, total, seed=1):
    rng = np.random.default_rng(seed)
    x = np.exp(rng.normal(0, 1.6, count))
    return [max(1, int(v)) for v in x / x.sum() * total]


def standard_cases():
    u = lambda b, n: [n] * b
    lightllm = dict(layout="lightllm", page_len=1, heads_per_cta=4)
    cases = [
        ("1x1024 native p16", u(1, 1024), dict(workers=16)),
        ("1x8192 native p16", u(1, 8192), dict(workers=32)),
        ("8x2048 native p16", u(8, 2048), dict(workers=32)),
        ("8x2048 lightllm shuffled", u(8, 2048), lightllm),
        ("8x8192 native p16", u(8, 8192), dict(workers=48)),
        ("8x8192 lightllm shuffled", u(8, 8192), lightllm),
        ("32x8192 native p16", u(32, 8192), {}),
        ("32x8192 lightllm shuffled", u(32, 8192), lightllm),
        ("128x8192 native p16", u(128, 8192), {}),
        ("128x8192 lightllm shuffled", u(128, 8192), lightllm),
        ("128x2048 native p16", u(128, 2048), {}),
        ("1x131072 native p16", u(1, 131072), {}),
        ("1x131072 lightllm shuffled", u(1, 131072), lightllm),
        ("64x8192 4q/1kv native p16", u(64, 8192), dict(heads=1)),
        ("64x8192 4q/1kv lightllm shuffled", u(64, 8192), dict(heads=1, layout="lightllm", page_len=1)),
        ("32x8192 native page 1", u(32, 8192), dict(page_len=1, heads_per_cta=4)),
        ("32x8192 hnd p16", u(32, 8192), dict(layout="hnd")),
        ("32x8192 group 128 hnd p16", u(32, 8192), dict(layout="hnd", k_group=128)),
        ("32x8192 group 128 native p16", u(32, 8192), dict(k_group=128)),
        ("32x8192 group 32 native p16", u(32, 8192), dict(k_group=32)),
        ("32x8192 bf16 scales", u(32, 8192), dict(scale="bf16")),
        ("32x8192 f32 scales", u(32, 8192), dict(scale="f32")),
        ("32x8192 gqa 1", u(32, 8192), dict(gqa=1)),
        ("32x8192 gqa 7", u(32, 8192), dict(gqa=7)),
        ("32x8192 gqa 16", u(32, 8192), dict(gqa=16)),
        ("32x8192 gqa 4 q_len 8", u(32, 8192), dict(q_len=8)),
        ("32x8192 head_dim 64", u(32, 8192), dict(dim=64)),
        ("32x8192 head_dim 96", u(32, 8192), dict(dim=96)),
        ("32x8192 head_dim 192", u(32, 8192), dict(dim=192)),
        ("32x8192 head_dim 256", u(32, 8192), dict(dim=256)),
        ("32x8192 soft-cap + sinks", u(32, 8192), dict(soft_cap=50.0, sinks=True)),
        ("32x8192 window 4096", u(32, 8192), dict(window=4096)),
        ("ragged 64, 400k tokens", log_normal_lens(64, 400000), {}),
        ("32x8192 invariant split 512", u(32, 8192), dict(fixed=512)),
    ]
    return cases


def bench_append(kernels, copy):
    for tokens in (128, 8192):
        heads, dim = 8, 128
        cache = Cache("native", 4 * 8192 // 16, 16, heads, dim, 8, 8, "f16")
        k = torch.randn((tokens, heads, dim), device=DEV).bfloat16()
        v = torch.randn((tokens, heads, dim), device=DEV).bfloat16()
        error = torch.zeros(8, dtype=torch.int32, device=DEV)
        launches = []
        keep = []
        for _ in range(8):
            slots = torch.randperm(cache.num_pages * 16, device=DEV)[:tokens].contiguous()
            keep.append(slots)
            params = cache.pack() + struct.pack("<6Q2I", k.data_ptr(), v.data_ptr(), slots.data_ptr(), error.data_ptr(), heads * dim, heads * dim, tokens, 1)
            launches.append(lambda params=params: kernels.launch("kv8_append", (min(tokens * heads // 32, 132 * 8), 1, 1), (256, 1, 1), params))
        us = median_us(launches)
        moved = tokens * heads * 2 * (256 + 160)
        print(f"append {tokens} tokens: {us:.1f} us, {moved / us / 1e3:.0f} GB/s of copy {copy:.0f}")
