#!/usr/bin/env python3
"""Times FlashInfer and its XQA on the cases of `cargo xtask bench gpu`, and kv8 beside them in the same run.

    pip install flashinfer-python          # brings torch's own needs; compiles its kernels on first use
    python3 benches/peers/peers.py         # all peers, kv8 too, a table
    python3 benches/peers/peers.py --csv   # lines for benches/peers.csv

Conditions are those of our own benchmark: CUDA graph replays, bf16 queries and outputs, random data, shuffled pages of
16 tokens, caches rotated through more than five times the L2, median of at least 20 replays. A peer that is not installed
or refuses a case is printed with its reason; nothing is estimated.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import tempfile

CASES = [(1, 1024), (1, 8192), (1, 131072), (8, 2048), (8, 8192), (32, 2048), (32, 8192), (64, 8192), (128, 2048), (128, 8192)]
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_LEN = 32, 8, 128, 16
WORKSPACE_BYTES = 256 << 20
GRAPH_MICROSECONDS = 4000.0
L2_TIMES = 5


class Case:
    """One batch over one pool, with page tables for every rotation."""

    def __init__(self, torch, batch, kv_len, element_bytes):
        self.batch, self.kv_len = batch, kv_len
        self.pages_per_request = kv_len // PAGE_LEN
        self.bytes = 2 * batch * kv_len * NUM_KV_HEADS * HEAD_DIM * element_bytes
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.rotations = min(max(math.ceil(L2_TIMES * l2_bytes / self.bytes), 1), 256)
        num_pages = batch * self.pages_per_request * self.rotations
        pages = list(range(num_pages))
        random.Random(2).shuffle(pages)
        self.num_pages = num_pages
        self.tables = torch.tensor(pages, dtype=torch.int32, device="cuda").view(self.rotations, batch, -1)


def random_cache(torch, case, dtype):
    """K and V of `[num_pages, num_kv_heads, page_len, head_dim]`, filled block by block."""
    shape = (case.num_pages, NUM_KV_HEADS, PAGE_LEN, HEAD_DIM)
    block = torch.randn(min(case.num_pages, 4096), *shape[1:], device="cuda").to(dtype)
    caches = []
    for _ in range(2):
        cache = torch.empty(shape, dtype=dtype, device="cuda")
        for start in range(0, case.num_pages, len(block)):
            part = cache[start : start + len(block)]
            part.view(torch.uint8).copy_(block[: len(part)].view(torch.uint8))
        caches.append(cache)
    return caches


def timed(torch, case, launch, samples):
    """Median microseconds of one launch, over replays of a graph that goes through all rotations."""
    for rotation in range(min(case.rotations, 2)):
        launch(rotation)
    torch.cuda.synchronize()
    expected = 4.0 + case.bytes / 3e6
    launches = max(min(math.ceil(GRAPH_MICROSECONDS / expected), 400), 1, case.rotations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i % case.rotations)
    times = []
    for sample in range(samples + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if sample >= 3:
            times.append(1e3 * start.elapsed_time(end) / launches)
    return statistics.median(times)


def flashinfer_wrapper(torch, flashinfer, case, dtype, use_tensor_cores):
    q = torch.randn(case.batch, NUM_Q_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = random_cache(torch, case, dtype)
    indptr = torch.arange(case.batch + 1, dtype=torch.int32) * case.pages_per_request
    last = torch.full((case.batch,), PAGE_LEN, dtype=torch.int32)
    wrappers = []
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    for rotation in range(case.rotations):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=use_tensor_cores)
        indices = case.tables[rotation].reshape(-1)
        wrapper.plan(
            indptr, indices, last, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_LEN,
            q_data_type=torch.bfloat16, kv_data_type=dtype,
        )
        wrappers.append(wrapper)
        # Every wrapper has its own plan on the device; more than a few do not fit beside large caches.
        if len(wrappers) * 8 > 512:
            break
    out = torch.empty_like(q)
    case.rotations = len(wrappers)
    return lambda rotation: wrappers[rotation].run(q, (k, v), out=out)


def xqa(torch, flashinfer, case, dtype):
    q = torch.randn(case.batch, NUM_Q_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = random_cache(torch, case, dtype)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    lens = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)

    def launch(rotation):
        flashinfer.decode.trtllm_batch_decode_with_kv_cache(
            q, (k, v), workspace, case.tables[rotation], lens, case.kv_len,
            bmm1_scale=HEAD_DIM**-0.5, bmm2_scale=1.0, out=out, kv_layout="HND", backend="xqa",
        )

    return launch


def kv8(command, samples):
    """Our own table, from the benchmark itself: `(batch, kv_len) -> microseconds` for groups of 8 and of 128."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        arguments = ["--suite", "table,group128", "--samples", str(samples), "--record", file.name]
        subprocess.run(shlex.split(command) + arguments, check=True, stdout=subprocess.DEVNULL)
        record = json.load(open(file.name))
    found = {}
    for row in record["rows"]:
        if row["page_len"] != PAGE_LEN or row["layout"] not in ("native", "hnd"):
            continue
        key = (f"kv8 int8 g{row['group_len']} {row['layout']}", row["batch"], row["kv_len"])
        found[key] = row["microseconds"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--csv", action="store_true", help="print lines for benches/peers.csv")
    parser.add_argument("--kv8", default="cargo xtask bench gpu", help="how our benchmark is run; empty: not at all")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("PyTorch is not installed: pip install flashinfer-python")
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: there is nothing to compare here")
    try:
        import flashinfer
        import flashinfer.decode
    except ImportError:
        sys.exit("FlashInfer is not installed: pip install flashinfer-python")
    fp8 = torch.float8_e4m3fn
    peers = {
        "FlashInfer bf16 CUDA-core": (2, lambda case: flashinfer_wrapper(torch, flashinfer, case, torch.bfloat16, False)),
        "FlashInfer bf16 tensor-core": (2, lambda case: flashinfer_wrapper(torch, flashinfer, case, torch.bfloat16, True)),
        "FlashInfer fp8 CUDA-core": (1, lambda case: flashinfer_wrapper(torch, flashinfer, case, fp8, False)),
        "FlashInfer fp8 tensor-core": (1, lambda case: flashinfer_wrapper(torch, flashinfer, case, fp8, True)),
        "XQA bf16": (2, lambda case: xqa(torch, flashinfer, case, torch.bfloat16)),
        "XQA fp8": (1, lambda case: xqa(torch, flashinfer, case, fp8)),
    }
    gpu = torch.cuda.get_device_name(0)
    print(f"# {gpu}, FlashInfer {flashinfer.__version__}, PyTorch {torch.__version__}", file=sys.stderr)
    results = kv8(args.kv8, args.samples) if args.kv8 else {}
    for batch, kv_len in CASES:
        for name, (element_bytes, make) in peers.items():
            torch.cuda.empty_cache()
            case = Case(torch, batch, kv_len, element_bytes)
            try:
                us = timed(torch, case, make(case), args.samples)
            except (RuntimeError, ValueError, torch.cuda.OutOfMemoryError) as error:
                reason = str(error).strip().splitlines()
                print(f"# {name} {batch} x {kv_len}: {reason[0] if reason else error!r}", file=sys.stderr)
                continue
            results[(name, batch, kv_len)] = us
            print(f"# {name} {batch} x {kv_len}: {us:.1f} us", file=sys.stderr)
    if args.csv:
        short = next((known for known in ("H100", "H200", "A100", "B200") if known in gpu), gpu)
        for (name, batch, kv_len), us in sorted(results.items()):
            print(f"{short},{name},{NUM_Q_HEADS},{NUM_KV_HEADS},{HEAD_DIM},{batch},{kv_len},{us:.1f}")
        return
    names = sorted({name for name, _, _ in results})
    print("batch x kv_len | " + " | ".join(names))
    for batch, kv_len in CASES:
        cells = [results.get((name, batch, kv_len)) for name in names]
        print(f"{batch} x {kv_len} | " + " | ".join("-" if us is None else f"{us:.1f}" for us in cells))


if __name__ == "__main__":
    main()
