"""Loads the kernels through the driver and launches them; caches, plans and decode problems on the device."""

import ctypes
import math
import pathlib
import struct
import tomllib

import numpy as np
import torch

import instances

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


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


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
        table = next(p / "instances.toml" for p in (folder, *folder.absolute().parents) if (p / "instances.toml").exists())
        self.rows = tomllib.loads(table.read_text())["instance"]
        self.by_symbol = {instances.symbol(row): row for row in self.rows}
        self.functions = {}
        self.only_dim = 0
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
                    if shared:
                        call("cuFuncSetAttribute", function, 8, 232448)
                        call("cuFuncSetAttribute", function, 14, 1)  # clusters of more than 8
                        call("cuFuncSetAttribute", function, 9, 100)  # prefer shared memory over L1
                    self.functions[symbol] = (function, shared)
                    break
            else:
                raise KeyError(symbol)
        return self.functions[symbol]

    def launch(self, symbol, grid, block, params, dependent=False, cluster=0, more_shared=0, policy=0):
        function, shared = self.get(symbol)
        config = LaunchConfig()
        config.grid[:] = grid
        config.block[:] = block
        config.shared = shared + more_shared
        config.stream = torch.cuda.current_stream().cuda_stream
        numbers = ctypes.c_uint * 16
        attributes = []
        if dependent:
            attributes.append(LaunchAttribute(6, 0, numbers(1)))  # programmatic stream serialization
        if cluster > 1:
            attributes.append(LaunchAttribute(4, 0, numbers(1, 1, cluster)))
        if policy:
            attributes.append(LaunchAttribute(5, 0, numbers(policy)))
        if attributes:
            config.attributes = (LaunchAttribute * len(attributes))(*attributes)
            config.num_attributes = len(attributes)
        buffer = ctypes.create_string_buffer(params, len(params))
        args = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        call("cuLaunchKernelEx", ctypes.byref(config), function, args, None)


class Cache:
    """Planes as strided views: *_codes [pages, page_len, heads, head_dim], *_scales [.., groups]."""

    def __init__(self, layout, num_pages, page_len, heads, dim, k_group, v_group, scale, poison=True):
        self.layout, self.num_pages, self.page_len, self.heads, self.dim = layout, num_pages, page_len, heads, dim
        self.k_group, self.v_group, self.scale = k_group, v_group, scale
        dtype = FLOATS[scale][1]
        unit = torch.empty(0, dtype=dtype).element_size()
        kg, vg = dim // k_group, dim // v_group
        self.buffers = []
        self.record_bytes = 0

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
            self.record_bytes = record if page_len >= 16 else 0
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
                                 self.k_group, self.v_group, FLOATS[self.scale][0], self.record_bytes)

    def packed_scales_aligned(self):
        unit = self.scales[0].element_size()
        for view, group in zip(self.scales, (self.k_group, self.v_group)):
            need = 16 if self.dim // group * unit % 16 == 0 else 8
            if view.data_ptr() % need or any(s * unit % need for s in view.stride()[:3]):
                return False
        return True


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


def plan_fixed(kv_lens, q_len, window, num_workers, split_len, in_order=False):
    """Batch-invariant: each request is cut at multiples of split_len from token 0; items are dealt in turn, or in stretches."""
    total = sum(max(1, -(-n // split_len) - visible_start(n, q_len, window) // split_len) for n in kv_lens)
    place = lambda w: w * num_workers // total if in_order else w % num_workers
    items = [[] for _ in range(num_workers)]
    cuts, w = [], 0
    for n in kv_lens:
        start = visible_start(n, q_len, window)
        pieces = []
        for lo in range(start // split_len * split_len, n, split_len):
            pieces.append((place(w), max(start, lo), min(n, lo + split_len)))
            w += 1
        cuts.append(pieces or [(place(w), n, n)])
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


class Decode:
    """One decode problem on the device, ready to launch."""

    def __init__(self, kernels, cache, table, kv_lens, q, out_type, plan, *, starts=None, row_stride=0, window=0, soft_cap=0.0,
                 softmax_scale=None, alibi=None, sinks=None, force=None, lse=True, partials=None, heads_per_cta=1, ready=2, shares=0, wide=False,
                 fills_device=0):
        self.k, self.cache, self.q, self.shares, self.policy = kernels, cache, q, shares, 0
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
        ) + struct.pack("<7I2f5I", self.batch, self.q_len, self.q_heads, self.q_heads // self.cache.heads, q_type, FLOATS[out_type][0], window,
                        scale, soft_cap, count, int(ready), shares, fills_device, 0)
        rows = self.q_heads // cache.heads * self.q_len
        self.symbol = force or pick(kernels, cache, rows)
        row_tiles = kernels.by_symbol[self.symbol]["row_tiles"]
        if heads_per_cta > kernels.by_symbol[self.symbol]["max_heads"] or cache.heads % heads_per_cta:
            heads_per_cta = 1
        self.block = (128 // heads_per_cta, heads_per_cta, 1)
        alone = self.symbol.replace("stage1", "shares" if shares else "items")
        if (shares or wide) and heads_per_cta == 1 and alone in kernels.by_symbol:
            self.symbol, self.block = alone, (256, 1, 1)
        self.grid = (cache.heads // heads_per_cta, -(-rows // (8 * row_tiles)), self.num_workers)
        self.more_shared = 0
        if shares:
            self.grid = (*self.grid[:2], self.batch * shares)
        blocks = self.grid[0] * self.grid[1] * self.grid[2]
        if 4 <= shares <= 8 and 4 * blocks > 3 * 132:
            self.policy = 2  # residency::balances_clusters, but for two waves
        if shares > 1:
            elements = min(rows, 8 * row_tiles) * self.dim // 4
            self.more_shared = 16 + heads_per_cta * shares * -(-elements // shares) * 24
        total_rows = self.q_heads * self.q_len
        wanted = min(max(-(-total_rows // 8) * self.batch, 264), 528)
        along_rows = min(total_rows, 32)
        self.grid2 = (along_rows, min(max(wanted // along_rows, 1), self.batch), 1)

    def stage1(self, dependent=False):
        self.k.launch(self.symbol, self.grid, self.block, self.params, dependent=dependent, cluster=self.shares,
                      more_shared=self.more_shared, policy=self.policy)

    def stage2(self):
        self.k.launch("kv8_stage2", self.grid2, (self.dim // 4, 8, 1), self.params, dependent=True)

    def run(self):
        self.stage1(dependent=True)
        if not self.shares:
            self.stage2()


def pick(kernels, cache, rows, arithmetic="mma"):
    """The variant of the table that fits a problem best: most specialized class, fewest row tiles that hold the rows."""
    d, scale = cache.dim, "s" + cache.scale
    if arithmetic == "f32":
        return f"kv8_stage1_d{d}_gx_sx_n1_f32"
    whole = f"kv8_stage1_d{d}_gw_sx_n{1 if rows <= 8 else 2}"
    if cache.k_group == d and cache.v_group == d and rows <= 16 and whole in kernels.by_symbol:
        return whole
    if cache.k_group == 8 and cache.v_group == 8 and cache.packed_scales_aligned():
        base = f"kv8_stage1_d{d}_g8_{scale}_n"
    elif cache.k_group >= 16 and cache.v_group >= 16:
        base = f"kv8_stage1_d{d}_g16_{scale if scale == 'sf16' else 'sx'}_n"
    else:
        base = f"kv8_stage1_d{d}_gx_sx_n"
    tiles = sorted(n for n in (1, 2, 4) if f"{base}{n}" in kernels.by_symbol)
    return f"{base}{next((n for n in tiles if 8 * n >= rows), tiles[-1])}"
