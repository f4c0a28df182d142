"""Checks the kernels against numpy and an f64 reference on a GPU, then times them.

    python3 check.py KERNELS [--append-seconds S] [--fuzz-seconds S] [--time] [--seed N] [--json FILE]

KERNELS is the folder that dev/build.sh filled; instances.toml must lie beside it or in it. Needs torch and numpy.
"""

import argparse
import ctypes
import json
import math
import pathlib
import struct
import sys
import time
import tomllib

import numpy as np
import torch

cuda = ctypes.CDLL("libcuda.so.1")
NO_PARTIAL = 0xFFFFFFFF
FLOATS = {"f16": (0, torch.float16), "bf16": (1, torch.bfloat16), "f32": (2, torch.float32)}
DEV = torch.device("cuda")


def call(name, *args):
    code = getattr(cuda, name)(*args)
    if code != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {code} {text.value}")


# ---------------------------------------------------------------------------------------------------- launching
class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class Kernels:
    def __init__(self, folder):
        folder = pathlib.Path(folder)
        table = next(p for p in (folder / "instances.toml", folder.parent / "instances.toml") if p.exists())
        self.rows = tomllib.loads(table.read_text())["instance"]
        sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
        import instances

        self.by_symbol = {instances.symbol(row): row for row in self.rows}
        self.functions = {}
        self.modules = []
        for path in sorted(folder.glob("*.fatbin")):
            module = ctypes.c_void_p()
            call("cuModuleLoadData", ctypes.byref(module), path.read_bytes())
            self.modules.append(module)

    def get(self, symbol):
        if symbol not in self.functions:
            for module in self.modules:
                function = ctypes.c_void_p()
                if cuda.cuModuleGetFunction(ctypes.byref(function), module, symbol.encode()) == 0:
                    shared = self.by_symbol.get(symbol, {}).get("shared_bytes", 0)
                    if shared > 48 * 1024:
                        call("cuFuncSetAttribute", function, 8, shared)
                    if shared:
                        call("cuFuncSetAttribute", function, 9, 100)  # prefer shared memory over L1
                    self.functions[symbol] = (function, shared)
                    break
            else:
                raise KeyError(symbol)
        return self.functions[symbol]

    def launch(self, symbol, grid, block, params, dependent=False):
        function, shared = self.get(symbol)
        config = LaunchConfig()
        config.grid[:] = grid
        config.block[:] = block
        config.shared = shared
        config.stream = torch.cuda.current_stream().cuda_stream
        if dependent:
            attribute = LaunchAttribute(6, 0, 1)  # programmatic stream serialization
            config.attributes = ctypes.pointer(attribute)
            config.num_attributes = 1
        buffer = ctypes.create_string_buffer(params, len(params))
        args = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        call("cuLaunchKernelEx", ctypes.byref(config), function, args, None)


# ---------------------------------------------------------------------------------------------------- cache
class Cache:
    """Planes as strided views: *_codes [pages, page_len, heads, head_dim], *_scales [.., groups]."""

    def __init__(self, layout, num_pages, page_len, heads, dim, k_group, v_group, scale, poison=True):
        self.layout, self.num_pages, self.page_len, self.heads, self.dim = layout, num_pages, page_len, heads, dim
        self.k_group, self.v_group, self.scale = k_group, v_group, scale
        dtype = FLOATS[scale][1]
        unit = torch.empty(0, dtype=dtype).element_size()
        kg, vg = dim // k_group, dim // v_group
        self.buffers = []

        def codes_buffer(count):
            buffer = torch.full((count,), -128, dtype=torch.int8, device=DEV) if poison else torch.empty(count, dtype=torch.int8, device=DEV)
            self.buffers.append(buffer)
            return buffer

        def scales_buffer(count):
            count += count % 2
            buffer = torch.full((count,), float("nan"), dtype=dtype, device=DEV) if poison else torch.empty(count, dtype=dtype, device=DEV)
            self.buffers.append(buffer)
            return buffer

        shape_c = (num_pages, page_len, heads, dim)
        shapes = ((num_pages, page_len, heads, kg), (num_pages, page_len, heads, vg))
        if layout == "lightllm":
            assert page_len == 1 and kg == vg
            c, s = codes_buffer(num_pages * 2 * heads * dim), scales_buffer(num_pages * 2 * heads * kg)
            st_c, st_s = (2 * heads * dim, 2 * heads * dim, dim, 1), (2 * heads * kg, 2 * heads * kg, kg, 1)
            self.codes = [c.as_strided(shape_c, st_c, 0), c.as_strided(shape_c, st_c, heads * dim)]
            self.scales = [s.as_strided(shapes[0], st_s, 0), s.as_strided(shapes[1], st_s, heads * kg)]
        elif layout == "native":
            record = -(-(dim + max(kg, vg) * unit) // 16) * 16
            total = num_pages * heads * 2 * page_len * record
            c = codes_buffer(total)
            s = c.view(dtype)
            if poison:  # codes 0x80; scale bytes NaN
                records = c.view(-1, record)
                records[:, dim:] = -1
            st_c = (heads * 2 * page_len * record, record, 2 * page_len * record, 1)
            st_s = tuple(x // unit for x in st_c[:3]) + (1,)
            self.codes = [c.as_strided(shape_c, st_c, i * page_len * record) for i in range(2)]
            self.scales = [s.as_strided(shapes[i], st_s, (i * page_len * record + dim) // unit) for i in range(2)]
        else:
            self.codes, self.scales = [], []
            for i in range(2):
                g = (kg, vg)[i]
                c, s = codes_buffer(num_pages * page_len * heads * dim), scales_buffer(num_pages * page_len * heads * g)
                if layout == "hnd":
                    st = lambda w: (heads * page_len * w, w, page_len * w, 1)
                else:
                    st = lambda w: (page_len * heads * w, heads * w, w, 1)
                self.codes.append(c.as_strided(shape_c, st(dim), 0))
                self.scales.append(s.as_strided(shapes[i], st(g), 0))

    def pack(self, table=0, starts=0, stride=0):
        out = b""
        for view in self.codes + self.scales:
            out += struct.pack("<4Q", view.data_ptr(), *view.stride()[:3])
        return out + struct.pack("<3Q8I", table, starts, stride, self.num_pages, self.page_len, self.heads, self.dim,
                                 self.k_group, self.v_group, FLOATS[self.scale][0], 0)

    def packed_scales_aligned(self):
        unit = self.scales[0].element_size()
        for view, group in zip(self.scales, (self.k_group, self.v_group)):
            need = 16 if self.dim // group * unit % 16 == 0 else 8
            if view.data_ptr() % need or any(s * unit % need for s in view.stride()[:3]):
                return False
        return True


# ---------------------------------------------------------------------------------------------------- plan
def visible_start(kv_len, q_len, window):
    return max(0, kv_len - q_len - window + 1) if window else 0


def plan_stream(kv_lens, q_len, window, num_workers, tile=64):
    """Even contiguous ranges over all requests' visible tokens, cut at tiles counted from each request's first."""
    spans = []
    for n in kv_lens:
        start = visible_start(n, q_len, window)
        spans.append((start, n, -(-(n - start) // tile)))
    total = sum(s[2] for s in spans)
    num_workers = max(1, min(num_workers, total))
    bounds = [w * total // num_workers for w in range(num_workers + 1)]
    items = [[] for _ in range(num_workers)]
    at = 0
    cuts = []
    for r, (start, end, tiles) in enumerate(spans):
        pieces = []
        if tiles == 0:
            pieces.append((0 if at == 0 else next(w for w in range(num_workers) if bounds[w] < at + 1 and at <= bounds[w + 1]), end, end))
        for w in range(num_workers):
            lo, hi = max(at, bounds[w]), min(at + tiles, bounds[w + 1])
            if lo < hi:
                pieces.append((w, start + (lo - at) * tile, min(end, start + (hi - at) * tile)))
        at += tiles
        cuts.append(pieces)
    return finish_plan(cuts, items)


def plan_fixed(kv_lens, q_len, window, num_workers, split_len):
    """Batch-invariant: each request is cut at multiples of split_len from token 0; items are dealt in turn."""
    items = [[] for _ in range(num_workers)]
    cuts, w = [], 0
    for n in kv_lens:
        start = visible_start(n, q_len, window)
        pieces = []
        for lo in range(start // split_len * split_len, n, split_len):
            pieces.append((w % num_workers, max(start, lo), min(n, lo + split_len)))
            w += 1
        cuts.append(pieces or [(w % num_workers, n, n)])
    return finish_plan(cuts, items)


def finish_plan(cuts, items):
    partials, starts = 0, [0]
    for r, pieces in enumerate(cuts):
        for w, lo, hi in pieces:
            if len(pieces) == 1:
                items[w].append((r, lo, hi, NO_PARTIAL))
            else:
                items[w].append((r, lo, hi, partials))
                partials += 1
        starts.append(partials)
    flat = [i for worker in items for i in worker]
    worker_starts = np.cumsum([0] + [len(w) for w in items]).astype(np.uint32)
    return np.array(flat, dtype=np.uint32).reshape(-1, 4), worker_starts, np.array(starts, dtype=np.uint32)


def device(array):
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).to(DEV)


# ---------------------------------------------------------------------------------------------------- decode
class Decode:
    """One decode problem on the device, ready to launch."""

    def __init__(self, kernels, cache, table, kv_lens, q, out_type, plan, *, starts=None, row_stride=0, window=0, soft_cap=0.0,
                 softmax_scale=None, alibi=None, sinks=None, force=None, lse=True, partials=None):
        self.k, self.cache, self.q = kernels, cache, q
        self.batch, self.q_len, self.q_heads, self.dim = q.shape
        self.out = torch.full(q.shape, float("nan"), dtype=FLOATS[out_type][1], device=DEV)
        self.lse = torch.full(q.shape[:3], float("nan"), device=DEV)
        items, worker_starts, request_partials = plan
        self.num_workers = len(worker_starts) - 1
        self.num_partials = int(request_partials[-1])
        self.items, self.worker_starts, self.request_partials = device(items), device(worker_starts), device(request_partials)
        self.table, self.starts, self.alibi, self.sinks = table, starts, alibi, sinks
        self.lens = device(np.array(kv_lens, dtype=np.uint32))
        count = max(self.num_partials, 1)
        if partials is None:
            partials = (torch.full((count * self.q_heads * self.q_len * self.dim,), float("nan"), device=DEV),
                        torch.full((count * self.q_heads * self.q_len * 2,), float("nan"), device=DEV))
        self.partial_o, self.partial_ml = partials
        self.error = torch.zeros(8, dtype=torch.int32, device=DEV)
        q_type = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}[q.dtype]
        ptr = lambda t: 0 if t is None else t.data_ptr()
        scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(self.dim)
        self.params = cache.pack(ptr(table), ptr(starts), row_stride) + struct.pack(
            "<12Q", ptr(q), ptr(self.out), ptr(self.lse) if lse else 0, ptr(self.lens), ptr(self.items), ptr(self.worker_starts),
            ptr(self.request_partials), ptr(self.partial_o), ptr(self.partial_ml), ptr(alibi), ptr(sinks), ptr(self.error),
        ) + struct.pack("<7I2fI", self.batch, self.q_len, self.q_heads, self.num_workers, q_type, FLOATS[out_type][0], window,
                        scale, soft_cap, count)
        rows = self.q_heads // cache.heads * self.q_len
        self.symbol = force or pick(kernels, cache, rows)
        row_tiles = kernels.by_symbol[self.symbol]["row_tiles"]
        self.grid = (self.num_workers * cache.heads, -(-rows // (8 * row_tiles)), 1)
        total_rows = self.q_heads * self.q_len
        self.grid2 = (min(total_rows, max(1, 132 * 8 // self.batch)), self.batch, 1)

    def stage1(self):
        self.k.launch(self.symbol, self.grid, (128, 1, 1), self.params)

    def stage2(self):
        self.k.launch("kv8_stage2", self.grid2, (self.dim // 4, 8, 1), self.params, dependent=True)

    def run(self):
        self.stage1()
        self.stage2()


def pick(kernels, cache, rows, arithmetic="mma"):
    """The variant of the table that fits a problem best: most specialized class, fewest row tiles that hold the rows."""
    d, scale = cache.dim, "s" + cache.scale
    if arithmetic == "f32":
        return f"kv8_stage1_d{d}_gx_sx_n1_f32"
    if cache.k_group == 8 and cache.v_group == 8 and cache.packed_scales_aligned():
        base = f"kv8_stage1_d{d}_g8_{scale}_n"
    elif cache.k_group >= 16 and cache.v_group >= 16:
        base = f"kv8_stage1_d{d}_g16_{scale if scale == 'sf16' else 'sx'}_n"
    else:
        base = f"kv8_stage1_d{d}_gx_sx_n"
    tiles = sorted(n for n in (1, 2, 4) if f"{base}{n}" in kernels.by_symbol)
    return f"{base}{next((n for n in tiles if 8 * n >= rows), tiles[-1])}"


# ---------------------------------------------------------------------------------------------------- reference
U16, U32 = 2.0**-11, 2.0**-24


def reference(cache, table_rows, kv_lens, q, window, soft_cap, scale, alibi, sinks, mma):
    """f64 attention on exactly code * scale, and the a-priori bound of docs/kernel-error.md for each output."""
    batch, q_len, q_heads, dim = q.shape
    gqa = q_heads // cache.heads
    out = torch.zeros(q.shape, dtype=torch.float64, device=DEV)
    bound = torch.zeros_like(out)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device=DEV)
    lse_bound = torch.zeros_like(lse)
    for r in range(batch):
        n = kv_lens[r]
        sink = None if sinks is None else sinks.double()
        if n > 0:
            pos = torch.arange(n, device=DEV)
            pages = table_rows[r].to(torch.int64)[pos // cache.page_len]
            good = (pages >= 0) & (pages < cache.num_pages)
            pages = torch.where(good, pages, 0)
            slots = pos % cache.page_len

            def plane(i, group):
                codes = cache.codes[i][pages, slots].double()
                s = cache.scales[i][pages, slots].double()
                s = torch.where(good[:, None, None], s, 0.0)
                return codes * s.repeat_interleave(group, -1), s.amax(-1)

            k, ks = plane(0, cache.k_group)  # [n, heads, dim]
            v, vs = plane(1, cache.v_group)
        for i in range(q_len):
            p = n - q_len + i
            hi, lo = max(0, p + 1), max(0, p - window + 1) if window else 0
            qd = q[r, i].double().view(cache.heads, gqa, dim)
            if hi > lo and bool(good[lo:hi].any()):
                kk, vv, g = k[lo:hi], v[lo:hi], good[lo:hi]
                s = torch.einsum("hgd,thd->hgt", qd, kk) * scale
                mag = torch.einsum("hgd,thd->hgt", qd.abs(), kk.abs()) * scale
                # f16 operands round q (f32 only) and k, sums of 16 in the tensor core then f32; q and k far below the row's
                # largest lose an absolute amount.
                if mma:
                    u_op = U16 + (U16 if q.dtype == torch.float32 else 0.0) + (U16 if cache.scale == "f32" else 0.0)
                    tiny = (2.0**-39 * qd.abs().amax(-1)[:, :, None] * kk.abs().sum(-1).T[:, None, :]
                            + 2.0**-24 * ks[lo:hi].T[:, None, :] * qd.abs().sum(-1)[:, :, None] * (cache.scale != "f16" or bool((ks[lo:hi] >= 256).any()))) * scale
                    delta = mag * (u_op + (dim / 16 + 4) * 2.0**-22) + tiny
                else:
                    delta = mag * (dim + 6) * U32
                if soft_cap:
                    x = s / soft_cap
                    s = soft_cap * torch.tanh(x)
                    delta = delta + soft_cap * 2.0**-20 + s.abs() * 4 * U32
                delta = delta + s.abs() * 6 * U32
                if alibi is not None:
                    bias = alibi.double().view(cache.heads, gqa)[:, :, None] * (torch.arange(lo, hi, device=DEV) - p)
                    s = s + bias
                    delta = delta + bias.abs() * 4 * U32
                s = torch.where(g[None, None, :], s, -math.inf)
                m = s.amax(-1, keepdim=True)
                delta = delta + (s - m).abs().clamp(max=1e4) * 4 * U32 + 2.0**-21
                w = torch.exp(s - m)
                l = w.sum(-1, keepdim=True)
                total = l
                if sink is not None:
                    sk = sink.view(cache.heads, gqa, 1)
                    total_m = torch.maximum(m, sk)
                    w = w * torch.exp(m - total_m)
                    total = l * torch.exp(m - total_m) + torch.exp(sk - total_m)
                    m = total_m
                prob = w / total
                o = torch.einsum("hgt,thd->hgd", prob, vv)
                e = torch.expm1(delta.clamp(max=50))
                pe = prob * e
                pe = torch.where(torch.isfinite(pe), pe, 0.0)
                spread = torch.einsum("hgt,thd->hgd", pe, vv.abs()) + pe.sum(-1, keepdim=True) * o.abs()
                a = torch.einsum("hgt,thd->hgd", prob, vv.abs())
                count = hi - lo
                steps = count / 16 + 40
                u_val = (2 * U16 + (U16 if cache.scale == "f32" else 0.0) + steps * 2.0**-22) if mma else (count + 40) * U32
                denominator = (1 - pe.sum(-1, keepdim=True)).clamp(min=1e-3)
                b = (spread / denominator + a * (u_val + (count + 40) * U32)) * 1.02
                b = b + count * 2.0**-149 * vv.abs().amax(0)[:, None, :] / total
                if mma:
                    # f16 weights below 2^-14 of 2^8 * the running reference, normalized scales below f16's normal range.
                    top = vv.abs().amax(0)[:, None, :]
                    b = b + count * 2.0**-32 * top / total + 2.0**-24 * (prob * vs[lo:hi].T[:, None, :]).sum(-1, keepdim=True)
                    if cache.scale != "f16" or bool((vs[lo:hi] >= 256).any()):
                        b = b + count * 2.0**-24 * (prob * vs[lo:hi].T[:, None, :]).amax(-1, keepdim=True)
                out[r, i] = o.view(q_heads, dim)
                bound[r, i] = b.view(q_heads, dim)
                lse[r, i] = (m[..., 0] + torch.log(total[..., 0])).view(q_heads)
                lse_bound[r, i] = (pe.sum(-1) / denominator[..., 0] + (count + 40) * U32 + lse[r, i].view(cache.heads, gqa).abs() * 4 * U32 + 1e-6).view(q_heads)
            elif sink is not None:
                lse[r, i] = sink
                lse_bound[r, i] = sink.abs() * 4 * U32
    return out, bound, lse, lse_bound


def store_bound(out, bound, out_type):
    u = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}[out_type]
    eta = {"f16": 2.0**-25, "bf16": 2.0**-134, "f32": 2.0**-149}[out_type]
    return bound * (1 + u) + out.abs() * u + eta + 1e-42


# ---------------------------------------------------------------------------------------------------- fuzz
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
        plan = (plan_fixed(self.lens, self.q_len, self.window, self.workers, self.fixed) if self.fixed
                else plan_stream(self.lens, self.q_len, self.window, self.workers))
        return cache, table, rows, stride, q, alibi, sinks, starts, plan


def run_case(kernels, seed, stats):
    case = Case(seed)
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
    for symbol in symbols:
        mma = not symbol.endswith("_f32")
        out, bound, lse, lse_bound = stats["ref"](case, cache, rows, q, alibi, sinks, scale, mma)
        runs = []
        for _ in range(2):
            decode = Decode(kernels, cache, table, case.lens, q, case.out_type, plan, force=symbol, **common)
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
        by = stats["by"].setdefault(symbol, [0, 0.0, 0.0])
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


def fuzz(kernels, seconds, seed):
    stats = dict(cases=0, outputs=0, failures=[], by={}, rel={})
    memo = {}

    def ref(case, cache, rows, q, alibi, sinks, scale, mma):
        key = (case.seed, mma)
        if key not in memo:
            if memo and next(iter(memo))[0] != case.seed:
                memo.clear()
            memo[key] = reference(cache, rows, case.lens, q, case.window, case.soft_cap, scale, alibi, sinks, mma)
        return memo[key]

    stats["ref"] = ref
    begin = time.time()
    while time.time() - begin < seconds and len(stats["failures"]) < 40:
        run_case(kernels, seed, stats)
        seed += 1
    print(f"fuzz: {stats['cases']} launches of {len(stats['by'])} variants, {stats['outputs']} outputs, {len(stats['failures'])} failures")
    for symbol in sorted(stats["by"]):
        n, worst, worst_lse = stats["by"][symbol]
        print(f"  {symbol:36s} {n:5d} worst err/bound {worst:.3f} lse {worst_lse:.3f}")
    print("  relative L2 by out type (worst, mean):", {k: (f"{v[0]:.2e}", f"{v[1] / v[2]:.2e}") for k, v in stats["rel"].items()})
    for line in stats["failures"][:12]:
        print("  FAIL", line)
    return not stats["failures"]


# ---------------------------------------------------------------------------------------------------- append
def to_bf16_bits(x):
    b = x.view(np.uint32).astype(np.uint64)
    return ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).astype(np.uint16)


def bits_to_f32(bits, scale):
    if scale == "f16":
        return bits.view(np.float16).astype(np.float32)
    if scale == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32)


def quantize(x, group, scale):
    """The rule of the format on f32 values [.., dim]: codes, scale bits."""
    g = x.reshape(*x.shape[:-1], -1, group)
    amax = np.abs(g).max(-1)
    with np.errstate(all="ignore"):
        quotient = amax / np.float32(127)
        if scale == "f32":
            bits = quotient.astype(np.float32).view(np.uint32)
            below = quotient.astype(np.float64) * 127 < amax.astype(np.float64)
        elif scale == "f16":
            bits = quotient.astype(np.float16).view(np.uint16)
            below = bits_to_f32(bits, scale).astype(np.float64) * 127 < amax
        else:
            bits = to_bf16_bits(quotient)
            below = bits_to_f32(bits, scale).astype(np.float64) * 127 < amax
        bits = (bits + below.astype(bits.dtype)).astype(bits.dtype)
        bits = np.where(amax == 0, 0, bits).astype(bits.dtype)
        s = bits_to_f32(np.ascontiguousarray(bits), scale)
        codes = np.clip(np.rint(g / s[..., None]), -127, 127)
        codes = np.where(amax[..., None] == 0, 0, codes)
    return np.nan_to_num(codes).astype(np.int8).reshape(x.shape), bits


def check_append(kernels, seconds, seed):
    begin, elements, failures, calls = time.time(), 0, 0, 0
    while time.time() - begin < seconds:
        rng = np.random.default_rng(seed)
        seed += 1
        pick_ = lambda *xs: xs[rng.integers(len(xs))]
        dim = pick_(64, 96, 128, 192, 256)
        groups = [g for g in (8, 16, 32, 64, 128) if dim % g == 0 and g <= dim] + [dim]
        k_group, v_group = pick_(*groups), pick_(*groups)
        layout = pick_("lightllm", "native", "hnd", "nhd")
        if layout == "lightllm":
            v_group = k_group
        page_len = 1 if layout == "lightllm" else pick_(1, 16, 64)
        heads, scale, kind = pick_(1, 2, 3, 8), pick_("f16", "bf16", "f32"), pick_("f16", "bf16", "f32")
        tokens = int(pick_(1, 7, 64, 1000, 4096 if dim <= 128 else 1000))
        num_pages = -(-tokens // page_len) + 2
        cache = Cache(layout, num_pages, page_len, heads, dim, k_group, v_group, scale)
        dtype = FLOATS[kind][1]
        mode = pick_("normal", "patterns", "mixed", "zeros")
        stride = heads * dim + pick_(0, 0, 8, 3)
        data = []
        for _ in range(2):
            if mode == "patterns" and kind != "f32":
                raw = torch.from_numpy((rng.integers(0, 65536, tokens * stride)).astype(np.uint16).view(np.int16)).to(DEV).view(dtype)
                top = 60000.0 if scale == "f16" else 3e38
                x = torch.where(torch.isfinite(raw) & (raw.abs() <= top), raw, torch.zeros_like(raw))
            else:
                x = torch.randn(tokens * stride, device=DEV)
                if mode == "mixed":
                    x = x * torch.exp2(torch.randn(tokens * stride, device=DEV) * 6)
                if mode == "zeros":
                    x = torch.where(torch.rand(tokens * stride, device=DEV) < 0.9, torch.zeros_like(x), x * 1e-6)
                x = x.to(dtype)
            data.append(x)
        slots = rng.permutation(num_pages * page_len)[:tokens].astype(np.int64)
        slots[rng.random(tokens) < 0.05] = -1
        bad = rng.random() < 0.2
        poisoned = {}
        if bad and tokens > 4:
            slots[1] = rng.choice([-2, num_pages * page_len, 2**40])
            t, i, h, c = 2, int(rng.integers(2)), int(rng.integers(heads)), int(rng.integers(dim))
            data[i][t * stride + h * dim + c] = float(rng.choice([math.nan, math.inf, -math.inf]))
            poisoned = {(t, i, h)}
        before = [b.clone() for b in cache.buffers]
        error = torch.zeros(8, dtype=torch.int32, device=DEV)
        slot_map = torch.from_numpy(slots).to(DEV)
        params = cache.pack() + struct.pack("<6Q2I", data[0].data_ptr(), data[1].data_ptr(), slot_map.data_ptr(), error.data_ptr(),
                                            stride, stride, tokens, FLOATS[kind][0])
        lanes = 8 if dim <= 64 else 16 if dim <= 128 else 32
        kernels.launch("kv8_append", (-(-tokens * heads // (256 // lanes)), 1, 1), (256, 1, 1), params)
        torch.cuda.synchronize()
        calls += 1
        # What the buffers must hold: the state before, with the rule's bytes in the right places.
        after = [b.clone() for b in cache.buffers]
        for b, old in zip(cache.buffers, before):
            b.copy_(old)
        ok_slots = (slots >= 0) & (slots < num_pages * page_len)
        live = np.nonzero(ok_slots)[0]
        for i, group in ((0, k_group), (1, v_group)):
            x = data[i].float().view(tokens, stride)[:, : heads * dim].cpu().numpy().reshape(tokens, heads, dim)
            codes, bits = quantize(x[live], group, scale)
            page = torch.from_numpy(slots[live] // page_len).to(DEV)
            slot = torch.from_numpy(slots[live] % page_len).to(DEV)
            keep = torch.ones((len(live), heads), dtype=torch.bool, device=DEV)
            for t, pi, h in poisoned:
                if pi == i and t in live:
                    keep[list(live).index(t), h] = False
            new_codes = torch.from_numpy(codes).to(DEV)
            signed = bits.view(np.int32 if scale == "f32" else np.int16)
            new_bits = torch.from_numpy(np.ascontiguousarray(signed)).to(DEV)
            code_view, scale_view = cache.codes[i], cache.scales[i].view(torch.int32 if scale == "f32" else torch.int16)
            code_view[page, slot] = torch.where(keep[..., None], new_codes, code_view[page, slot])
            scale_view[page, slot] = torch.where(keep[..., None], new_bits, scale_view[page, slot])
            elements += codes.size
        good = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(after, cache.buffers))
        expect_error = bool(poisoned) and (2 in live or (slots[1] != -1 and not ok_slots[1]))
        good &= (int(error[0]) != 0) == expect_error
        if good:
            good = check_dequantize(kernels, cache, after, page_len, rng)
        if not good:
            failures += 1
            if failures < 6:
                print(f"  FAIL append seed {seed - 1} dim {dim} groups {k_group}/{v_group} {layout} {scale} {kind} {mode} error {error.tolist()}")
    print(f"append: {calls} calls, {elements} elements, {failures} failures")
    return failures == 0


def check_dequantize(kernels, cache, buffers, page_len, rng):
    for b, new in zip(cache.buffers, buffers):
        b.copy_(torch.where(new.view(torch.uint8) == 0xFF, 0, new.view(torch.uint8)).view(new.dtype) if b.dtype == torch.int8 else torch.nan_to_num(new))
    count = cache.num_pages * page_len
    table = torch.from_numpy(rng.permutation(cache.num_pages).astype(np.int32)).to(DEV)
    begin, end = sorted(int(x) for x in rng.integers(0, count + 1, 2))
    if begin == end:
        return True
    name = ("f16", "bf16", "f32")[rng.integers(3)]
    out = [torch.full((end - begin, cache.heads, cache.dim), float("nan"), dtype=FLOATS[name][1], device=DEV) for _ in range(2)]
    error = torch.zeros(8, dtype=torch.int32, device=DEV)
    params = cache.pack(table.data_ptr(), 0, cache.num_pages) + struct.pack("<3Q4I", out[0].data_ptr(), out[1].data_ptr(), error.data_ptr(), 0, begin, end, FLOATS[name][0])
    lanes = 8 if cache.dim <= 64 else 16 if cache.dim <= 128 else 32
    kernels.launch("kv8_dequantize", (-(-(end - begin) * cache.heads // (256 // lanes)), 1, 1), (256, 1, 1), params)
    torch.cuda.synchronize()
    pos = torch.arange(begin, end, device=DEV)
    page, slot = table.long()[pos // page_len], pos % page_len
    for i, group in ((0, cache.k_group), (1, cache.v_group)):
        want = cache.codes[i][page, slot].float() * cache.scales[i][page, slot].float().repeat_interleave(group, -1)
        if not torch.equal(torch.nan_to_num(want.to(FLOATS[name][1])), torch.nan_to_num(out[i])):
            return False
    return True


# ---------------------------------------------------------------------------------------------------- special cases
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
    together = Decode(kernels, cache, table, lens, q, "f16", plan_fixed(lens, 1, 0, 13, 256), row_stride=max(pages))
    together.run()
    ok = True
    for r in range(5):
        alone = Decode(kernels, cache, table[r : r + 1].contiguous(), [lens[r]], q[r : r + 1].contiguous(), "f16",
                       plan_fixed([lens[r]], 1, 0, 3, 256), row_stride=max(pages))
        alone.run()
        torch.cuda.synchronize()
        ok &= torch.equal(alone.out[0], together.out[r])
    print(f"batch invariance: {ok}")
    return ok


# ---------------------------------------------------------------------------------------------------- timing
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
               q_type="bf16", pool_bytes=330e6):
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
    count = workers or max(1, 132 * (ctas or info["min_ctas"]) // heads // blocks)
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
                        window=window, soft_cap=soft_cap, sinks=sink, lse=False)
        partials = (decode.partial_o, decode.partial_ml)
        decodes.append(decode)
    repeat = max(1, 16 // copies)
    full = median_us([d.run for d in decodes] * repeat)
    alone = median_us([d.stage1 for d in decodes] * repeat)
    floor = None
    name = f"kv8_reader_d{dim}_{'g8' if k_group == 8 else 'g16'}_sf16"
    if reader and scale == "f16" and name in kernels.by_symbol:
        grid = (decodes[0].num_workers * heads, 1, 1)
        floor = median_us([(lambda d=d: kernels.launch(name, grid, (128, 1, 1), d.params)) for d in decodes] * repeat)
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
    lightllm = dict(layout="lightllm", page_len=1)
    cases = [
        ("1x1024 native p16", u(1, 1024), {}),
        ("1x8192 native p16", u(1, 8192), {}),
        ("8x2048 native p16", u(8, 2048), {}),
        ("8x2048 lightllm shuffled", u(8, 2048), lightllm),
        ("8x8192 native p16", u(8, 8192), {}),
        ("8x8192 lightllm shuffled", u(8, 8192), lightllm),
        ("32x8192 native p16", u(32, 8192), {}),
        ("32x8192 lightllm shuffled", u(32, 8192), lightllm),
        ("128x8192 native p16", u(128, 8192), {}),
        ("128x8192 lightllm shuffled", u(128, 8192), lightllm),
        ("128x2048 native p16", u(128, 2048), {}),
        ("1x131072 native p16", u(1, 131072), {}),
        ("1x131072 lightllm shuffled", u(1, 131072), lightllm),
        ("64x8192 4q/1kv native p16", u(64, 8192), dict(heads=1)),
        ("64x8192 4q/1kv lightllm shuffled", u(64, 8192), dict(heads=1, **lightllm)),
        ("32x8192 native page 1", u(32, 8192), dict(page_len=1)),
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
            launches.append(lambda params=params: kernels.launch("kv8_append", (tokens * heads // 16, 1, 1), (256, 1, 1), params))
        us = median_us(launches)
        moved = tokens * heads * 2 * (256 + 160)
        print(f"append {tokens} tokens: {us:.1f} us, {moved / us / 1e3:.0f} GB/s of copy {copy:.0f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels")
    parser.add_argument("--append-seconds", type=float, default=0)
    parser.add_argument("--fuzz-seconds", type=float, default=0)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--special", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.zeros(1, device=DEV)
    torch.manual_seed(args.seed)
    kernels = Kernels(args.kernels)
    ok = True
    if args.case is not None:
        ok &= fuzz(kernels, 0.001, args.case)
    if args.append_seconds:
        ok &= check_append(kernels, args.append_seconds, args.seed)
    if args.fuzz_seconds:
        ok &= fuzz(kernels, args.fuzz_seconds, args.seed)
    if args.special:
        ok &= check_invariance(kernels)
        ok &= check_large_pool(kernels)
    if args.time:
        read, copy = bandwidth(kernels)
        name = torch.cuda.get_device_name()
        print(f"{name}: read {read:.0f} GB/s, copy {copy:.0f} GB/s")
        bench_append(kernels, copy)
        cases = [c for c in standard_cases() if args.only in c[0]]
        rows = bench(kernels, cases, read)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(dict(gpu=name, read_gb_per_s=read, copy_gb_per_s=copy, rows=rows)))
    print("OK" if ok else "FAILED")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
