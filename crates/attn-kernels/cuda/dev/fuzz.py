"""Random decode problems against the reference, special cases, and seeded bugs that must be caught."""

import math
import pathlib
import time

import numpy as np
import torch

from append_check import check_append
from launch import DEV, FLOATS, Cache, Decode, Kernels, pick, plan_fixed, plan_stream
from reference import reference, store_bound


class Case:
    """A random decode problem; everything follows from the seed."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        pick_ = lambda *xs: xs[rng.integers(len(xs))]
        self.seed = seed
        self.dim = pick_(64, 96, 128, 128, 192, 256)
        groups = [g for g in (8, 16, 32, 64, 128) if self.dim % g == 0 and g <= self.dim] + [self.dim]
        self.k_group = pick_(8, 8, *groups)
        self.v_group = self.k_group if rng.random() < 0.75 else pick_(*groups)
        self.scale = pick_("f16", "f16", "bf16", "f32")
        self.q_type, self.out_type = pick_("f16", "bf16", "f32"), pick_("f16", "bf16", "f32")
        self.heads = pick_(1, 1, 2, 3, 8)
        self.gqa = pick_(1, 2, 3, 4, 4, 5, 6, 7, 8, 12, 16, 64 if self.heads == 1 else 4)
        self.q_len = pick_(1, 1, 1, 1, 2, 3, 4, 8)
        self.layout = pick_("lightllm", "native", "hnd", "nhd")
        if self.layout == "lightllm":
            self.v_group = self.k_group
        self.page_len = 1 if self.layout == "lightllm" else pick_(1, 16, 32, 64, 128)
        self.batch = pick_(1, 2, 3, 5)
        top = pick_(40, 200, 700, 3000)
        edges = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]
        self.lens = [int(rng.choice(edges)) if rng.random() < 0.4 else int(rng.integers(0, top)) for _ in range(self.batch)]
        self.window = 0 if rng.random() < 0.6 else int(rng.choice([1, 2, 16, 17, 100, 1000]))
        self.soft_cap = 0.0 if rng.random() < 0.7 else float(rng.choice([1.0, 30.0, 50.0]))
        self.alibi = rng.random() < 0.3
        self.sinks = rng.random() < 0.3
        self.workers = int(rng.choice([1, 2, 3, 7, 16, 40]))
        self.fixed = int(rng.choice([0, 0, 64, 128, 512]))
        self.magnitude = pick_("usual", "usual", "usual", "mixed", "wide", "tiny")
        self.bad_page = rng.random() < 0.08
        self.heads_per_cta = pick_(1, 1, 2, 4)
        self.shares = pick_(0, 0, 0, 1, 2, 3, 4, 6, 7, 8, 12, 16)
        self.wide = rng.random() < 0.5
        self.in_order = rng.random() < 0.5
        self.fills_device = int(rng.random() < 0.3)
        self.rng = rng

    def __str__(self):
        keys = [k for k in vars(self) if k != "rng"]
        return " ".join(f"{k}={getattr(self, k)}" for k in keys)

    def build(self):
        rng = self.rng
        gen = torch.Generator(device=DEV).manual_seed(self.seed)
        per_page = [-(-n // self.page_len) for n in self.lens]
        num_pages = sum(per_page) + 3
        cache = Cache(self.layout, num_pages, self.page_len, self.heads, self.dim, self.k_group, self.v_group, self.scale)
        order = torch.from_numpy(rng.permutation(num_pages).astype(np.int32)).to(DEV)
        stride = max(per_page + [1]) + 2
        table = torch.full((self.batch, stride), 0x7FFFFFF0, dtype=torch.int32, device=DEV)
        table[:, -1] = -7
        at = 0
        rows = []
        dtype = FLOATS[self.scale][1]
        for r, pages in enumerate(per_page):
            table[r, :pages] = order[at : at + pages]
            rows.append(table[r])
            pos = torch.arange(self.lens[r], device=DEV)
            page, slot = order[at : at + pages].long()[pos // self.page_len], pos % self.page_len
            for i, group in ((0, self.k_group), (1, self.v_group)):
                shape = (len(pos), self.heads, self.dim)
                codes = torch.randint(-127, 128, shape, generator=gen, device=DEV, dtype=torch.int16).to(torch.int8)
                gshape = (len(pos), self.heads, self.dim // group)
                s = torch.rand(gshape, generator=gen, device=DEV) * 0.02 + 0.001
                z = torch.randn(gshape, generator=gen, device=DEV)
                if self.magnitude == "mixed":
                    s = s * torch.exp2(2 * z) * (torch.rand(gshape, generator=gen, device=DEV) > 0.1)
                elif self.magnitude == "wide":
                    token = torch.randn((len(pos), self.heads, 1), generator=gen, device=DEV)
                    s = s * torch.exp2((4 * token if self.scale == "f16" else 18 * token) + 2 * z)
                    if self.scale == "f16":
                        s = torch.where(torch.rand(gshape, generator=gen, device=DEV) < 0.01, s * 0 + 60000.0 * torch.rand(gshape, generator=gen, device=DEV), s)
                        s = s.clamp(max=65504.0)
                elif self.magnitude == "tiny":
                    s = s * (2.0**-14 if self.scale == "f16" else 2.0**-110)
                cache.codes[i][page, slot] = codes
                cache.scales[i][page, slot] = s.to(dtype)
            at += pages
        if self.bad_page and any(per_page):
            r = int(rng.choice([i for i, n in enumerate(per_page) if n]))
            table[r, int(rng.integers(per_page[r]))] = int(rng.choice([-1, num_pages, 2**31 - 1, -(2**31)]))
        q = torch.randn((self.batch, self.q_len, self.heads * self.gqa, self.dim), generator=gen, device=DEV)
        q = q * float(rng.choice([0.1, 1.0, 1.0, 4.0]))
        if self.magnitude == "wide":
            q = q * 2.0**-8 if self.scale == "f16" else q * 2.0**-30
        if self.magnitude == "tiny" and self.scale != "f16":
            q = q * 2.0**100 if self.q_type != "f16" else q
        q = q.to(FLOATS[self.q_type][1])
        h = self.heads * self.gqa
        alibi = torch.rand(h, generator=gen, device=DEV) * 0.1 if self.alibi else None
        sinks = torch.randn(h, generator=gen, device=DEV) * 2 if self.sinks else None
        starts = torch.arange(self.batch, device=DEV, dtype=torch.int64) * stride if rng.random() < 0.5 else None
        plan = (plan_fixed(self.lens, self.q_len, self.window, self.workers, self.fixed, self.in_order) if self.fixed
                else plan_stream(self.lens, self.q_len, self.window, self.workers))
        return cache, table, rows, stride, q, alibi, sinks, starts, plan


def run_case(kernels, seed, stats):
    case = Case(seed)
    if kernels.only_dim and case.dim != kernels.only_dim:
        return
    cache, table, rows, stride, q, alibi, sinks, starts, plan = case.build()
    scale = 1.0 / math.sqrt(case.dim)
    common = dict(starts=starts, row_stride=0 if starts is not None else stride, window=case.window, soft_cap=case.soft_cap,
                  softmax_scale=scale, alibi=alibi, sinks=sinks)
    natural = pick(kernels, cache, case.gqa * case.q_len)
    symbols = [natural, pick(kernels, cache, 0, "f32")]
    if case.rng.random() < 0.2:
        symbols.append(f"kv8_stage1_d{case.dim}_gx_sx_n1")
    if natural[-1] in "24":
        symbols.append(natural[:-1] + "1")
    if kernels.only_dim:
        symbols = [f"kv8_stage1_d{case.dim}_gx_sx_n1", f"kv8_stage1_d{case.dim}_gx_sx_n1_f32"]
    for symbol in symbols:
        mma = not symbol.endswith("_f32")
        arithmetic = "whole" if "_gw_" in symbol else "mma" if mma else "f32"
        out, bound, lse, lse_bound = stats["ref"](case, cache, rows, q, alibi, sinks, scale, arithmetic)
        runs = []
        for _ in range(2):
            decode = Decode(kernels, cache, table, case.lens, q, case.out_type, plan, force=symbol, heads_per_cta=case.heads_per_cta,
                            shares=case.shares, ready=seed % 3, wide=case.wide, fills_device=case.fills_device, **common)
            decode.run()
            runs.append(decode)
        torch.cuda.synchronize()
        got, got_lse = decode.out.double(), decode.lse.double()
        limit = store_bound(out, bound, case.out_type)
        top = {"f16": 65504.0, "bf16": 3.38e38, "f32": 3.4e38}[case.out_type]
        big = out.abs() + limit > top  # a true value out of the output type's range
        ratio = torch.where(big, 0.0, (got - out).abs() / limit)
        ratio = torch.where(torch.isnan(got) & ~big, math.inf, ratio)
        same = torch.equal(runs[0].out.view(torch.uint8), runs[1].out.view(torch.uint8))
        lse_diff = torch.where(got_lse == lse, 0.0, (got_lse - lse).abs() / lse_bound.clamp(min=1e-30))
        lse_diff = torch.where(torch.isnan(lse_diff), math.inf, lse_diff)
        worst, worst_lse = float(ratio.max()), float(lse_diff.max())
        reported = int(decode.error[0]) != 0
        visible_bad = case.bad_page
        stats["cases"] += 1
        stats["outputs"] += got.numel()
        by = stats["by"].setdefault(decode.symbol, [0, 0.0, 0.0])
        by[0] += 1
        by[1], by[2] = max(by[1], worst if worst < 1e9 else by[1]), max(by[2], worst_lse if worst_lse < 1e9 else by[2])
        norm = out.norm()
        rel = float((got - out).norm() / norm) if norm > 0 and math.isfinite(float(norm)) else 0.0
        if mma and case.magnitude == "usual" and not bool(big.any()):
            worst_rel = stats["rel"].setdefault(case.out_type, [0.0, 0.0, 0])
            worst_rel[0] = max(worst_rel[0], rel)
            worst_rel[1] += rel
            worst_rel[2] += 1
        if worst > 1 or worst_lse > 1 or not same or (reported and not visible_bad):
            stats["failures"].append(f"{symbol} out {worst:.3g} lse {worst_lse:.3g} rel {rel:.2e} same {same} error {decode.error.tolist()} :: {case}")


def fuzz(kernels, seconds, seed, stop_at=40, quiet=False):
    stats = dict(cases=0, outputs=0, failures=[], by={}, rel={})
    memo = {}

    def ref(case, cache, rows, q, alibi, sinks, scale, arithmetic):
        key = (case.seed, arithmetic)
        if key not in memo:
            if memo and next(iter(memo))[0] != case.seed:
                memo.clear()
            memo[key] = reference(cache, rows, case.lens, q, case.window, case.soft_cap, scale, alibi, sinks, arithmetic)
        return memo[key]

    stats["ref"] = ref
    begin = time.time()
    while time.time() - begin < seconds and len(stats["failures"]) < stop_at:
        run_case(kernels, seed, stats)
        seed += 1
    if quiet:
        return stats
    print(f"fuzz: {stats['cases']} launches of {len(stats['by'])} variants, {stats['outputs']} outputs, {len(stats['failures'])} failures")
    for symbol in sorted(stats["by"]):
        n, worst, worst_lse = stats["by"][symbol]
        print(f"  {symbol:36s} {n:5d} worst err/bound {worst:.3f} lse {worst_lse:.3f}")
    print("  relative L2 by out type (worst, mean):", {k: (f"{v[0]:.2e}", f"{v[1] / v[2]:.2e}") for k, v in stats["rel"].items()})
    for line in stats["failures"][:12]:
        print("  FAIL", line)
    return not stats["failures"]


def check_large_pool(kernels):
    """Live pages only at the end of a pool beyond 4 GiB; the same tokens in a small pool must give the same bits."""
    ok = True
    for layout in ("hnd", "native"):
        heads, dim, page_len, n = 8, 128, 16, 500
        num_pages = (5 << 30) // (heads * dim * page_len)
        outs = []
        small = Cache(layout, 64, page_len, heads, dim, 8, 8, "f16")
        for i in range(2):
            small.codes[i].copy_(torch.randint(-127, 128, small.codes[i].shape, device=DEV, dtype=torch.int16).to(torch.int8))
            small.scales[i].copy_(torch.rand(small.scales[i].shape, device=DEV) * 0.02)
        large = Cache(layout, num_pages, page_len, heads, dim, 8, 8, "f16", poison=False)
        for b in large.buffers:
            b.view(torch.uint8).fill_(0xFF)
        for i in range(2):
            large.codes[i][-64:].copy_(small.codes[i])
            large.scales[i][-64:].copy_(small.scales[i])
        q = torch.randn((1, 1, 32, dim), device=DEV).half()
        order = torch.randperm(64, device=DEV, dtype=torch.int32)
        for cache, base in ((small, 0), (large, num_pages - 64)):
            decode = Decode(kernels, cache, (order + base).to(torch.int32).view(1, -1).contiguous(), [n], q, "f32",
                            plan_stream([n], 1, 0, 5), row_stride=64)
            decode.run()
            torch.cuda.synchronize()
            outs.append(decode.out)
        same = torch.equal(outs[0], outs[1]) and bool(torch.isfinite(outs[0]).all())
        ok &= same
        print(f"large pool {layout}: {sum(b.numel() * b.element_size() for b in large.buffers) / 2**30:.1f} GiB, same bits: {same}")
        del large, small
        torch.cuda.empty_cache()
    return ok


def check_invariance(kernels):
    """With fixed splits a request gives the same bits alone and among neighbours."""
    heads, dim = 4, 128
    lens = [1000, 37, 2048, 0, 700]
    pages = [-(-n // 16) for n in lens]
    cache = Cache("hnd", sum(pages), 16, heads, dim, 8, 8, "f16")
    for i in range(2):
        cache.codes[i].copy_(torch.randint(-127, 128, cache.codes[i].shape, device=DEV, dtype=torch.int16).to(torch.int8))
        cache.scales[i].copy_(torch.rand(cache.scales[i].shape, device=DEV) * 0.02)
    table = torch.zeros((5, max(pages)), dtype=torch.int32, device=DEV)
    at = 0
    for r, count in enumerate(pages):
        table[r, :count] = torch.arange(at, at + count, device=DEV)
        at += count
    q = torch.randn((5, 1, 16, dim), device=DEV).half()
    ok = True
    for wide in (False, True):
        together = Decode(kernels, cache, table, lens, q, "f16", plan_fixed(lens, 1, 0, 13, 256), row_stride=max(pages), wide=wide)
        together.run()
        for r in range(5):
            for workers in (1, 3):
                alone = Decode(kernels, cache, table[r : r + 1].contiguous(), [lens[r]], q[r : r + 1].contiguous(), "f16",
                               plan_fixed([lens[r]], 1, 0, workers, 256, workers == 1), row_stride=max(pages), wide=wide)
                alone.run()
                torch.cuda.synchronize()
                ok &= torch.equal(alone.out[0], together.out[r])
    print(f"batch invariance: {ok}")
    return ok


def kill_mutants(folder, seconds, seed):
    """folder holds one folder of kernels a mutant, named by its number; each must fail append or the fuzz of head_dim 128."""
    alive = []
    for path in sorted(pathlib.Path(folder).iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else 0):
        if not path.name.isdigit():
            continue
        kernels = Kernels(path)
        kernels.only_dim = 128
        number = int(path.name)
        if number in (20, 21, 22, 25):
            killed = not check_append(kernels, min(seconds, 3), seed)
        elif number == 28:
            killed = not check_invariance(kernels)
        else:
            stats = fuzz(kernels, seconds, seed, stop_at=1, quiet=True)
            killed = bool(stats["failures"])
            print(f"mutant {number}: after {stats['cases']} launches {stats['failures'][:1]}"[:160])
        if not killed:
            alive.append(number)
        print(f"mutant {number}: {'killed' if killed else 'ALIVE'}", flush=True)
    print(f"mutants alive: {alive}")
    return not alive
